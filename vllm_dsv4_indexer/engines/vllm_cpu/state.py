"""Where the compressors keep their state: pages for the rows that somebody reads later, and for no
others. read_later.py says which rows these are.

vLLM gives every row a page for a while. Here all other pages are the null page, as in a sliding
window those are that have left it. What is written there is left out (compressor.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.models.deepseek_v4.compressor import CompressorStateCache
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vllm_dsv4_indexer.read_later import HIT_TOKENS, first_read, rows_at_hit


class ReadableStateManager(SlidingWindowManager):
    """Gives a request the pages that hold a row to be read later, and the null page for the rest.

    Which of them are kept for other requests, and for how long, is vLLM's own decision.
    """

    kv_cache_spec: "ReadableStateSpec"

    def __init__(self, kv_cache_spec: "ReadableStateSpec", **others: Any) -> None:
        super().__init__(kv_cache_spec, **others)
        self._removed: dict[str, int] = {}  # by request, how many blocks have been looked through

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **others: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Where a hit reads no row, every length is one; vLLM's own search wants at least one."""
        assert isinstance(kv_cache_spec, ReadableStateSpec)
        if kv_cache_spec.rows_at_hit:
            return super().find_longest_cache_hit(
                block_hashes,
                max_length,
                kv_cache_group_ids,
                block_pool,
                kv_cache_spec,
                drop_eagle_block,
                alignment_tokens,
                **others,
            )
        length = max_length // alignment_tokens * alignment_tokens
        nothing = [block_pool.null_block] * (length // kv_cache_spec.block_size)
        return tuple(nothing[:] for _ in kv_cache_group_ids), length

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.kv_cache_spec.first_read(num_computed_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        new = len(self._read_later(max(held + len(new_computed_blocks), skipped), num_tokens))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            new = min(new, self.max_admission_blocks_per_request)
        return new + self._get_num_evictable_blocks(new_computed_blocks[max(skipped - held, 0) :])

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        first = len(blocks)
        places = self._read_later(first, num_tokens)
        allocated = self.block_pool.get_new_blocks(len(places))
        blocks.extend([self._null_block] * (cdiv(num_tokens, self.block_size) - first))
        for place, block in zip(places, allocated, strict=True):
            blocks[place] = block
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in allocated)
        return blocks[first:]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._removed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """vLLM's own stops at the first null block that it meets. Here they lie between others."""
        blocks = self.req_to_blocks[request_id]
        first = max(first_block, self._removed.get(request_id, 0))
        held = [place for place in range(first, last_block) if not blocks[place].is_null]
        self.block_pool.free_blocks([blocks[place] for place in reversed(held)])
        for place in held:
            blocks[place] = self._null_block
        self._removed[request_id] = max(first, last_block)

    def _read_later(self, first: int, num_tokens: int) -> list[int]:
        hits = self.cache_hit_alignment_tokens if self.enable_caching else 0
        return self.kv_cache_spec.read_later(first, num_tokens, hits)


# The registry takes vLLM's own specs only while it is empty, and this fills it.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


@register_kv_cache_spec(ReadableStateManager, SlidingWindowMLASpec)
@dataclass(frozen=True, kw_only=True)
class ReadableStateSpec(SlidingWindowMLASpec):
    """The state of one compressor. `sliding_window` is what vLLM's search for a hit takes it for:
    one more than the rows that a hit reads.

    ratio: positions per entry. drafts: tokens of a step that may be rejected. steps: how many may
    be under way at once.
    """

    ratio: int = 0
    drafts: int = 0
    steps: int = 1

    @classmethod
    def of(cls, stock: SlidingWindowMLASpec, ratio: int, drafts: int = 0, steps: int = 1) -> Self:
        """What vLLM has for the same state."""
        given = {field.name: getattr(stock, field.name) for field in fields(stock)}
        given["sliding_window"] = rows_at_hit(ratio) + 1
        return cls(**given, ratio=ratio, drafts=drafts, steps=steps)

    @property
    def rows_at_hit(self) -> int:
        return self.sliding_window - 1

    @property
    def rollback(self) -> int:
        """By how many tokens a request may go back."""
        return self.drafts * self.steps

    def first_read(self, start: int) -> int:
        return first_read(start, self.ratio)

    def read_later(self, first: int, num_tokens: int, hits: int) -> list[int]:
        """Of the blocks from `first` up to token `num_tokens`, those with a row that is read
        later. hits: prefixes hit in multiples of so many tokens; 0: never."""
        size = self.block_size
        boundaries = range(0)
        if hits:
            boundaries = range((first * size // hits + 1) * hits, num_tokens + 1, hits)
        tail = max(first, self.first_read(num_tokens - self.rollback) // size)
        at_hits = [
            place
            for hit in boundaries
            for place in range((hit - self.rows_at_hit) // size, hit // size)
            if first <= place < tail
        ]
        return [*at_hits, *range(tail, cdiv(num_tokens, size))]

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """What the last step has left and each one under way leaves, and a page for each hit in
        them; never more than all rows need."""
        rows = self.rows_at_hit + self.ratio - 1
        hits = (max_in_flight_tokens // HIT_TOKENS + 1) * cdiv(self.rows_at_hit, self.block_size)
        left = (1 + self.steps) * (cdiv(rows + self.rollback, self.block_size) + 1)
        all_rows = cdiv(min(rows + max_in_flight_tokens, max_model_len), self.block_size) + 1
        return min(hits + left, all_rows)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        (own,) = {(spec.ratio, spec.drafts, spec.steps) for spec in specs}
        return replace(super().merge(specs), ratio=own[0], drafts=own[1], steps=own[2])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, ReadableStateSpec) and spec.ratio == self.ratio
            for spec in kv_cache_specs.values()
        )


class ReadableStateCache(CompressorStateCache):
    """A compressor's state whose pages are given by ReadableStateManager. Never constructed: takes
    the place of the engine's own by assignment to `__class__`, when `ratio` is set too."""

    ratio: int

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        stock = super().get_kv_cache_spec(vllm_config)
        assert isinstance(stock, SlidingWindowMLASpec)
        drafts, steps = vllm_config.num_speculative_tokens, vllm_config.max_concurrent_batches
        return ReadableStateSpec.of(stock, self.ratio, drafts, steps)
