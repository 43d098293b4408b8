"""A step that saves the rows alone that somebody reads later: nobody notices."""

import numpy as np
import pytest
from engine import MIXED_LENGTHS

from vllm_dsv4_indexer.contract import RATIO

HIT = 512  # tokens of REPEATED's 600
STORED = {0: MIXED_LENGTHS, 1: [600], 2: [600 - HIT]}  # by round, the lengths that are computed


@pytest.mark.parametrize("number", STORED, ids=("mixed", "alone", "again"))
def test_answers_and_entries_are_those_of_full_saving(readable, full, number):
    """Bit for bit, over chunks that start anywhere, the tokens that are generated, and a prefix
    hit."""
    assert readable.rounds[number] == full.rounds[number]
    for ours, theirs in zip(readable.entries(number), full.entries(number), strict=True):
        assert np.array_equal(ours, theirs)
        assert len(ours) == sum((length + 7) // RATIO for length in STORED[number])


def test_a_prefix_hit_stores_the_entries_of_the_miss(readable):
    (miss,), (hit,) = readable.rounds[-2:]
    assert (miss["cached"], hit["cached"]) == (0, HIT)
    assert miss["tokens"] == hit["tokens"]


def test_the_log_says_which_rows_are_saved(readable, full):
    assert "state_save=readable" in readable.log
    assert "state_save=readable" not in full.log
