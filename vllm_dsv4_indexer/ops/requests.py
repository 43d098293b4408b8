"""The tokens of a step, listed from its requests by tensor operations."""

import torch
from torch import Tensor

from ..contract import RATIO, Requests, Step


def step_of(requests: Requests, tokens: int, state_page: int, k_page: int) -> Step:
    """The position, request and slots of each of `tokens` tokens.

    A token gets no slots if it is beyond the last request (a graph's padding), before position 0,
    excluded by `slot_mapping`, or if its page is block 0 or not in the table. A state page has
    `state_page` positions, a K page `k_page` entries.
    """
    starts, count = requests.query_start_loc, len(requests.start_pos)
    token = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(starts[1 : count + 1], token, right=True, out_int32=True)
    real = request < count
    request = request.clamp(max=count - 1)
    position = requests.start_pos[request] + token - starts[request]
    real &= position >= 0
    position = position.masked_fill(~real, 0)  # keeps the look-ups below inside the tables
    writes = real if requests.slot_mapping is None else real & (requests.slot_mapping[:tokens] >= 0)
    closes = writes & (position % RATIO == RATIO - 1)

    def slots(table: Tensor, index: Tensor, page: int, wanted: Tensor) -> Tensor:
        column = index // page
        block = table[request, column.clamp(max=table.shape[1] - 1)].long()
        wanted = wanted & (column < table.shape[1]) & (block > 0)
        return (block * page + index % page).masked_fill(~wanted, -1)

    return Step(
        position.long(),
        request,
        slots(requests.state_block_table, position, state_page, writes),
        requests.state_block_table,
        slots(requests.k_block_table, position // RATIO, k_page, closes),
    )
