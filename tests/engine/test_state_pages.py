"""The pages that a request is given for the compressors' state: those that somebody reads, and no
others. vLLM's block pool, our manager, random steps."""

import random

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
from vllm.v1.kv_cache_interface import SlidingWindowMLASpec

from vllm_dsv4_indexer.engines.vllm_cpu.state import ReadableStateManager, ReadableStateSpec

HIT = 256
PAGES = {4: 4, 128: 8}  # tokens of a page, by ratio, as CompressorStateCache of vLLM 0.32.0 has it
WINDOWS = {4: 8, 128: 128}
every_ratio = pytest.mark.parametrize("ratio", PAGES)


def manager(
    ratio: int, caching: bool = True, drafts: int = 0, steps: int = 1, budget: int = 8192
) -> ReadableStateManager:
    """`budget`: tokens of a step, at most."""
    stock = SlidingWindowMLASpec(
        block_size=PAGES[ratio],
        num_kv_heads=1,
        head_size=1024,
        dtype=torch.float32,
        sliding_window=WINDOWS[ratio],
        alignment=576,
    )
    made = get_manager_for_kv_cache_spec(
        ReadableStateSpec.of(stock, ratio, drafts, steps),
        max_in_flight_tokens=steps * budget,
        max_model_len=1 << 20,
        block_pool=BlockPool(5000, enable_caching=caching, hash_block_size=HIT),
        enable_caching=caching,
        kv_cache_group_id=0,
        scheduler_block_size=HIT,
    )
    assert type(made) is ReadableStateManager
    return made


def step(manager: ReadableStateManager, computed: int, end: int, processed: int) -> int:
    """Computes the tokens `computed` .. `end` - 1 of a request. Returns how many pages it was
    given, which vLLM was told before."""
    manager.remove_skipped_blocks("request", processed)
    told = manager.get_num_blocks_to_allocate("request", end, [], computed, computed, end)
    given = manager.allocate_new_blocks("request", end, end)
    manager.num_cached_block["request"] = 0  # it runs
    assert sum(not block.is_null for block in given) == told
    return told


def held(manager: ReadableStateManager) -> list[int]:
    """The positions of the rows that have a page."""
    size, blocks = manager.block_size, manager.req_to_blocks["request"]
    pages = [page for page, block in enumerate(blocks) if not block.is_null]
    return [page * size + row for page in pages for row in range(size)]


@every_ratio
@pytest.mark.parametrize("caching", (False, True))
def test_of_a_prompt_the_open_groups_and_what_stands_before_a_hit_get_pages(ratio, caching):
    for end in (1, 3, 4, 5, 127, 128, 130, 255, 256, 257, 1000, 8192):
        state = manager(ratio, caching)
        step(state, 0, end, 0)
        overlap = 4 if ratio == 4 else 0
        rows = {*range(max(end - end % ratio - overlap, 0), end)}
        for hit in range(HIT, end + 1, HIT) if caching else ():
            rows |= {*range(hit - overlap, hit)}
        size = PAGES[ratio]
        pages = {row // size for row in rows}
        assert {row // size for row in held(state)} == pages, end


@every_ratio
@pytest.mark.parametrize("seed", range(20))
def test_after_any_steps_a_request_has_what_its_next_step_reads_and_no_more_than_it_may(
    ratio, seed
):
    """Steps of any size, rejected drafts, and results that come a step late."""
    pick = random.Random(seed)
    drafts, steps, budget = pick.choice((0, 3)), pick.choice((1, 2)), pick.choice((64, 300, 2048))
    state = manager(ratio, pick.random() < 0.8, drafts, steps, budget)
    free = state.block_pool.get_num_free_blocks()
    starts = [0] * steps  # of the steps under way, the oldest first
    for _ in range(200):
        computed = starts[-1]
        size = pick.choice((1, 1 + drafts, pick.randint(1, budget)))
        step(state, computed, computed + size, processed=starts[0])
        holds = free - state.block_pool.get_num_free_blocks()
        assert holds <= state.max_admission_blocks_per_request, f"seed {seed}: {computed}, {size}"
        rejected = pick.randint(0, min(drafts, size - 1))
        going_on = computed + size - rejected
        overlap = 4 if ratio == 4 else 0
        reads = range(max(going_on - going_on % ratio - overlap, 0), going_on)
        assert {*reads} <= {*held(state)}, f"seed {seed}: {computed}, {size}, {rejected}"
        starts = [*starts[1:], going_on]
    state.free("request")
    assert state.block_pool.get_num_free_blocks() == free


def test_a_hit_of_any_length_reads_no_row_where_windows_do_not_overlap():
    state = manager(128)
    blocks, length = state.find_longest_cache_hit(
        [], 1000, [0, 1], state.block_pool, state.kv_cache_spec, False, HIT
    )
    assert length == 768 and all(len(one) == 96 for one in blocks)
    assert all(block.is_null for one in blocks for block in one)


def test_layers_of_one_group_have_one_ratio():
    four, other = (manager(ratio, drafts=3, steps=2).kv_cache_spec for ratio in PAGES)
    merged = ReadableStateSpec.merge([four, four])
    assert (merged.ratio, merged.rollback, merged.rows_at_hit) == (4, 6, 4)
    assert merged.page_size_bytes == four.page_size_bytes
    assert four.is_uniform_with_collection({"a": four})
    assert not four.is_uniform_with_collection({"a": four, "b": other})
