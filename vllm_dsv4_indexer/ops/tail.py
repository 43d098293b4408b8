"""Tail-only saving: leave out the state rows that no later call can read.

The row of position p is pooled twice: in the window that its own group closes, and in the one that
the next group closes, at position p - p % 4 + 7. A call pools its own rows from `kv_score`. So if
that last token is in the call too, nobody reads the saved row. Of a request whose call ends before
position e, only the rows of e - e % 4 - 4 .. e - 1 must be saved: at most seven, however long the
call.

This is right if each call starts where the request's last one ended. It is wrong if somebody else
reads the state pages or the request goes back: prefix caching, state transfer, speculative
decoding.
"""

import torch
from torch import Tensor

from ..contract import RATIO, WINDOW


def tail_slots(positions: Tensor, token_to_req: Tensor, inner_state_slot_mapping: Tensor) -> Tensor:
    """Returns `inner_state_slot_mapping` [T] with -1 for every row that is not in the tail of its
    request.

    The arguments are those of `compress`, all [T]. None is written.
    """
    tokens = torch.arange(len(positions), device=positions.device)
    ahead = WINDOW - 1 - positions % RATIO
    # The token that reads the row last, if it is in the call.
    last = (tokens + ahead).clamp(max=len(positions) - 1)
    read = (
        (positions[last] == positions + ahead)
        & (token_to_req[last] == token_to_req)
        & (inner_state_slot_mapping[last] >= 0)  # a padding row may have any position
    )
    return inner_state_slot_mapping.masked_fill(read, -1)
