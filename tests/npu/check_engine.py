"""A whole engine on the NPU with our op, against the same engine with vllm-ascend's own
compressor."""

import os
from pathlib import Path

import pytest
from engine import FEW, FEW_LENGTHS, largest_difference, run_engine

# of a log-probability: the stock chain rounds the keys more often, and the top-k may then differ
TOLERANCE = 0.5
MODEL = os.environ.get("MODEL")
OPTIONS = dict(max_model_len=8192, kv_cache_memory_bytes=None, enable_prefix_caching=False)


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_answers_are_those_of_the_stock_compressor(checkpoint, tmp_path_factory, enforce_eager):
    model = Path(MODEL) if MODEL else checkpoint
    ours, stock = (
        run_engine(
            tmp_path_factory.mktemp(impl),
            model,
            FEW,
            enforce_eager=enforce_eager,
            additional_config={"dsv4_indexer": {"impl": impl}},
            **OPTIONS,
        )
        for impl in ("ascend", "stock")
    )
    assert "impl=ascend compresses for the indexers of" in ours.log
    for length in FEW_LENGTHS:
        difference = largest_difference(
            ours.alone(FEW_LENGTHS)[length], stock.alone(FEW_LENGTHS)[length]
        )
        assert difference <= TOLERANCE, f"{length} tokens: {difference}"
