"""A step that is told by its requests, as tensor operations."""

import torch
from torch import Tensor

from ..contract import RATIO, Requests, Step


def step_of(requests: Requests, tokens: int, state_page: int, k_page: int) -> Step:
    """What the requests say of each of `tokens` tokens, as tensor operations.

    A token beyond the last request, as a graph's padding has them, gets no slots; neither does one
    before position 0, one that `slot_mapping` excludes, or one whose page is block 0 or not in the
    table. State pages are of `state_page` positions, K pages of `k_page` entries.
    """
    starts, count = requests.query_start_loc, len(requests.start_pos)
    token = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(starts[1 : count + 1], token, right=True, out_int32=True)
    real = request < count
    request = request.clamp(max=count - 1)
    position = requests.start_pos[request] + token - starts[request]
    real &= position >= 0
    position = position.masked_fill(~real, 0)  # so that the look-ups below stay inside the tables
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
