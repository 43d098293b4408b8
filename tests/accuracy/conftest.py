"""The needle checkpoint, and one engine with every fault in turn."""

import json
from pathlib import Path

import pytest
from forked import python
from run_faults import LENGTH

from vllm_dsv4_indexer.checkpoint.config import INDEX_TOPK
from vllm_dsv4_indexer.checkpoint.needle import VALUES


@pytest.fixture(scope="session")
def needle_checkpoint(tmp_path_factory) -> Path:
    from vllm_dsv4_indexer.checkpoint import make_needle_checkpoint

    return make_needle_checkpoint(tmp_path_factory.mktemp("models") / "needle")


@pytest.fixture(scope="session")
def counts(needle_checkpoint, tmp_path_factory) -> dict[str, dict[str, list[int]]]:
    """By planted fault and column, how many needles were found, of how many: see run_faults.py."""
    folder = tmp_path_factory.mktemp("faults")
    script = Path(__file__).with_name("run_faults.py")
    done = python(str(script), str(needle_checkpoint), str(folder / "result.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def chance() -> float:
    """That the needle is among the selected entries if these are random, or else that another value
    is the same."""
    selected = INDEX_TOPK / (LENGTH // 4)
    return selected + (1 - selected) / len(VALUES)
