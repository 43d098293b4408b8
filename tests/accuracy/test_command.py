"""`vllm-dsv4-indexer accuracy`: vLLM's own compressor, under our metadata, and a server find every needle too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.accuracy import report

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve_and_chat  # noqa: E402  (the example's own way of starting and stopping a server)


@pytest.fixture(scope="module")
def stock(needle_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """The folder that the command wrote to, and what it printed."""
    folder = tmp_path_factory.mktemp("accuracy")
    options = ["--settings", '{"impl": "stock"}', "--lengths", "2048,8192", "--output", str(folder)]
    command = [sys.executable, "-m", "vllm_dsv4_indexer.cli", "accuracy", str(needle_checkpoint), *options]
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
    document = {"length": 400, "entries": [0, 5, 95], "key": [True, False, False], "distance": [True, True, True]}
    result = {"engine": "vllm", "settings": {}, "url": None, "documents": [document]}
    assert report.shares(result)[400] == [(3, 4), *[(0, 0)] * 8, (1, 2)]
    assert "| 400 | 3 | 33 % | 100 % | 75 % |" in report.needle_table(result)
    assert report.heat_map(result).count(">75 %</text>") == report.heat_map(result).count(">50 %</text>") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["accuracy", "{babble}", "--engine", "transformers"], "--engine goes with needles, and this is recall"),
        (["accuracy", "nowhere"], "nowhere is no checkpoint: it has no config.json"),
        (["accuracy", "{needle}", "--chunk", "0"], "--chunk is 0; it is at least 1"),
        (["accuracy", "{needle}", "--url", "http://127.0.0.1:9"], "Connection refused"),
        (["accuracy", "{needle}", "--url", "127.0.0.1:9"], "write http://HOST:PORT"),
        (["accuracy", "{needle}", "--engine", "transformers", "--settings", '{"impl": "cpu"}'], "give them to the server"),
        (["accuracy", "{needle}", "--lengths", "2048,4097"], "--lengths: 4097 is no multiple of 4"),
        (["accuracy", "{needle}", "--lengths", "65536"], "--lengths: 65536 is not from 64 to 65532"),
        (["accuracy", "{babble}", "--lengths", "2048"], "recall needs a length above 2048"),
        (["accuracy", "{babble}", "--schedules", "9"], "--schedules is 9; it goes from 16"),
        (["accuracy", "{babble}", "--prompts", "0"], "--prompts is 0; it is at least 1"),
        (["accuracy", "{needle}", "--against", "{}"], "--against goes with recall, and this is needles"),
        (["accuracy", "{babble}", "--against-url", "http://127.0.0.1:9"], "with --url and --against-url together"),
        (["accuracy", "{babble}", "--samples", "3"], "--samples goes with two servers, and this is recall"),
        (["make-checkpoint", "anywhere", "--task", "needle", "--layers", "4"], "leave --layers out"),
    ],
)
def test_mistakes_are_one_line(needle_checkpoint, tmp_path, capsys, arguments, message):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 65536}')
    places = {"{babble}": str(tmp_path), "{needle}": str(needle_checkpoint)}
    assert cli.main([places.get(argument, argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


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


def test_what_an_engine_says_when_it_fails_comes_back_from_its_process(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 65536, "model_type": "nothing"}')
    assert cli.main(["accuracy", str(tmp_path), "--lengths", "4096"]) == 2
    assert "with the settings {}: " in (said := capsys.readouterr().err) and "nothing" in said
