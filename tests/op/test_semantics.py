"""What `compress` means, on the reference and on every native implementation."""

import random
from dataclasses import replace

import pytest
import torch

from batches import (
    IMPLS,
    IMPLS_WHERE_ROWS_ARE_UNIQUE,
    TIES,
    Batch,
    assert_close,
    assert_identical,
    assert_same_caches,
    far_apart,
    make_batch,
    on_ties,
    random_case,
)
from vllm_dsv4_indexer.contract import KV_WIDTH, RATIO, WINDOW

STARTS = (*range(10), 63, 64, 65, 127, 128, 129)
LENGTHS = (*range(1, 10), 127, 128, 129)
MIXED = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (0, 3), (62, 41)]
INT8 = [{"k_format": "int8_hadamard", "scale_dtype": d} for d in (torch.float32, torch.float16)]


def rows_of(batch: Batch) -> torch.Tensor:
    rows = batch.kv_score.float()
    rows[:, KV_WIDTH:] += batch.ape[batch.positions % RATIO]
    return rows


def saved_rows(batch: Batch) -> torch.Tensor:
    page = batch.inner_state_cache.shape[1]
    slots = batch.inner_state_slot_mapping
    return batch.inner_state_cache[slots // page, slots % page]


def compare_with_reference(
    cases: list[dict], scale_rtol: float = 0.0, differing: float = 1e-4
) -> None:
    different = total = 0
    for case in cases:
        batch = make_batch(**case)
        d, n = assert_close(
            batch.clone().compress("cpu"), batch.clone().compress("reference"), case, scale_rtol
        )
        different, total = different + d, total + n
    assert different <= differing * total, f"{different} of {total} values differ by one code"


def test_every_start_and_length_equals_the_reference():
    compare_with_reference(
        [{"requests": [(start, n) for n in LENGTHS], "seed": start} for start in STARTS]
    )


@pytest.mark.parametrize("length", (1, 2, 5))
def test_a_single_short_request_equals_the_reference(length):
    compare_with_reference(
        [{"requests": [(start, length)], "seed": start} for start in STARTS], differing=1e-3
    )


@pytest.mark.parametrize("layout", ("dense", "padded", "engine"))
@pytest.mark.parametrize("kv_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("norm_dtype", (torch.float32, torch.bfloat16))
def test_a_mixed_batch_with_padding_equals_the_reference(layout, kv_dtype, norm_dtype):
    options = {"layout": layout, "kv_dtype": kv_dtype, "norm_dtype": norm_dtype, "padding": 7}
    compare_with_reference([{"requests": MIXED, "seed": seed, **options} for seed in range(3)])


@pytest.mark.parametrize("page", (2, 4, 8))
def test_every_page_size_stores_the_same_entries_and_rows(page):
    compare_with_reference([{"requests": MIXED, "page": page, "layout": "padded"}])
    batch, other = make_batch(MIXED, page=page).compress(), make_batch(MIXED, page=4).compress()
    assert batch.entries() == other.entries()
    assert torch.equal(saved_rows(batch), saved_rows(other))


@pytest.mark.parametrize(
    "options", [*INT8, INT8[0] | {"gaps": True}], ids=("fp32_scale", "fp16_scale", "gaps")
)
@pytest.mark.parametrize("kv_dtype", (torch.float32, torch.bfloat16))
def test_int8_entries_equal_the_reference(options, kv_dtype):
    cases = [
        {"requests": MIXED, "seed": seed, "kv_dtype": kv_dtype, **options} for seed in range(3)
    ]
    compare_with_reference(cases, scale_rtol=1e-2, differing=1e-2)


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_a_state_row_is_kv_and_gate_plus_bias_bit_for_bit(impl):
    batch = make_batch(MIXED).compress(impl)
    assert torch.equal(saved_rows(batch), rows_of(batch))


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_a_call_without_tokens_or_with_padding_alone_writes_nothing(impl):
    batch = make_batch([(0, 8)], padding=5)
    for tokens in (slice(0, 0), slice(8, None)):
        assert_identical(batch.clone().take(tokens).compress(impl), batch)


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_a_k_slot_on_a_token_that_closes_no_window_is_ignored(impl):
    batch = make_batch([(0, 16)])
    stray = batch.clone()
    stray.k_slot_mapping[5] = batch.k_slot_mapping[7] + 1
    expected = batch.clone().compress(impl)
    assert_identical(stray.compress(impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("none", [[-1, -1], [1, 1], [0, 3]], ids=["-1", "null page", "its ends"])
def test_a_token_without_a_state_slot_counts_in_its_own_call_but_is_not_saved(impl, none):
    batch = make_batch([(4, 12)])
    missing = batch.clone()
    missing.inner_state_slot_mapping[[2, 6]] = torch.tensor(none)
    expected = batch.clone().compress(impl)
    missing.compress(impl)
    assert missing.entries() == expected.entries()
    page = batch.inner_state_cache.shape[1]
    for slot in [*batch.inner_state_slot_mapping[[2, 6]].tolist(), *range(page)]:
        row = (slot // page, slot % page)
        assert torch.equal(
            missing.inner_state_cache[row].view(torch.int32),
            batch.inner_state_cache[row].view(torch.int32),
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_padding_row_before_position_0_is_no_row_of_the_request(impl):
    batch = make_batch([(0, 8)], padding=4)
    batch.positions[8:] = torch.arange(-4, 0)
    batch.token_to_req[8:] = 0
    turned = batch.take([8, 9, 10, 11, *range(8)])  # right before the request's first token
    assert turned.clone().compress(impl).entries() == make_batch([(0, 8)]).compress(impl).entries()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "argument, first, last",
    [
        ("inner_state_slot_mapping", 3, 17),
        ("inner_state_slot_mapping", 144, 146),  # the last and the first tokens of two threads
        ("k_slot_mapping", 11, 39),
        ("k_slot_mapping", 11, 40),  # the second request's first window, which reads the state
    ],
)
def test_of_two_tokens_with_one_slot_the_last_wins(impl, argument, first, last, set_threads):
    set_threads(2)
    batch = make_batch([(0, 40), (3, 250)], kv_dtype=torch.bfloat16)
    slots, k_slots = batch.inner_state_slot_mapping, batch.k_slot_mapping
    getattr(batch, argument)[first] = getattr(batch, argument)[last]
    expected = batch.clone()
    unsaved = replace(expected, inner_state_slot_mapping=torch.full_like(slots, -1))
    for token in (k_slots >= 0).nonzero()[:, 0].tolist():
        only = torch.arange(len(slots)) == token
        replace(unsaved, k_slot_mapping=torch.where(only, k_slots, -1)).compress(impl)
    page = batch.inner_state_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        expected.inner_state_cache[slot // page, slot % page] = rows_of(batch)[token]
    assert_identical(batch.compress(impl), expected)


def scatter_first(batch: Batch, impl: str) -> Batch:
    """The other order: save every row, then pool every window from the state."""
    none = torch.full_like(batch.k_slot_mapping, -1)
    replace(batch, k_slot_mapping=none).compress(impl)
    for token in (batch.k_slot_mapping >= 0).nonzero()[:, 0].tolist():
        replace(batch, inner_state_slot_mapping=none).take([token]).compress(impl)
    return batch


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "start, length, ring", [(8, 2, 8), (11, 33, 8), (9, 128, 8), (11, 128, 134), (11, 129, 136)]
)
def test_a_ring_is_read_before_it_is_overwritten(impl, start, length, ring):
    batch = make_batch([(start, length)], ring=ring, page=2)
    unique = make_batch([(start, length)], page=2).compress(impl)
    assert batch.clone().compress(impl).entries() == unique.entries()


@pytest.mark.parametrize("impl", IMPLS)
def test_scatter_first_breaks_at_a_ring_of_n_plus_6_and_not_of_n_plus_7(impl):
    for length, ring, same in ((128, 134, False), (129, 136, True)):
        batch = make_batch([(11, length)], ring=ring, page=2)
        entries = scatter_first(batch.clone(), impl).entries()
        assert (entries == batch.clone().compress(impl).entries()) is same, (
            f"n={length}, ring={ring}"
        )


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_pages_freed_by_one_call_may_be_recycled_by_the_next(impl):
    # Seven pages of four hold a chunk and the window before it.
    length, chunk, recycled = 200, 16, 7
    expected = make_batch([(0, length)]).compress(impl)
    batch = make_batch([(0, length)], ring=4 * recycled)
    table = batch.inner_state_block_table
    whole = table.clone()
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        table.zero_()
        live = slice(max(begin - WINDOW, 0) // 4, -(-end // 4))
        table[:, live] = whole[:, live]
        batch.take(slice(begin, end)).compress(impl)
    assert batch.entries() == expected.entries()


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize("start, rejected", [(8, 1), (21, 3), (30, 6)])
def test_rolling_back_and_running_again_leaves_no_trace(impl, start, rejected):
    batch = make_batch([(start, 12)])
    expected = batch.clone().compress(impl)
    batch.take(slice(0, 6 - rejected)).compress(impl)
    draft = batch.take(slice(6 - rejected, 6))
    replace(draft, kv_score=torch.randn_like(draft.kv_score)).compress(impl)
    batch.take(slice(6 - rejected, None)).compress(impl)
    assert_identical(batch, expected)


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_a_nan_stays_in_the_windows_that_hold_it(impl):
    batch = make_batch([(0, 24), (0, 24)])
    poisoned = batch.clone()
    poisoned.kv_score[9] = torch.nan
    clean, dirty = batch.compress(impl).entries(), poisoned.compress(impl).entries()
    differing = {i for i, (a, b) in enumerate(zip(clean, dirty)) if a != b}
    # Position 9 is in the group of entry 2, and the previous group of entry 3.
    assert differing == {2, 3}


def test_extreme_values_equal_the_reference():
    """Entries of zeros, of NaN, of infinities, of subnormals; weights that underflow; gates of
    -inf."""
    batch = make_batch([(0, 64)], norm_dtype=torch.float32)
    kv = batch.kv_score
    kv[0:8, :KV_WIDTH] = 0
    kv[8:12, :KV_WIDTH] = torch.nan
    kv[16:20, 3] = torch.inf
    kv[24:32, :KV_WIDTH] *= 1e-38
    kv[32:40, KV_WIDTH:] *= 300
    kv[41, KV_WIDTH:] = -torch.inf
    kv[48:56, :KV_WIDTH] *= 1e15
    assert_close(batch.clone().compress("cpu"), batch.clone().compress("reference"))


@pytest.mark.parametrize("bits", (0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1))
def test_a_nan_of_any_bits_counts_as_infinity(bits):
    batch = make_batch([(0, 64)])
    batch.kv_score.view(torch.int32)[9, :KV_WIDTH] = bits
    assert_close(batch.clone().compress("cpu"), batch.clone().compress("reference"))


@pytest.mark.parametrize("magnitude", (1e-6, 1e6))
def test_int8_scales_of_tiny_and_huge_entries_equal_the_reference(magnitude):
    for options in INT8:
        batch = make_batch([(0, 64)], norm_dtype=torch.float32, **options)
        batch.norm_weight.mul_(magnitude)
        assert_close(
            batch.clone().compress("cpu"), batch.clone().compress("reference"), scale_rtol=1e-2
        )


@pytest.mark.parametrize("options", [{}, *INT8], ids=("fp8", "fp32_scale", "fp16_scale"))
def test_the_first_and_the_last_entry_of_the_cache_are_as_good_as_others(options):
    batch = make_batch([(0, 8)], **options)
    last = batch.k_cache.shape[0] * batch.k_cache.shape[1] - 1
    expected = batch.clone().compress("reference").entries()
    batch.k_slot_mapping[[3, 7]] = torch.tensor([0, last])
    for impl in ("cpu", "reference"):
        assert batch.clone().compress(impl).entries() == expected


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_equal_the_reference(seed):
    compare_with_reference([random_case(random.Random(seed))], differing=1e-3)


@pytest.mark.parametrize(
    "k_format, kind", [(f, kind) for f in ("fp8_pow2", "int8_hadamard") for kind in TIES[f]]
)
@pytest.mark.parametrize("scale_dtype", (torch.float32, torch.float16))
def test_what_lies_halfway_is_rounded_to_even_as_by_the_reference(k_format, kind, scale_dtype):
    batch = on_ties(k_format, kind, scale_dtype=scale_dtype)
    assert_identical(batch.clone().compress("cpu"), batch.compress("reference"))


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize("options", [{}, *INT8], ids=("fp8", "fp32_scale", "fp16_scale"))
def test_offsets_beyond_32_bits_change_no_byte(impl, options):
    batch = far_apart(make_batch([(0, 4400), (5, 9)], max_pos=4400, **options))
    near = batch.clone()
    assert_same_caches(batch.compress(impl), near.compress(impl))
