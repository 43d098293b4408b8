"""The sdist and the wheel that it builds: what is in them, and on which machines the library loads.
`make wheel` also builds the one for aarch64, tags both, and runs them."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_dsv4_indexer"
LIBRARY = f"{PACKAGE}/libdsv4_indexer_cpu.so"
OLDEST_GLIBC = (2, 17)  # of 2012: manylinux_2_17


def backend(function: str, source: Path, target: Path) -> Path:
    """What a function of the build backend has put into `target`."""
    code = f"import scikit_build_core.build as backend; backend.{function}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return backend("build_sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (top,) = source.iterdir()
    return backend("build_wheel", top, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(LIBRARY, tmp_path_factory.mktemp("library")))


def told(*command: object) -> str:
    return subprocess.check_output(command, text=True)


def test_the_sdist_has_what_a_distribution_needs_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    tops = {name.split("/")[0] for name in names}
    assert {"csrc", PACKAGE, "tests", "README.md", "LICENSE", "pyproject.toml"} <= tops
    assert {"csrc/cpu/exports.map", "csrc/ascend/launch.asc", "tests/op/test_op.py"} <= names
    assert not tops & {"shared", "build"} and not [top for top in tops if top.startswith(".")]


def test_the_wheel_has_the_package_its_library_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = told("git", "-C", ROOT, "ls-files", PACKAGE).split()
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    info = f"{PACKAGE}-{version}.dist-info"
    files = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert names == {*tracked, LIBRARY, *(f"{info}/{file}" for file in files)}


def test_one_wheel_serves_every_python(wheel):
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)


def test_the_library_needs_an_old_libc_and_nothing_else(library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", told("readelf", "-d", library))
    assert set(needed) <= {"libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1"}
    versions = re.findall(r"@(\w+?)_([\d.]+)$", told("nm", "-D", "--undefined-only", library), re.M)
    assert {name for name, _ in versions} == {"GLIBC"}
    assert max(tuple(map(int, v.split("."))) for _, v in versions) <= OLDEST_GLIBC


def test_the_library_shows_the_functions_of_abi_h_and_nothing_else(library):
    shown = {line.split()[-1] for line in told("nm", "-D", "--defined-only", library).splitlines()}
    header = (ROOT / "csrc/cpu/abi.h").read_text()
    declared = set(re.findall(r"\b(dsv4_indexer_\w+)\(", header.split('extern "C"')[1]))
    assert shown == declared  # on x86-64; elsewhere there is no projection


def test_the_library_is_hardened(library):
    segments, dynamic = told("readelf", "-lW", library), told("readelf", "-d", library)
    assert "GNU_RELRO" in segments and "BIND_NOW" in dynamic  # nothing is writable that need not be
    assert re.search(r"GNU_STACK.* RW ", segments)  # no code on the stack
    assert "__stack_chk_fail" in told("nm", "-D", library)
