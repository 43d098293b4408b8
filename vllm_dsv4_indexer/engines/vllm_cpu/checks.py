"""A checked engine (setting `check`): where vLLM's metadata meet the invariants of a step."""

from typing import Any

from torch import Tensor

from vllm_dsv4_indexer.contract import FP8_PAGE_ENTRIES, Extents, Step
from vllm_dsv4_indexer.ops.invariants import Ledger, Scheduled, check_step, check_values


class Checks:
    """The checks of a worker. All its caches have one pool of pages, and so one ledger."""

    _ledger: Ledger | None = None

    def step(self, step: Step, entries: Any, extents: Extents, all_saved: bool) -> None:
        """Once a step and cache group. entries: vLLM's metadata of the K cache. all_saved: see
        Scheduled.

        Raises ContractError; else notes what the step saves."""
        if self._ledger is None or self._ledger.extents != extents:
            self._ledger = Ledger(extents)
        check_step(_scheduled(step, entries, all_saved), self._ledger)
        self._ledger.save(step.inner_state_slot_mapping, step.positions)

    def layer(self, step: Step, entries: Any, kv_score: Tensor) -> None:
        """Once a layer. Raises ContractError."""
        check_values(_scheduled(step, entries, True), kv_score)


def _scheduled(step: Step, entries: Any, all_saved: bool) -> Scheduled:
    tokens = entries.num_decode_tokens + entries.num_prefill_tokens
    return Scheduled(step, tokens, entries.block_table, FP8_PAGE_ENTRIES, all_saved)
