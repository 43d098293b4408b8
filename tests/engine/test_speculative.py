"""Speculative decoding: positions of rejected drafts are run again, over window borders, and nobody
notices."""

import pytest
from drafts import WRONG
from engine import DRAFTED_LENGTHS, DRAFTED_TOKENS, SHAPE_TOLERANCE, largest_difference
from test_generation import assert_same


def test_drafts_are_made_accepted_and_rejected(drafted):
    """So many steps fewer than tokens, and still so many positions run again."""
    assert drafted.metrics["vllm:spec_decode_num_accepted_tokens"] > 2 * DRAFTED_TOKENS
    rejected = (
        drafted.metrics["vllm:spec_decode_num_draft_tokens"]
        - drafted.metrics["vllm:spec_decode_num_accepted_tokens"]
    )
    assert rejected > len(DRAFTED_LENGTHS) * DRAFTED_TOKENS / WRONG / 2


@pytest.mark.parametrize("how", [0, 1], ids=["undrafted", "drafted"])
def test_tokens_and_logprobs_are_those_of_the_stock_compressor(drafted, drafted_stock, how):
    for length, one, other in zip(
        DRAFTED_LENGTHS, drafted.rounds[how], drafted_stock.rounds[how], strict=True
    ):
        assert_same(length, one, other)


def test_drafts_change_no_answer(drafted):
    for without, answer in zip(*drafted.rounds, strict=True):
        assert largest_difference(without, answer) <= SHAPE_TOLERANCE
