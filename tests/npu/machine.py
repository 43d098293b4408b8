"""What the NPU tests run on: `machine.py` prints it, `machine.py architecture` what the kernels are
built for.

On a machine that cannot run them it says what is missing, and exits with 2.
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

# torch_npu's SoC versions of the products that have kernels, as vllm-ascend 0.26.0rc1 tells them
# apart.
PRODUCTS = {"A2": range(220, 226), "A3": range(250, 256), "A5": range(260, 261)}
ARCHITECTURES = {"A2": "2201", "A3": "2201", "A5": "3510"}
PACKAGES = ("torch", "torch-npu", "vllm", "vllm-ascend", "triton-ascend", "pytest")


def refuse(missing: str) -> None:
    print(
        f"make ascend-test needs CANN and an Ascend NPU, A2, A3 or A5: {missing}. Nothing was "
        "run.\nWhat can be tested without one is part of `make test`; the images in docker/ have "
        "all but the NPU.",
        file=sys.stderr,
    )
    sys.exit(2)


def product() -> str:
    """The product whose NPU this machine has."""
    if not os.environ.get("ASCEND_HOME_PATH"):
        refuse("ASCEND_HOME_PATH is not set (source CANN's set_env.sh)")
    try:
        import torch
        import torch_npu
    except ImportError as error:
        refuse(f"{sys.executable} cannot import {error.name}")
    if not torch.npu.is_available():
        refuse("torch_npu finds no NPU")
    soc = torch_npu.npu.get_soc_version()
    found = [name for name, versions in PRODUCTS.items() if soc in versions]
    return found[0] if found else refuse(f"the NPU is of SoC version {soc}")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return f"{command[0]}: {error.strerror}"


def describe(name: str) -> None:
    import torch

    print(f"product    {name}, {torch.npu.device_count()} of {torch.npu.get_device_name(0)}")
    print(f"host       {platform.platform()}, Python {platform.python_version()}")
    print(f"checkout   {said('git', 'describe', '--always', '--dirty') or 'without git'}")
    print(f"CANN       {os.path.realpath(os.environ['ASCEND_HOME_PATH'])}")
    for package in PACKAGES:
        print(f"{package:<10} {installed(package)}")
    print(said("npu-smi", "info"))


if __name__ == "__main__":
    name = product()
    if sys.argv[1:] == ["architecture"]:
        print(ARCHITECTURES[name])
    else:
        describe(name)
