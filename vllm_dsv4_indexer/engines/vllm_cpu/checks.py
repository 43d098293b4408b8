"""A checked engine (setting `check`): where vLLM's metadata meet the invariants of a step."""

from typing import Any

from torch import Tensor

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import Geometry, Step
from vllm_dsv4_indexer.ops.invariants import Ledger, Scheduled, check_step, check_values


class Checks:
    """The checks of a worker. Each kind of compressor has metadata of its own, and so a ledger."""

    def __init__(self) -> None:
        self._ledgers: dict[Geometry, Ledger] = {}

    def step(self, step: Step, entries: Any, bound: ops.BoundLayer, all_saved: bool) -> None:
        """Once a step and kind. entries: vLLM's metadata of the K cache. bound: a layer of the
        kind. all_saved: see Scheduled.

        Raises ContractError; else notes what the step saves."""
        ledger = self._ledgers.get(bound.geometry)
        if ledger is None or ledger.extents != bound.extents:
            ledger = self._ledgers[bound.geometry] = Ledger(bound.extents)
        scheduled = _scheduled(step, entries, bound, all_saved)
        check_step(scheduled, ledger)
        ledger.save(step.inner_state_slot_mapping, step.positions)
        self._forget(scheduled, bound.extents.state_page)

    def layer(self, step: Step, entries: Any, bound: ops.BoundLayer, kv_score: Tensor) -> None:
        """Once a layer. Raises ContractError."""
        check_values(_scheduled(step, entries, bound), kv_score)

    def _forget(self, written: Scheduled, state_page: int) -> None:
        """All caches have one pool of pages, and a page belongs to one group of them at a time: to
        keys, to states of one ratio, or to a sliding window, whose writes are not seen here. So a
        page that is written holds no rows of another ratio."""
        rows, entries = written.step.inner_state_slot_mapping, written.step.k_slot_mapping
        states, keys = rows[rows >= 0] // state_page, entries[entries >= 0] // written.k_page
        for geometry, ledger in self._ledgers.items():
            ledger.forget(keys)
            if geometry.ratio != written.ratio:
                ledger.forget(states)


def _scheduled(
    step: Step, entries: Any, bound: ops.BoundLayer, all_saved: bool = True
) -> Scheduled:
    k_page, ratio = bound.layer.k_cache.shape[1], bound.geometry.ratio
    return Scheduled(step, _tokens(entries), entries.block_table, k_page, ratio, all_saved)


def _tokens(entries: Any) -> int:
    """How many the step has without padding. vLLM's metadata of main keys say it, those of index
    keys in two parts."""
    if hasattr(entries, "num_actual_tokens"):
        return int(entries.num_actual_tokens)
    return int(entries.num_decode_tokens + entries.num_prefill_tokens)
