"""Prompts with no entry or one, in a step with requests past the indexer's top-k: vLLM 0.32.0 dies of some such steps,
whatever compresses; with our metadata every request is answered as if it were alone."""

import pytest
from engine import LONG_LENGTHS, SHORT_LENGTHS, SHORT_MIXTURES, largest_difference
from test_generation import SHAPE_TOLERANCE


@pytest.mark.parametrize("index", range(len(SHORT_MIXTURES)), ids=map(str, SHORT_MIXTURES))
@pytest.mark.parametrize("compressor", ["ours", "stock"])
def test_a_request_is_answered_as_if_it_were_alone(short_prompts, short_prompts_stock, compressor, index):
    result = dict(ours=short_prompts, stock=short_prompts_stock)[compressor]
    lengths = SHORT_LENGTHS + LONG_LENGTHS
    alone, mixtures = result.alone(lengths), result.rounds[len(lengths) :]
    for length, answer in zip(SHORT_MIXTURES[index], mixtures[index], strict=True):
        assert answer["tokens"] == alone[length]["tokens"], length
        assert largest_difference(answer, alone[length]) <= SHAPE_TOLERANCE, length


def test_an_engine_that_asks_for_none_of_our_native_code_loads_none(short_prompts, short_prompts_stock):
    assert short_prompts.native and not short_prompts_stock.native
