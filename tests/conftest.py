"""What several folders of tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, made once for the whole session."""
    from vllm_dsv4_indexer.checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("models") / "deepseek-v4")
