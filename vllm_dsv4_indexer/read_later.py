"""Which rows of the state somebody reads after the step that makes them. No other row need be kept.

A step pools the rows of its own tokens from the projection. So of a request that has come to token
e, with the ratio r, these rows can be read later:

- by its next step, those of the open group and, where windows overlap, of the group before it:
  from e - e % r - r on, or from e - e % r on;
- by a request that starts with the same tokens, those in front of a multiple of 256 that belong to
  the next window: four rows where windows overlap, none where they do not.
"""

from typing import Any

from .contract import window_of

HIT_TOKENS = 256  # of vLLM's blocks of keys for this model: a prefix hit has a multiple of these


def rows_at_hit(ratio: int) -> int:
    """How many rows in front of a prefix hit the request that continues there reads."""
    return window_of(ratio) - ratio


def first_read(start: int, ratio: int) -> int:
    """The first row that a step reads which starts with that token."""
    return max(0, start - start % ratio - rows_at_hit(ratio))


def read_at_hit(position: Any, ratio: int) -> Any:
    """Whether a hit may read the row of a position, or of each in a tensor."""
    return position % HIT_TOKENS >= HIT_TOKENS - rows_at_hit(ratio)
