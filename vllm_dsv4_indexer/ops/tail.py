"""Tail-only saving: leave out the state rows that no later call can read.

The row of position p is pooled twice: in the window that its own group of four closes, and in the
one that the next group closes at position p - p % 4 + 7. `compress` pools the rows of its own call
from `kv_score`, so if that token too is in the call, nobody reads the saved row. What has to be
saved of a request whose call ends before position e are the rows of e - e % 4 - 4 .. e - 1: at most
seven, however long the call.

That holds as long as each call starts where the request's last one ended. It does not where another
reader has the state pages, in this call or a later one, or where the request goes back: prefix
caching, state transfer, speculative decoding.
"""

import torch
from torch import Tensor

from ..contract import RATIO, WINDOW


def tail_slots(positions: Tensor, token_to_req: Tensor, inner_state_slot_mapping: Tensor) -> Tensor:
    """`inner_state_slot_mapping` for a call that saves the tail of each request: -1 for every other
    row.

    The arguments are those of `compress`, all [T]; none is written.
    """
    tokens = torch.arange(len(positions), device=positions.device)
    ahead = WINDOW - 1 - positions % RATIO
    last = (tokens + ahead).clamp(
        max=len(positions) - 1
    )  # if it is in the call: the token that reads the row last
    read = (
        (positions[last] == positions + ahead)
        & (token_to_req[last] == token_to_req)
        & (inner_state_slot_mapping[last] >= 0)  # not a padding row, whose position may be anything
    )
    return inner_state_slot_mapping.masked_fill(read, -1)
