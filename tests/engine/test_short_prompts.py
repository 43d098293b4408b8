"""Prompts with one entry or none, in a step with requests past the indexer's top-k.

vLLM 0.32.0 dies of some of these steps, whatever compresses. With our metadata every request is
answered as if it were alone.
"""

import pytest
from engine import (
    MORE_LENGTHS,
    MORE_MIXTURES,
    SHAPE_TOLERANCE,
    SHORT_LENGTHS,
    SHORT_MIXTURES,
    Result,
    largest_difference,
)


@pytest.mark.parametrize("index", range(len(MORE_MIXTURES)), ids=map(str, MORE_MIXTURES))
def test_a_request_is_answered_as_if_it_were_alone(short_prompts, index):
    assert_as_alone(short_prompts, MORE_LENGTHS, MORE_MIXTURES, index)


@pytest.mark.parametrize("index", range(len(SHORT_MIXTURES)), ids=map(str, SHORT_MIXTURES))
def test_the_stock_compressor_lives_too(short_prompts_stock, index):
    assert_as_alone(short_prompts_stock, SHORT_LENGTHS, SHORT_MIXTURES, index)


def assert_as_alone(result: Result, lengths, mixtures, index: int) -> None:
    """The same tokens; log-probabilities as near as batches of other shapes come."""
    alone, mixed = result.alone(lengths), result.rounds[len(lengths) :]
    for length, answer in zip(mixtures[index], mixed[index], strict=True):
        assert answer["tokens"] == alone[length]["tokens"], length
        assert largest_difference(answer, alone[length]) <= SHAPE_TOLERANCE, length


def test_an_engine_that_asks_for_none_of_our_native_code_loads_none(
    short_prompts, short_prompts_stock
):
    assert short_prompts.native and not short_prompts_stock.native
