"""`make ascend-test`: everything that wants an NPU, on the machine that has one. It begins with
what is most likely to fail, goes on after a failure, and leaves one file to send. We have not run
it on an NPU.

    PYTHON   the interpreter that has torch_npu, vLLM and vllm-ascend, as in the images of docker/
    MODEL    a DeepSeek-V4 checkpoint for the engine (default: the demo checkpoint)
    REPORT   the file to send (default: ascend-report.txt)
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("PYTHON") or sys.executable
PYTEST = ("-m", "pytest", "-v", "-x", "--tb=short", "-o", "python_files=check_*.py")
PYTEST += ("-o", "pythonpath=tests/op tests/engine")


class Step(NamedTuple):
    name: str
    command: tuple[str, ...]  # for the interpreter
    passed: str  # what it means
    failed: str
    minutes: float = 15  # it is stopped after


def check(name: str, file: str, passed: str, failed: str, minutes: int = 15) -> Step:
    return Step(name, (*PYTEST, f"tests/npu/{file}"), passed, failed, minutes)


STEPS = (
    Step(
        "build",
        ("-m", "pip", "install", "-v", "--no-deps", "-e", "."),
        "CANN's compiler takes the kernels.",
        "CANN's compiler or linker refuses the sources, or was not found.",
    ),
    Step(
        "link",
        ("-c", "from vllm_dsv4_indexer.ops import ascend; print(ascend.native())"),
        "The library has all that it needs of CANN's runtime.",
        "There is no library, or CANN's runtime lacks something that it calls.",
    ),
    check(
        "a launch that does nothing",
        "check_launch.py",
        "A kernel starts, reads its arguments and one line of global memory, and ends.",
        "No kernel can be launched, whatever it computes: see csrc/ascend/launch.asc. The steps "
        "below can tell nothing more.",
    ),
    check(
        "one core",
        "check_one_core.py",
        "A core that is alone plans and computes as the reference does.",
        "An instruction is not what its document says, or two pipes of a core are out of order.",
    ),
    check(
        "many cores",
        "check_many_cores.py",
        "Many cores store what the reference stores, every time the same.",
        "If one core was right: cores meet in memory, or the tokens are cut among them wrongly.",
    ),
    check(
        "the order of streams",
        "check_streams.py",
        "The op comes after what was given to its stream before it, and before what follows.",
        "The op takes another stream than torch_npu's, or work in torch_npu's queue is not yet on "
        "it: see _stream in vllm_dsv4_indexer/ops/ascend.py.",
    ),
    check(
        "neighbours in 32 bytes",
        "check_neighbours.py",
        "Cores that write parts of one block of 32 bytes leave each other's bytes alone.",
        "A core writes back bytes that are another's. The cut in csrc/ascend/tiling.h must then "
        "give the cores whole blocks.",
    ),
    check(
        "stale tables",
        "check_tables.py",
        "The scalar unit reads tables and slots as they are now.",
        "Its data cache still holds an earlier launch's: see ReadFresh in csrc/ascend/device.h.",
    ),
    check(
        "graphs",
        "check_graphs.py",
        "A captured step follows what changes in its buffers.",
        "A launch of ours cannot be captured, or is replayed with other arguments.",
    ),
    check(
        "an engine",
        "check_engine.py",
        "vllm-ascend answers with our op as with its own compressor, eager and with graphs.",
        "If all above passed: the fault is in vllm_dsv4_indexer/engines/ascend, not in a kernel.",
        minutes=60,
    ),
    Step(
        "speed",
        ("tests/npu/cost.py",),
        "These are the first times of our kernels. docs/ascend.md has what the model says.",
        "The profiler gave no times.",
    ),
)


class Outcome(NamedTuple):
    step: Step
    status: int
    seconds: float
    output: list[str]

    @property
    def hung(self) -> bool:
        return self.status == -signal.SIGKILL and self.seconds >= 60 * self.step.minutes


class Report:
    """What is said is printed, and in the file at once, whatever happens next."""

    def __init__(self, file: TextIO):
        self._file = file

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        print(text, file=self._file, flush=True)


def run(report: Report, command: tuple[str, ...], minutes: float) -> tuple[int, list[str]]:
    """Its exit status, and what it said, which is said at once. All its processes are killed when
    its time is over."""
    process = subprocess.Popen(
        [PYTHON, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout
    timer = threading.Timer(60 * minutes, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    output = []
    for line in process.stdout:
        output.append(line.rstrip())
        report.say(output[-1])
    status = process.wait()
    timer.cancel()
    return status, output


def take(report: Report, step: Step) -> Outcome:
    report.say(f"\n== {step.name}")
    began = time.monotonic()
    status, output = run(report, step.command, step.minutes)
    outcome = Outcome(step, status, time.monotonic() - began, output)
    report.say(f"-- {verdict(outcome)}")
    return outcome


def verdict(outcome: Outcome) -> str:
    step, status, seconds, _ = outcome
    if status == 0:
        return f"passed in {seconds:.0f} s. {step.passed}"
    if outcome.hung:
        return f"FAILED: it hung, and was stopped after {step.minutes} minutes. {step.failed}"
    crash = f" (signal {-status})" if status < 0 else ""
    return f"FAILED in {seconds:.0f} s{crash}. {step.failed}"


def first_failure(output: list[str]) -> str:
    """pytest's summary, else the first line with an error, else the last line, where a crash cut it
    off."""
    for mark in (r"^(FAILED|ERROR) ", r"(?i)\berror\b[: ]"):
        for line in output:
            if re.search(mark, line):
                return line
    return output[-1] if output else "it said nothing"


def failed_test(output: list[str]) -> str | None:
    """The test that pytest says failed, or that was running when a signal ended all."""
    for pattern in (r"(?:FAILED|ERROR) (.+?::.+?)(?: - |$)", r"(\S+\.py::\w+(?:\[.*\])?)"):
        for line in output:
            test = re.match(pattern, line)
            if test and " PASSED " not in line:
                return test[1]
    return None


def repeats(outcome: Outcome) -> str:
    """The line that runs what failed first, alone if it is a test."""
    command, test = outcome.step.command, failed_test(outcome.output)
    return shlex.join([PYTHON, *command[:-1], test] if test else [PYTHON, *command])


def summarise(report: Report, outcomes: list[Outcome]) -> None:
    report.say("\n== summary")
    for line in outcomes[0].output:
        if "launch.asc" in line:
            report.say(f"compiled by: {line.strip()}")
    for outcome in outcomes:
        report.say(f"{outcome.step.name}: {verdict(outcome)}")
        if outcome.status:
            report.say(f"    first: {first_failure(outcome.output)}")
            report.say(f"    again: {repeats(outcome)}")


def main() -> int:
    path = Path(os.environ.get("REPORT") or "ascend-report.txt").absolute()
    machine = subprocess.run(
        [PYTHON, "tests/npu/machine.py", "architecture"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if machine.returncode:
        return machine.returncode  # it has said what is missing
    os.environ["SKBUILD_CMAKE_DEFINE"] = f"DSV4_ASCEND_ARCH={machine.stdout.strip()}"
    os.environ["VERBOSE"] = "1"  # CMake shows the compile line
    with path.open("w") as file:
        report = Report(file)
        report.say("== the machine")
        run(report, ("tests/npu/machine.py",), minutes=5)
        outcomes = [take(report, step) for step in STEPS]
        summarise(report, outcomes)
    print(f"\nPlease send us {path}, whatever it says.")
    return int(any(outcome.status for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
