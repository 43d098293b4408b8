"""`bench cost`: the op moves the bytes that the paper says, and vLLM holds the pages."""

import random
import re

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_dsv4_indexer import cli, ops
from vllm_dsv4_indexer.bench import cost
from vllm_dsv4_indexer.bench.cases import PAGE, PAGE_BYTES, Case, make_call
from vllm_dsv4_indexer.contract import (
    FP8_ENTRY_BYTES,
    FP8_PAGE_ENTRIES,
    RATIO,
    ROW_WIDTH,
    WINDOW,
    Call,
)
from vllm_dsv4_indexer.engines.vllm_cpu.state import ReadableStateSpec
from vllm_dsv4_indexer.read_later import HIT_TOKENS

STATE_PAGE = SlidingWindowMLASpec(  # as CompressorStateCache of vLLM 0.32.0 asks for it
    block_size=PAGE,
    num_kv_heads=1,
    head_size=ROW_WIDTH,
    dtype=torch.float32,
    sliding_window=WINDOW,
    alignment=576,
)
READABLE_PAGE = ReadableStateSpec.of(STATE_PAGE, RATIO)


def some_case(seed: int) -> Case:
    pick = random.Random(seed)
    requests = tuple(
        (pick.randrange(20), pick.randrange(1, 24)) for _ in range(pick.randrange(1, 4))
    )
    return Case(f"seed {seed}", "mixed", requests)


@pytest.mark.parametrize("way", cost.WAYS)
@pytest.mark.parametrize("kv_dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("seed", range(4))
def test_a_call_reads_and_writes_what_the_paper_says(seed, kv_dtype, way):
    case = some_case(seed)
    assert cost.counted(case, kv_dtype, way) == cost.on_paper(case.requests, kv_dtype, way), case


@pytest.mark.parametrize(
    "requests", [((start, n),) for start in range(9) for n in (1, 4, 9)], ids=str
)
def test_a_call_that_saves_reads_the_half_rows_of_the_paper_and_no_other(requests):
    case = Case("", "one", requests)
    call = make_call(case, torch.bfloat16)
    assert cost.halves_read(call, "cpu", "inner_state_cache") == set(cost.history_rows(case, call))


def test_a_byte_of_padding_that_a_call_writes_is_counted(monkeypatch):
    compress = ops.compress

    def careless(*arguments, **options):
        compress(*arguments, **options)
        state = Call(*arguments).inner_state_cache
        state.as_strided((1,), (1,), PAGE * ROW_WIDTH).view(torch.uint8)[0] = (
            0x55  # behind the rows of the first page
        )

    case = some_case(0)
    expected = cost.on_paper(case.requests, torch.bfloat16, "full")
    monkeypatch.setattr(ops, "compress", careless)
    counted = cost.counted(case, torch.bfloat16, "full")
    assert counted == expected._replace(state_written=expected.state_written + 1)


def test_vllm_pads_pages_of_both_kinds_to_the_stride_on_paper():
    k_page = MLAAttentionSpec(
        block_size=RATIO * FP8_PAGE_ENTRIES,
        num_kv_heads=1,
        head_size=FP8_ENTRY_BYTES,
        dtype=torch.uint8,
        tokens_per_state=RATIO,
        alignment=576,
    )
    assert STATE_PAGE.page_size_bytes == k_page.page_size_bytes == PAGE_BYTES


@pytest.mark.parametrize("chunk", (1, 2, 5, 64, 100, 512, 8192))
@pytest.mark.parametrize("readable", (False, True), ids=("full", "readable"))
def test_a_request_holds_the_state_pages_that_are_allocated(readable, chunk):
    """In every call of a prompt."""
    spec = READABLE_PAGE if readable else STATE_PAGE
    pool = BlockPool(4 * chunk + 64, enable_caching=True, hash_block_size=PAGE)
    manager = KVCacheSpecRegistry.get_manager_class(spec)(
        spec,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=HIT_TOKENS,
    )
    free = pool.get_num_free_blocks()
    for end in range(chunk, 12 * chunk, chunk):
        manager.remove_skipped_blocks("a request", end - chunk)
        manager.allocate_new_blocks("a request", end, end)
        held = free - pool.get_num_free_blocks()
        assert held * PAGE_BYTES == cost.state_bytes(end, chunk, readable), end


def test_at_any_context_a_prompt_costs_the_same_bytes_a_token():
    for chunk in cost.CHUNKS:
        per_token = {
            sum(
                cost.on_paper(
                    tuple((s, chunk) for s in range(0, context, chunk)), torch.bfloat16, "full"
                )
            )
            / context
            for context in cost.CONTEXTS
        }
        assert max(per_token) - min(per_token) < 1  # the first chunk has no history to read


def test_the_command_prints_the_same_numbers_on_paper_and_counted(capsys):
    assert cli.main(["bench", "cost"]) == 0
    text = capsys.readouterr().out
    pairs = re.findall(r"(\d+) = (\d+)", text)
    assert len(pairs) == 2 * len(cost.WAYS) * len(cost.Traffic._fields)
    assert all(paper == counted for paper, counted in pairs)
    assert "Flash, 21 layers" in text and "Pro, 30 layers" in text
