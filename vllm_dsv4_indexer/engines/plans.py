"""One plan a step for all layers whose state and entries lie in the same pages."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context

from vllm_dsv4_indexer.contract import Extents


def once_a_step(metadata: tuple[Any, ...], extents: Extents, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, called once in a forward pass for all layers with the same objects of
    metadata and caches of the same extents.

    It is kept with the pass, not with the metadata: vLLM makes a context for every pass, also where
    it refreshes tensors in place. The context holds the metadata too, so that none of them can be
    taken for another that came later.
    """
    made = get_forward_context().additional_kwargs.setdefault("dsv4_indexer_plans", [])
    for known, known_extents, plan in made:  # one for each group of caches: a few
        if all(map(operator.is_, known, metadata)) and known_extents == extents:
            return plan
    made.append((metadata, extents, plan := make()))
    return plan
