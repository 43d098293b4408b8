"""CMake's way through CANN's package, with a stand-in for it (asc_package/): what it asks of CANN's
compiler."""

import os
import subprocess

import pytest

from emulator import A2, A5, HERE
from vllm_dsv4_indexer.ops.library import _sources

CSRC = HERE.parents[1] / "csrc"


@pytest.mark.parametrize("architecture", [A2, A5])
def test_the_npu_library_is_compiled_for_the_architecture_that_is_asked_for(tmp_path, architecture):
    build, call = tmp_path / "build", tmp_path / "call"
    package = [f"-DASC_DIR={HERE / 'asc_package'}", f"-DDSV4_ASCEND_ARCH={architecture}"]
    for command in (
        ["cmake", "-S", CSRC, "-B", build, *package],
        ["cmake", "--build", build, "--target", "dsv4_indexer_ascend"],
    ):
        subprocess.run(
            command, check=True, capture_output=True, env=os.environ | {"ASC_CALL": call}
        )
    arguments = call.read_text().splitlines()
    assert f"--npu-arch=dav-{architecture}" in arguments
    assert f"-DDSV4_ASCEND_ARCH={architecture}" in arguments
    assert f'-DDSV4_SOURCES="{_sources("ascend")}"' in arguments
    assert "-fPIC" in arguments and arguments[-1] == str(CSRC / "ascend" / "launch.asc")
    assert (build / "ascend/libdsv4_indexer_ascend.so").exists()


def test_without_the_package_the_npu_library_is_left_out_and_cmake_says_so(tmp_path):
    command = ["cmake", "-S", CSRC, "-B", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "No NPU library: CANN's ASC package was not found" in said
