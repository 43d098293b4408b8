"""What several folders of tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# `make test` has a process on each of two cores. OpenMP's threads wait by spinning: with two in
# each process, tests took up to ten times as long. To be set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as if activated

TESTS = Path(__file__).parent
# What shares engines or other things made once runs in one process (`make test` has two of them).
# In this order, so that the long ones do not start last.
GROUPS = {
    "engine answers": (
        "engine/test_generation.py",
        "engine/test_explanation.py",
        "engine/test_state_save.py",
        "engine/test_pipeline_parallelism.py",
        "engine/test_two_nodes.py",
    ),
    "engine": ("engine",),
    "engine_ascend": ("engine_ascend",),
    "accuracy": ("accuracy",),
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every test a group: one of GROUPS, or else its folder's name."""
    groups = {item: _group(item.path.relative_to(TESTS)) for item in items}
    items.sort(key=lambda item: [*GROUPS, groups[item]].index(groups[item]))
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))


def _group(path: Path) -> str:
    for name, paths in GROUPS.items():
        if any(path.is_relative_to(part) for part in paths):
            return name
    return path.parts[0]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, made once for the whole session."""
    from vllm_dsv4_indexer.checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("models") / "deepseek-v4")


@pytest.fixture(scope="session")
def built_ascend_emulation(tmp_path_factory: pytest.TempPathFactory):
    """The emulated NPU (tests/ascend_emulation), built once; see `Emulator`."""
    from emulator import Emulator

    return Emulator(tmp_path_factory.mktemp("ascend_emulation"))


@pytest.fixture(scope="module")
def ascend_emulation(built_ascend_emulation):
    """The emulated NPU, which is impl "ascend" for the tests of this module, on tensors of any
    device."""
    with built_ascend_emulation.installed():
        yield built_ascend_emulation
