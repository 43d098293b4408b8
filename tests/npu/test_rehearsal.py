"""What of `make ascend-test` can be run without an NPU: its refusal, and its tests of the op on CPU
tensors."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def test_without_an_npu_it_says_what_is_missing_and_runs_nothing():
    done = run(
        ["make", "--no-print-directory", "ascend-test", f"PYTHON={sys.executable}"],
        ASCEND_HOME_PATH="",
    )
    assert done.returncode != 0
    assert "needs CANN and an Ascend NPU, A2, A3 or A5: ASCEND_HOME_PATH is not set" in done.stderr
    assert done.stdout.strip() == "== the machine"


def test_with_cann_alone_it_names_what_python_lacks():
    done = run(
        ["make", "--no-print-directory", "ascend-test", f"PYTHON={sys.executable}"],
        ASCEND_HOME_PATH="/usr/local/Ascend",
    )
    assert "cannot import torch_npu. Nothing was run" in done.stderr


def test_the_tests_of_the_op_hold_on_cpu_tensors():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_files=check_op.py",
    ]
    command += ["-o", "pythonpath=tests/op", "tests/npu"]
    done = run(command, TEST_DEVICE="cpu", TEST_IMPL="cpu", TEST_K_FORMAT="int8_hadamard")
    assert done.returncode == 0, done.stdout + done.stderr
