"""Batches for the tests, from the package's generator, and how two of them are compared."""

import mmap
from dataclasses import replace

import torch

from vllm_dsv4_indexer.batches import (
    CACHES,
    MAX_POSITION,
    Batch,
    Prefixes,
    make_batch,
    random_case,
    with_gaps,
)
from vllm_dsv4_indexer.contract import (
    GEOMETRIES,
    HEAD_DIM,
    ROPE_DIM,
)
from vllm_dsv4_indexer.entries import bf16_differ

# For the tests to import from here.
__all__ = ["MAX_POSITION", "Batch", "Prefixes", "make_batch", "random_case"]

_, MAIN_4, MAIN_128 = GEOMETRIES

MAP_NORESERVE = 0x4000  # of Linux's mman.h; the module has it from Python 3.13 on

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


def far_apart(batch: Batch) -> Batch:
    """The batch on sparse memory, where the last sixteenth of every tensor that may have a stride
    lies beyond 2^32 elements: runs of rows begin there too. A clone of it is dense."""
    return replace(with_gaps(batch, _sparse, span=(1 << 32) * 16 // 15), storages=())


def _sparse(size: int) -> torch.Tensor:
    """Memory that takes a small page for each row that is touched, and nothing for the rest."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def assert_same_caches(a: Batch, b: Batch) -> None:
    """Every byte that is a row's or an entry's, whatever the strides."""
    for name in CACHES:
        x, y = getattr(a, name), getattr(b, name)
        assert x is y is None or torch.equal(
            x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)
        ), name


# What lies halfway between two numbers of a type. A number is the largest sum of the Hadamard
# rotation. With 508 many scaled sums end in .5, with 3072 some lie between two codes of e4m3fn.
# With 2793 and 12679 the scale is above, or below, the even one of two halves.
TIES = {
    "fp8_pow2": ("bf16", "codes"),
    "int8_hadamard": ("bf16", 508, 2793, 12679),
    "fp8_amax": ("bf16", 3072),
    "bf16": ("bf16",),
}


def on_ties(k_format: str, kind: str | int, **options) -> Batch:
    """A batch whose entries, before they are rounded, are `_tied(kind)` or minus that, exactly:
    rows are all 1 or all -1 and weigh the same, the mean square plus eps is 4, no position
    rotates."""
    batch = make_batch([(0, 16), (0, 40)], k_format=k_format, norm_dtype=torch.float32, **options)
    batch.kv_score[:] = 1
    batch.kv_score[16:] = -1
    batch.kv_score[:, batch.geometry.kv_width :] = batch.ape[:] = 0
    batch.norm_weight[:] = 2 * _tied(kind).repeat(batch.geometry.head_dim // HEAD_DIM)
    batch.cos_sin_cache[:] = 1
    batch.cos_sin_cache[:, ROPE_DIM // 2 :] = 0
    return replace(batch, eps=3.0)


def _tied(kind: str | int) -> torch.Tensor:
    i = torch.arange(HEAD_DIM)
    if kind == "bf16":  # between each of the numbers from 1 to 2 and the next
        return ((0x3F80 + i << 16) + 0x8000).int().view(torch.float32)
    if kind == "codes":  # e4m3fn: fourteen binades, then numbers without a leading 1
        normal = (1 + (i % 8 + 0.5) / 8) * 0.5 ** (i // 8)
        return torch.where(i < 14 * 8, normal, (i % 8 + 0.5) / 8 * 2.0**-14)
    mean = int(kind) // HEAD_DIM
    values = mean - 3 + torch.randperm(HEAD_DIM, generator=torch.Generator().manual_seed(0)) % 7
    values[0] += int(kind) - values.sum()
    return values.float()


def assert_identical(a: Batch, b: Batch, case: object = "") -> None:
    """Every byte of every storage."""
    for x, y in zip(a.storages, b.storages):
        assert torch.equal(x, y), f"{(x != y).sum()} bytes differ: {case}"


def assert_close(
    actual: Batch, expected: Batch, case: object = "", scale_rtol: float = 0.0
) -> tuple[int, int]:
    """Values at most one code apart, channels in bf16 as `bf16_differ` has them, scales within
    `scale_rtol`, every other byte of the storages equal.

    Returns how many values differ, and how many values were stored; the caller bounds their ratio.
    """
    distance = (actual.ordered_codes() - expected.ordered_codes()).abs()
    if actual.k_format == "bf16":
        far = bf16_differ(actual.k_cache, expected.k_cache)
        assert not far.any(), f"{actual.k_cache[far]} is not {expected.k_cache[far]}: {case}"
    else:
        assert distance.max() <= 1, f"codes differ by {distance.max()}: {case}"
    blended = actual.clone()
    blended.codes().copy_(expected.codes())
    if actual.k_format == "fp8_ds_mla":
        ours, theirs = actual.rotated(), expected.rotated()
        far = bf16_differ(ours, theirs)
        assert not far.any(), f"{ours[far]} is not {theirs[far]}: {case}"
    if actual.k_format in GEOMETRIES[MAIN_4]:
        blended.rotated().copy_(expected.rotated())
    if scale_rtol:
        torch.testing.assert_close(
            actual.scales(), expected.scales(), rtol=scale_rtol, atol=0, equal_nan=True
        )
        blended.scales().copy_(expected.scales())
    assert_identical(blended, expected, case)
    return int(distance.count_nonzero()), actual.written().codes.numel()
