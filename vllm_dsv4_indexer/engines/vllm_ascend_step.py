"""From vllm-ascend's metadata of a step's requests to the op's arguments of its tokens, once for all layers.

Nothing here waits for the device, and every tensor's shape follows from the shapes of the metadata, so that a captured
graph replays: it reads the metadata where vllm-ascend refreshes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from vllm_dsv4_indexer.contract import RATIO


class Requests(NamedTuple):
    """What the metadata say of R requests and their T tokens."""

    query_start_loc: Tensor  # [R + 1] int32: where each request's tokens start
    start_pos: Tensor  # [R] int32: the position of its first
    state_table: Tensor  # [R, M] int32: the pages of its rows
    k_table: Tensor  # [R, N] int32: the pages of its entries
    written: Tensor  # [T] int32: negative where nothing is written

    @staticmethod
    def of(*parts: tuple[Any, Any]) -> "Requests":
        """The requests of one or more parts of a step, in the order of their tokens.

        parts: vllm-ascend's metadata of the state and of the K cache, for each. Those of the state alone have slots of
        tokens; both cover the same tokens, and a slot that says "write nothing" means both caches.
        """
        found = [Requests._of_part(state, keys) for state, keys in parts]
        if len(found) == 1:
            return found[0]
        first_token = 0
        starts = [found[0].query_start_loc[:1]]
        for part in found:
            starts.append(part.query_start_loc[1:] + first_token)
            first_token += len(part.written)
        return Requests(torch.cat(starts), *(torch.cat(tensors) for tensors in list(zip(*found))[1:]))

    @staticmethod
    def _of_part(state: Any, keys: Any) -> "Requests":
        requests = len(keys.start_pos)
        slots = state.slot_mapping  # [T] on an A5; on A2 and A3 (block, offset) of each
        return Requests(
            keys.query_start_loc[: requests + 1],
            keys.start_pos,
            state.block_table[:requests],
            keys.block_table[:requests],
            slots if slots.dim() == 1 else slots[:, 0],
        )


class Step(NamedTuple):
    """The op's arguments that are the same for all layers whose state pages and K pages come from the same tables."""

    positions: Tensor
    token_to_req: Tensor
    state_slots: Tensor
    state_table: Tensor
    k_slots: Tensor


def make_step(requests: Requests, state_page: int, k_page: int) -> Step:
    """Derive the op's per-token arguments; pages are of `state_page` positions and `k_page` entries.

    A token beyond the last request, as a graph's padding has them, gets no slots. Neither does one in block 0, the
    table entry of padding requests: stock writes no state there; the K entries that it writes are never read. Nor do
    those of a data-parallel dummy run, whose tables and positions are those of live requests.
    """
    starts, count = requests.query_start_loc, len(requests.start_pos)
    token = torch.arange(len(requests.written), dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(starts[1:], token, right=True, out_int32=True)
    real = (request < count) & (requests.written >= 0)
    request = request.clamp(max=count - 1)
    position = requests.start_pos[request] + token - starts[request]
    real &= position >= 0
    position = position.masked_fill(~real, 0)  # so that the look-ups below stay inside the tables

    def slots(table: Tensor, index: Tensor, page: int, wanted: Tensor) -> Tensor:
        block = table[request, index // page].long()
        return (block * page + index % page).masked_fill(~(wanted & (block > 0)), -1)

    return Step(
        position.long(),
        request,
        slots(requests.state_table, position, state_page, real),
        requests.state_table,
        slots(requests.k_table, position // RATIO, k_page, real & (position % RATIO == RATIO - 1)),
    )


def once_a_step(state: Any, keys: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once in a forward call for all layers whose caches have these metadata.

    It is kept with the forward call. vllm-ascend makes a context for every step and for every capture of a graph, also
    where it refreshes tensors in place; so a capture records the planning, too, and no step gets another's.
    """
    made = get_forward_context().additional_kwargs.setdefault("dsv4_indexer_steps", [])
    for its_state, its_keys, result in made:  # one for each group of caches: a few
        if its_state is state and its_keys is keys:
            return result
    made.append((state, keys, result := make()))
    return result
