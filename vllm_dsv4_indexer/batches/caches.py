"""Caches with random bytes in them, laid out as an engine does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contract
from ..contract import HEAD_DIM, Geometry
from .batch import Batch
from .tables import Pages, ceil

_GAP = 16  # elements between rows, pages or entries
_CANARY = 4096  # bytes in front of each cache, and behind it, that nobody may touch
# (bytes per state page, per fp8 page, offset of both): None is dense.
LAYOUTS = {
    "dense": (None, None, 0),
    "vllm": (8640, 8640, 0),  # vLLM 0.32 aligns both to 576: 8192 and 8448 bytes are used
    "padded": (8640, 8704, 0),
    # vLLM 0.32, four layers: one storage for the state and the K cache of all layers, here those of
    # the layer whose slot begins at byte 8640. State and K views begin at the same byte and use
    # different pages.
    "engine": (93888, 93888, 8640),
    # vLLM Ascend 0.26.0rc1: one storage of pages, each as large as a K page with its scales behind
    # the values; a state page begins where a K page would.
    "ascend": (None, None, 0),
}
SHARED = ("engine", "ascend")


class Caches(NamedTuple):
    state: Tensor
    k_cache: Tensor
    k_scale: Tensor | None
    storages: tuple[Tensor, ...]  # every byte behind them, each storage once


def make_caches(
    geometry: Geometry,
    pages: Pages,
    k_format: str,
    scale_dtype: torch.dtype,
    layout: str,
    numbers: torch.Generator,
) -> Caches:
    """The state, the K cache and its scales, as views of their storages."""
    argument = contract.arguments_of_call(k_format, geometry)["k_cache"]
    width, k_dtype = int(argument.sizes[-1]), argument.dtypes[0]
    scaled = k_format == "int8_hadamard"
    page_bytes = pages.page * geometry.row_width * 4, pages.k_page * width * k_dtype.itemsize
    scale_bytes = pages.k_page * scale_dtype.itemsize if scaled else 0
    state_stride, k_stride = _strides(layout, *page_bytes, scale_bytes)
    offset, shared = _CANARY + LAYOUTS[layout][2], layout in SHARED
    around = offset + _CANARY
    storage = random_bytes(pages.state_pages * state_stride + around, numbers)
    k_storage = storage if shared else random_bytes(pages.k_pages * k_stride + around, numbers)
    rows = pages.state_pages, pages.page, geometry.row_width
    state = _view(storage, torch.float32, rows, state_stride, offset)
    k_cache = _view(k_storage, k_dtype, (pages.k_pages, pages.k_page, width), k_stride, offset)
    storages = (storage,) if shared else (storage, k_storage)
    if not scaled:
        return Caches(state, k_cache, None, storages)
    if layout == "ascend":
        return Caches(state, k_cache, _scales_behind(k_cache, scale_dtype), storages)
    scales, scale_storage = _scales_apart(pages, scale_dtype, numbers)
    return Caches(state, k_cache, scales, (*storages, scale_storage))


def _strides(layout: str, state_bytes: int, k_bytes: int, scale_bytes: int) -> tuple[int, int]:
    """Bytes from page to page, of the state and of the K cache, whose pages need so many."""
    state, k, _ = LAYOUTS[layout]
    if layout == "ascend":
        state = k = k_bytes + scale_bytes
    state, k = _stride(state, state_bytes), _stride(k, k_bytes)
    return (max(state, k), max(state, k)) if layout in SHARED else (state, k)


def _stride(stride: int | None, page: int) -> int:
    """Bytes from page to page: as many strides as a page of so many bytes needs."""
    return page if stride is None else stride * ceil(page, stride)


def _view(
    storage: Tensor, dtype: torch.dtype, shape: tuple[int, int, int], stride: int, offset: int
) -> Tensor:
    """Pages of rows, `stride` bytes apart, the first at `offset`."""
    strides = stride // dtype.itemsize, shape[-1], 1
    return storage.view(dtype).as_strided(shape, strides, offset // dtype.itemsize)


def _scales_behind(k_cache: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales behind the values of each page."""
    storage = torch.empty(0, dtype=torch.uint8).set_(k_cache.untyped_storage()).view(dtype)
    strides = k_cache.stride(0) // dtype.itemsize, 1
    first = k_cache.storage_offset() + k_cache.shape[1] * HEAD_DIM  # the values are bytes
    return storage.as_strided(k_cache.shape[:2], strides, first // dtype.itemsize)


def _scales_apart(
    pages: Pages, dtype: torch.dtype, numbers: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scales with gaps between them, and their storage."""
    storage = random_bytes(pages.k_pages * pages.k_page * 8 + 2 * _CANARY, numbers)
    shape, strides = (pages.k_pages, pages.k_page), (pages.k_page * 2, 2)
    return storage.view(dtype).as_strided(shape, strides, _CANARY // dtype.itemsize), storage


def random_bytes(size: int, numbers: torch.Generator) -> Tensor:
    """At least so many random bytes, by eights."""
    words = torch.randint(-(2**63), 2**63 - 1, (ceil(size, 8),), generator=numbers)
    return words.view(torch.uint8)


def with_gaps(
    batch: Batch, memory: Callable[[int], Tensor], span: int = 0, leave: Sequence[str] = ()
) -> Batch:
    """The batch with gaps wherever the contract allows a stride, in what `memory` gives for so many
    bytes. The first dimension of each tensor spans more than `span` elements. The tensors that
    `leave` names stay as they are."""
    storages = list(batch.storages if leave else ())
    views: dict[str, Any] = {}
    arguments = contract.arguments_of_call(batch.k_format, batch.geometry)
    for name, (_, _, _, dense) in arguments.items():
        tensor = getattr(batch, name)
        if tensor.dim() <= dense or name in leave:
            continue
        strides = _strides_with_gaps(tensor.shape, dense, span)
        offset, size = _CANARY // tensor.itemsize, strides[0] * len(tensor) * tensor.itemsize
        storages.append(memory(size + 2 * _CANARY))
        views[name] = storages[-1].view(tensor.dtype).as_strided(tensor.shape, strides, offset)
        views[name].copy_(tensor)
    return replace(batch, **views, storages=tuple(storages))


def _strides_with_gaps(shape: torch.Size, dense: int, span: int) -> tuple[int, ...]:
    """Of a tensor whose last `dense` dimensions are contiguous: a gap behind each index of the
    others."""
    strides: list[int] = []
    extent = 1
    for dim in reversed(range(len(shape))):
        strides.insert(0, extent + (_GAP if dim < len(shape) - dense else 0))
        extent = strides[0] * shape[dim]
    apart = span // max(shape[0] - 1, 1) // _GAP * _GAP + _GAP
    return max(strides[0], apart), *strides[1:]
