"""The needle checkpoint, and one engine with every fault in turn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
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
    run(folder / "log", str(script), str(needle_checkpoint), str(folder / "result.json"))
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def chance() -> float:
    """That the needle is among the selected entries if these are random, or else that another value
    is the same."""
    selected = INDEX_TOPK / (LENGTH // 4)
    return selected + (1 - selected) / len(VALUES)


def run(log: Path, *arguments: str) -> None:
    """Run Python in a process of its own, with its output in `log`."""
    command = [sys.executable, *arguments]
    with log.open("w+") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=1800)
        file.seek(0)
        assert done.returncode == 0, f"{log}: {file.read()[-4000:]}"
