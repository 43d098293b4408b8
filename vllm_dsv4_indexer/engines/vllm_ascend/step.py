"""From vllm-ascend's metadata of a step to the requests of which the op makes its plan.

Nothing here waits for the device, and every tensor's shape follows from the shapes of the metadata,
so that a captured graph replays: it reads the metadata where vllm-ascend refreshes them.
"""

from typing import Any

import torch

from vllm_dsv4_indexer.contract import Requests

Metadata = tuple[Any, Any]  # vllm-ascend's, of the state and of the K cache


def requests_of(*parts: Metadata) -> Requests:
    """The requests of one or more parts of a step, in the order of their tokens.

    Of a layer's metadata, those of the state have a slot for each token. A slot that says "write
    nothing" means both caches: it is padding's, or a dummy run's, whose tables and positions are
    those of live requests.
    """
    first, *others = (_requests_of_part(state, keys) for state, keys in parts)
    for part in others:
        starts = part.query_start_loc[1:] + tokens_of(first)
        both = zip(first, part._replace(query_start_loc=starts))
        first = Requests(*(torch.cat(tensors) for tensors in both))  # type: ignore[arg-type]
    return first


def tokens_of(requests: Requests) -> int:
    """How many tokens the step has, padding included."""
    assert requests.slot_mapping is not None, "vllm-ascend's metadata have one"
    return len(requests.slot_mapping)


def _requests_of_part(state: Any, keys: Any) -> Requests:
    count = len(keys.start_pos)
    slots = state.slot_mapping  # [T] on an A5; on A2 and A3 (block, offset) of each token
    return Requests(
        keys.query_start_loc[: count + 1],
        keys.start_pos,
        state.block_table[:count],
        keys.block_table[:count],
        slots if slots.dim() == 1 else slots[:, 0],
    )
