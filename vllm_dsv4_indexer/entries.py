"""What a K cache holds, as views of its tensors, and how its numbers are compared."""

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import DS_MLA_CODES, DS_MLA_DATA_BYTES, DS_MLA_ENTRY_BYTES, HEAD_DIM, ROPE_DIM

NOT_A_NUMBER = 0x7F  # the code e4m3fn, but for its sign
# Of codes, those that may be the neighbours of another compressor's: where a value lies between
# two, its sums, in another order, decide otherwise.
SHARE_OF_TIES = 1e-4


class Entries(NamedTuple):
    """[pages, entries of a page, ...] of a cache, or [entries, ...]."""

    codes: Tensor  # all values but `rotated`
    rotated: Tensor  # bf16: the channels that the main caches keep as they are; of index keys none
    scales: Tensor  # fp32 or fp16; of `fp8_ds_mla` eight exponents, of `bf16` none

    @staticmethod
    def of(k_cache: Tensor, k_format: str, k_scale_cache: Tensor | None = None) -> "Entries":
        """Views of the cache."""
        per_page, none = k_cache.shape[1], k_cache[..., :0]
        if k_scale_cache is not None:
            return Entries(k_cache, none, k_scale_cache)
        if k_format == "bf16":
            return Entries(k_cache[..., :-ROPE_DIM], k_cache[..., -ROPE_DIM:], none)
        if k_format == "fp8_ds_mla":
            data, exponents = DS_MLA_DATA_BYTES, DS_MLA_ENTRY_BYTES - DS_MLA_DATA_BYTES
            rotated = _in_pages(k_cache, 2 * ROPE_DIM, data, DS_MLA_CODES)
            return Entries(
                _in_pages(k_cache, DS_MLA_CODES, data),
                rotated.view(torch.bfloat16),
                _in_pages(k_cache, exponents, exponents, per_page * data),
            )
        scales = _in_pages(k_cache, 4, 4, per_page * HEAD_DIM).view(torch.float32)
        return Entries(_in_pages(k_cache, HEAD_DIM, HEAD_DIM), none, scales[..., 0])

    def at(self, slots: Tensor) -> "Entries":
        """Copies of those in these slots."""
        per_page = self.codes.shape[1]
        return Entries._make(part[slots // per_page, slots % per_page] for part in self)


def _in_pages(k_cache: Tensor, width: int, stride: int, offset: int = 0) -> Tensor:
    """[pages, entries, width] view of bytes, so far from the beginning of each page."""
    return k_cache.as_strided(
        (*k_cache.shape[:2], width),
        (k_cache.stride(0), stride, 1),
        k_cache.storage_offset() + offset,
    )


def in_order(values: Tensor) -> Tensor:
    """Codes, or numbers in bf16, as integers in the order of the values that they stand for. A code
    e4m3fn that is not a number has no neighbour."""
    if values.dtype is torch.int8:
        return values.int()
    if values.dtype is torch.bfloat16:
        return _signed(values.view(torch.int16).int() & 0xFFFF, 0x8000)
    codes = values.int()
    return torch.where(codes & NOT_A_NUMBER == NOT_A_NUMBER, 255, _signed(codes, 0x80))


def _signed(bits: Tensor, sign: int) -> Tensor:
    return torch.where(bits >= sign, sign - bits, bits)


def bf16_differ(ours: Tensor, theirs: Tensor) -> Tensor:
    """Which channels of entries [..., channels] are more than one step of bf16 apart. Where the
    rows of a window cancel, or the products of a rotation, no bits of the sum are exact: there the
    error is measured by the entry's largest channel, in fp32."""
    if not theirs.numel():  # index keys have none
        return torch.zeros_like(theirs, dtype=torch.bool)
    largest = theirs.float().abs().nan_to_num(posinf=0).amax(dim=-1, keepdim=True)
    cancelled = (ours.float() - theirs.float()).abs() <= 2**-20 * largest
    same = cancelled | (ours.isnan() & theirs.isnan())
    return ((in_order(ours) - in_order(theirs)).abs() > 1) & ~same
