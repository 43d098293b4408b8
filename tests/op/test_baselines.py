"""The algorithms kept for comparison: bit for bit the op where rows are unique, and wrong where
they are known to be."""

import random

import pytest
import torch

from batches import Batch, assert_identical, make_batch
from vllm_dsv4_indexer.contract import INDEXER
from vllm_dsv4_indexer.ops import cpu

BASELINES = ("overlay_scan", "scatter_pool")
MIXED = [(5, 9), (0, 130), (67, 1), (128, 300), (3, 1), (0, 3), (62, 41)]
OPTIONS = [
    {"padding": 7},
    {"layout": "engine", "kv_dtype": torch.bfloat16, "page": 2},
    {"layout": "padded", "k_format": "int8_hadamard", "page": 8},
]


def differing_entries(a: Batch, b: Batch) -> list[int]:
    return [i for i, (x, y) in enumerate(zip(a.entries(), b.entries())) if x != y]


@pytest.mark.parametrize("impl", BASELINES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_rows_are_unique_every_byte_is_that_of_the_one_pass(impl, options):
    for requests in (
        MIXED,
        *([(start, n) for n in (1, 2, 3, 7, 128)] for start in (0, 1, 2, 3, 4, 5, 63, 64)),
    ):
        batch = make_batch(requests, **options)
        assert_identical(batch.clone().compress(impl), batch.clone().compress("cpu"), requests)


@pytest.mark.parametrize("impl", BASELINES)
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_every_instruction_set_and_number_of_threads_stores_the_same_bytes(
    impl, isa, monkeypatch, set_threads
):
    algorithm = cpu.algorithm_for(cpu.native().library, impl, isa)
    if not algorithm:
        pytest.skip(f"this CPU or build lacks {isa}")
    batch = make_batch(MIXED)
    expected = batch.clone().compress("cpu")
    monkeypatch.setitem(cpu.native().algorithms, (impl, INDEXER), algorithm)
    for threads in (1, 3):
        set_threads(threads)
        assert_identical(batch.clone().compress(impl), expected)


@pytest.mark.parametrize("seed", range(10))
def test_overlay_scan_is_right_for_every_ring(seed):
    pick = random.Random(seed)
    requests = [(pick.randrange(140), pick.randrange(1, 60)) for _ in range(pick.randrange(1, 6))]
    batch = make_batch(requests, seed=seed, ring=pick.choice((8, 16, 64)), padding=3)
    assert_identical(
        batch.clone().compress("overlay_scan"), batch.clone().compress("cpu"), f"seed {seed}"
    )


def wrong_entries(batch: Batch, algorithm: str) -> list[int]:
    """Those in which the algorithm differs from one pass."""
    return differing_entries(batch.clone().compress(algorithm), batch.clone().compress("cpu"))


@pytest.mark.parametrize("length, ring, wrong", [(128, 134, [0]), (129, 136, [])])
def test_scatter_pool_is_wrong_at_a_ring_of_n_plus_6_and_right_at_n_plus_7(length, ring, wrong):
    batch = make_batch([(11, length)], ring=ring, page=2)
    assert wrong_entries(batch, "scatter_pool") == wrong


def test_scatter_pool_is_wrong_in_both_windows_of_a_token_without_a_state_row():
    batch = make_batch([(4, 12)])
    # Position 6: in the group of entry 1, and the previous group of entry 2.
    batch.inner_state_slot_mapping[2] = -1
    assert wrong_entries(batch, "scatter_pool") == [0, 1]
    assert wrong_entries(batch, "overlay_scan") == []


def test_scatter_pool_leaves_out_a_row_without_a_page():
    """The contract asks for the pages of history alone; nothing is read outside the caches."""
    batch = make_batch([(8, 17)])
    batch.inner_state_block_table[:, 3:] = 10**6
    assert wrong_entries(batch, "scatter_pool") == [1, 2, 3]
    assert wrong_entries(batch, "overlay_scan") == []
