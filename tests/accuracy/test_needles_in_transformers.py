"""The needle checkpoint in transformers: it depends on no code of ours, and on the indexer
alone."""

import pytest
import torch

from vllm_dsv4_indexer.accuracy.document import make_document
from vllm_dsv4_indexer.accuracy.engines import Transformers
from vllm_dsv4_indexer.checkpoint.config import INDEX_TOPK

LENGTH = 3072  # with the questions 800 entries


@pytest.fixture(scope="module")
def model(needle_checkpoint):
    return Transformers(str(needle_checkpoint))


@pytest.fixture(scope="module")
def document():
    return make_document(LENGTH, seed=7, spacing=32)


def test_transformers_finds_every_needle(model, document):
    found = model.found(document)
    assert len(found["key"]) == len(found["distance"]) >= 20
    assert all(found["key"]) and all(found["distance"])


def test_with_a_random_top_k_transformers_finds_what_chance_selects(model, document, monkeypatch):
    indexer = model.model.model.layers[1].self_attn.compressor.indexer
    monkeypatch.setattr(indexer, "index_topk", INDEX_TOPK // 16)
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        indexer.scorer,
        "forward",
        lambda q, k, hidden: torch.rand(*q.shape[:2], k.shape[1], generator=generator),
    )
    found = model.found(document)
    assert sum(found["key"] + found["distance"]) <= 0.2 * 2 * len(document.needles)  # chance: 5 %
