"""Tail-only saving in the engine: nobody notices it without prefix caching, and a prefix-cache hit
would."""

import numpy as np
import pytest
import torch
from engine import MIXED_LENGTHS, Result

from vllm_dsv4_indexer.contract import HEAD_DIM, RATIO

HIT = 512  # tokens of REPEATED's 600


@pytest.mark.parametrize(
    "number, lengths", [(0, MIXED_LENGTHS), (1, [600])], ids=("mixed", "alone")
)
def test_without_a_prefix_hit_answers_and_entries_are_those_of_full_saving(
    tail, full, number, lengths
):
    """Bit for bit, over chunks that start anywhere and the tokens that are generated."""
    assert tail.rounds[number] == full.rounds[number]
    for ours, theirs in zip(tail.entries(number), full.entries(number), strict=True):
        assert np.array_equal(ours, theirs)
        assert len(ours) == sum((length + 7) // RATIO for length in lengths)


def test_a_prefix_hit_after_full_saving_stores_the_entries_of_the_miss(full):
    for similarities in of_hit_and_miss(full):
        assert min(similarities) > 0.999


def test_a_prefix_hit_after_tail_only_saving_stores_a_wrong_entry(unsafe_tail, full):
    """The first one, whose window begins in the rows that were not saved; hence the refusal at
    start-up."""
    for first, *others in of_hit_and_miss(unsafe_tail):
        assert first < 0.9 and min(others) > 0.999
    for ours, right in zip(unsafe_tail.entries(-1), full.entries(-1), strict=True):
        assert np.flatnonzero((ours != right).any(axis=1)).tolist() == [0]


def of_hit_and_miss(engine: Result) -> list[list[float]]:
    """By indexer layer, the cosine of each key that the hit stored and the one that the miss stored
    for it."""
    (miss,), (hit,) = engine.rounds[-2:]
    assert (miss["cached"], hit["cached"]) == (0, HIT)
    return [
        torch.cosine_similarity(keys(whole[HIT // RATIO :]), keys(again)).tolist()
        for whole, again in zip(engine.entries(-2), engine.entries(-1), strict=True)
    ]


def keys(entries: np.ndarray) -> torch.Tensor:
    """[entries, 128]; their scales are positive, and do not matter here."""
    return torch.from_numpy(entries[:, :HEAD_DIM]).view(torch.float8_e4m3fn).float()
