import pytest

from vllm_dsv4_indexer.checkpoint import make_checkpoint, make_needle_checkpoint


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model", layers=3, hidden=64, seed=5)


@pytest.fixture(scope="session")
def needle(tmp_path_factory):
    return make_needle_checkpoint(tmp_path_factory.mktemp("needle") / "model", seed=3)
