"""`make ascend-test` without an NPU: what it says where there is none, its checks in the emulation,
and a stub of a machine that fails at each step in turn."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import first_day
import pytest
from first_day import PYTEST, STEPS, Step

ROOT = first_day.ROOT
# An interpreter with an NPU, as far as first_day.py asks: every command ends well, but for
# FAILS_AT. That does what FAILS_HOW says, in a test of pytest if it is one.
STUB = f"""#!{sys.executable}
import json, os, pathlib, sys
said, how = sys.argv[1:], os.environ["FAILS_HOW"]
if said[0] == "tests/npu/machine.py":
    print("2201" if said[1:] else "product    A2, 1 of a stub")
    sys.exit()
if "pip" in said:
    print("asc -c csrc/ascend/launch.asc, as", os.environ["SKBUILD_CMAKE_DEFINE"])
if said != json.loads(os.environ["FAILS_AT"]):
    sys.exit()
if "pytest" not in said:
    exec(how)
there = pathlib.Path(sys.argv[0]).parent
(there / "check_stub.py").write_text("def test_1(): pass\\ndef test_2(): " + how)
alone = ["--noconftest", "-c", os.devnull, "--rootdir", there, "-p", "no:cacheprovider"]
os.chdir(there)
os.execv(sys.executable, [sys.executable, *said[:-1], *alone, "check_stub.py"])
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def ascend_test(**environment: str) -> subprocess.CompletedProcess:
    return run(
        ["make", "--no-print-directory", "ascend-test", f"PYTHON={sys.executable}"], **environment
    )


def rehearse(folder: Path, step: Step | None = None, how: str = "") -> tuple[int, str]:
    """The exit status and the report of a machine that fails at a step."""
    stub, report = folder / "python", folder / "report.txt"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = run(
        [sys.executable, "tests/npu/first_day.py"],
        PYTHON=str(stub),
        REPORT=str(report),
        FAILS_AT=json.dumps(step and step.command),
        FAILS_HOW=how,
    )
    assert done.stdout.endswith(f"Please send us {report}, whatever it says.\n"), done.stderr
    return done.returncode, report.read_text()


def summary(report: str) -> dict[str, str]:
    """By step, what the summary says of it."""
    text = report.split("== summary\n")[1]
    starts = [text.index(f"\n{step.name}: ") for step in STEPS]
    assert starts == sorted(starts)
    parts = zip(starts, [*starts[1:], None])
    return {step.name: text[a:b] for step, (a, b) in zip(STEPS, parts)}


def test_without_an_npu_it_says_what_is_missing_and_runs_nothing(tmp_path):
    done = ascend_test(ASCEND_HOME_PATH="", REPORT=str(tmp_path / "report.txt"))
    assert done.returncode != 0
    assert "needs CANN and an Ascend NPU, A2, A3 or A5: ASCEND_HOME_PATH is not set" in done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


def test_with_cann_alone_it_names_what_python_lacks():
    done = ascend_test(ASCEND_HOME_PATH="/usr/local/Ascend")
    assert "cannot import torch_npu. Nothing was run" in done.stderr


def test_the_steps_are_in_the_order_in_which_they_are_likely_to_fail():
    assert [step.name for step in STEPS] == [
        "build",
        "link",
        "a launch that does nothing",
        "one core",
        "many cores",
        "the order of streams",
        "neighbours in 32 bytes",
        "stale tables",
        "graphs",
        "an engine",
        "speed",
    ]


def test_every_check_is_a_step():
    files = {step.command[-1] for step in STEPS if step.command[:2] == PYTEST[:2]}
    assert files == {f"tests/npu/{path.name}" for path in (ROOT / "tests/npu").glob("check_*.py")}


def test_where_all_passes_the_report_has_the_machine_the_compile_line_and_what_it_means(tmp_path):
    status, report = rehearse(tmp_path)
    assert status == 0
    assert "product    A2, 1 of a stub" in report
    compiled = "asc -c csrc/ascend/launch.asc, as DSV4_ASCEND_ARCH=2201"
    assert f"compiled by: {compiled}\n" in report
    for step in STEPS:
        said = summary(report)[step.name]
        assert "passed in " in said and step.passed in said and "again:" not in said


@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
def test_a_step_that_fails_is_explained_and_repeated_by_a_line_and_the_others_are_run(
    tmp_path, step
):
    is_check = step.command[:2] == PYTEST[:2]
    how = "assert False, 'not today'" if is_check else "print('ld: error: not today'); sys.exit(1)"
    status, report = rehearse(tmp_path, step, how)
    assert status == 1
    said = summary(report)
    assert "FAILED in" in said[step.name] and step.failed in said[step.name]
    first, command = "ld: error: not today", step.command
    if is_check:
        first = "FAILED check_stub.py::test_2 - AssertionError: not today"
        command = (*step.command[:-1], "check_stub.py::test_2")
    assert f"first: {first}" in said[step.name]
    assert f"again: {shlex.join([str(tmp_path / 'python'), *command])}" in said[step.name]
    assert [name for name in said if "FAILED in" in said[name]] == [step.name]


def test_a_crash_is_told_by_its_signal_and_repeated_by_the_test_that_was_running(tmp_path):
    step = STEPS[3]
    status, report = rehearse(tmp_path, step, "import os; os.kill(os.getpid(), 11)")
    said = summary(report)[step.name]
    assert status == 1 and "FAILED in" in said and "(signal 11)" in said
    assert "first: check_stub.py::test_2 Fatal Python error: Segmentation fault" in said
    command = shlex.join([str(tmp_path / "python"), *step.command[:-1], "check_stub.py::test_2"])
    assert f"again: {command}" in said


def test_what_hangs_is_stopped_with_all_its_processes_and_said_to_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(first_day, "PYTHON", "sh")
    step = Step("slow", ("-c", "echo begun; sleep 60 & sleep 60"), "", "It waits.", minutes=1 / 60)
    with (tmp_path / "report.txt").open("w") as file:
        outcome = first_day.take(first_day.Report(file), step)
    assert outcome.output == ["begun"] and outcome.seconds < 30
    assert "FAILED: it hung, and was stopped" in (tmp_path / "report.txt").read_text()


def test_the_checks_hold_in_the_emulation():
    options = ["-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests/op tests/ascend_emulation"]
    files = [step.command[-1] for step in STEPS if step.command[:2] == PYTEST[:2]]
    files.remove("tests/npu/check_engine.py")
    command = [sys.executable, *PYTEST[:2], *options, *files]
    done = run(command, TEST_DEVICE="cpu", OMP_NUM_THREADS="1")  # tensors are small
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
