"""Needles in haystacks: found by the right compressor, and not by a wrong one."""

import math

import pytest
from faults import FAULTS

RIGHT, RANDOM = "(none)", "random keys"
# The column in which a fault must show, and the share of the needles that it may leave there.
MOST = {
    "no positional bias": ("anywhere", 0.3),
    "previous and current halves swapped": ("anywhere", 0.1),
    "window one row too early": ("key in the previous group", 0.1),
    "rows of other requests from before the call": ("behind a prefix of the same step", 0.1),
    "RoPE at the window's last position": ("by distance", 0.1),
    "stale state at a chunk border": ("window across chunks", 0.5),
    "a missing state row under scatter-first": ("key in the previous group", 0.1),
    "scale's exponent without the carry": ("anywhere", 0.8),
    "K slot off by one": ("anywhere", 0.1),
    "previous half ignored": ("key in the previous group", 0.1),
    "state of another request": ("window across chunks", 0.75),
    "rotation (Hadamard) on keys only": ("anywhere", 0.6),
    "window of twelve rows": ("anywhere", 0.1),
}


def test_with_the_right_compressor_every_needle_is_found(counts):
    for column, (found, of) in counts[RIGHT].items():
        assert found == of >= 20, column


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != RANDOM])
def test_a_planted_fault_loses_needles_where_it_acts(counts, fault):
    column, most = MOST[fault]
    found, of = counts[fault][column]
    assert found <= most * of


def test_rows_from_before_the_call_lose_no_needle_that_shares_no_prefix(counts):
    """So that nothing but a burst shows that fault."""
    columns = counts["rows of other requests from before the call"]
    assert [name for name, (found, of) in columns.items() if found < of] == [
        "behind a prefix of the same step"
    ]


def test_a_wrong_rotation_loses_no_needle_that_its_key_alone_finds(counts):
    found, of = counts["RoPE at the window's last position"]["anywhere"]
    assert found == of


@pytest.mark.parametrize("column", ["anywhere", "by distance"])
def test_with_random_keys_needles_are_found_by_chance(counts, chance, column):
    found, of = counts[RANDOM][column]
    assert abs(found - of * chance) <= 4 * math.sqrt(of * chance * (1 - chance))
