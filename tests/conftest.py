"""What several folders of tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["PATH"] = (
    f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
)


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
