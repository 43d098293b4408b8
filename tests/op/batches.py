"""Batches for the tests, from the benchmark's generator, and how two of them are compared."""

import random

import torch
from torch import Tensor

from vllm_dsv4_indexer.bench.batches import MAX_POSITION, Batch, Prefixes, make_batch
from vllm_dsv4_indexer.contract import HEAD_DIM

__all__ = ["MAX_POSITION", "Batch", "Prefixes", "make_batch"]  # for the tests to import from here

IMPLS = ("reference", "cpu", "overlay_scan")  # the same results
IMPLS_WHERE_ROWS_ARE_UNIQUE = (*IMPLS, "scatter_pool")


def tokens_of(batch: Batch, request: int) -> torch.Tensor:
    real = (batch.inner_state_slot_mapping >= 0) | (batch.k_slot_mapping >= 0)
    return (real & (batch.token_to_req == request)).nonzero()[:, 0]


def one_after_the_other(batch: Batch, impl: str) -> Batch:
    """Each request in a call of its own, in their order: what is shared lies in the state when it
    is read."""
    for request in range(len(batch.inner_state_block_table)):
        batch.take(tokens_of(batch, request)).compress(impl)
    return batch


def random_case(pick: random.Random) -> dict:
    """Arguments of `make_batch`."""
    requests = [(pick.randrange(140), pick.randrange(1, 40)) for _ in range(pick.randrange(1, 8))]
    prefixes: Prefixes = {}
    while pick.random() < 0.6:  # one more request, which shares the prefix of one that is there
        owner = pick.randrange(len(requests))
        end = sum(requests[owner])
        ends = [length for length in range(8, end + 1, 8) if length > requests[owner][0]]
        if not ends:
            break
        length = pick.choice(ends)
        prefixes[len(requests)] = owner, length
        requests.append((length, pick.randrange(1, 40)))
    return {
        "requests": requests,
        "prefixes": prefixes,
        "seed": pick.randrange(2**32),
        "page": pick.choice((2, 4, 8)),
        "layout": pick.choice(("dense", "padded", "engine")),
        "kv_dtype": pick.choice((torch.float32, torch.bfloat16)),
        "padding": pick.randrange(4),
        "ring": pick.choice((None, None, 8, 16, 64)),
    }


def assert_identical(a: Batch, b: Batch, case: object = "") -> None:
    """Every byte of every storage."""
    for x, y in zip(a.storages, b.storages):
        assert torch.equal(x, y), f"{(x != y).sum()} bytes differ: {case}"


def assert_close(
    actual: Batch, expected: Batch, case: object = "", scale_rtol: float = 0.0
) -> tuple[int, int]:
    """Values at most one code apart, scales within `scale_rtol`, every other byte of the storages
    equal.

    Returns how many values differ, and how many values were stored; the caller bounds their ratio.
    """
    distance = (ordered(actual) - ordered(expected)).abs()
    assert distance.max() <= 1, f"codes differ by {distance.max()}: {case}"
    blended = actual.clone()
    blended.codes().copy_(expected.codes())
    if scale_rtol:
        torch.testing.assert_close(
            actual.scales(), expected.scales(), rtol=scale_rtol, atol=0, equal_nan=True
        )
        blended.scales().copy_(expected.scales())
    assert_identical(blended, expected, case)
    return int(distance.count_nonzero()), int((actual.k_slot_mapping >= 0).sum()) * HEAD_DIM


def ordered(batch: Batch) -> Tensor:
    """The codes as integers in the order of the values that they stand for."""
    codes = batch.codes().int()
    if batch.k_format == "int8_hadamard":
        return codes
    codes = torch.where(codes == 0xFF, 0x7F, codes)  # either NaN
    return torch.where(codes < 128, codes, 128 - codes)
