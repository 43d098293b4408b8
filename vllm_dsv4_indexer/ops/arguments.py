"""The fields of the native libraries' C structs, made from tensors. csrc/cpu/abi.h and
csrc/ascend/abi.h explain them.

Bytes are faster to pack than a `ctypes.Structure`, which sets each field by name. The addresses do
not keep the tensors alive.
"""

import struct

from torch import Tensor, bfloat16, float16, uint8

from ..contract import HEAD_DIM, Extents, Layer, Step

STEP_FIELDS = (
    "tokens",
    "positions",
    "token_to_req",
    "state_slots",
    "block_table",
    "block_table_stride",
    "requests",
    "table_columns",
    "k_slots",
    *Extents._fields,
)
LAYER_FIELDS = (
    "ape",
    "norm_weight",
    "norm_weight_is_bf16",
    "cos_sin",
    "cos_sin_stride",
    "cos_sin_rows",
    "state",
    "state_page_stride",
    "state_row_stride",
    "state_pages",
    "state_page",
    "k_cache",
    "k_page_stride",
    "k_entry_stride",
    "k_pages",
    "k_page",
    "k_scale",
    "k_scale_page_stride",
    "k_scale_entry_stride",
    "k_scale_is_fp16",
    "k_format",
    "eps",
)
KV_SCORE_FIELDS = ("rows", "stride", "is_bf16", "tokens")


def step_fields(step: Step, extents: Extents) -> tuple[int, ...]:
    """The values of STEP_FIELDS."""
    positions, token_to_req, state_slots, block_table, k_slots = step
    return (
        positions.shape[0],
        positions.data_ptr(),
        token_to_req.data_ptr(),
        state_slots.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        *block_table.shape,
        k_slots.data_ptr(),
        *extents,
    )


def layer_fields(layer: Layer, k_format: int, eps: float) -> tuple[int | float, ...]:
    """The values of LAYER_FIELDS; `k_format` is the library's number for it."""
    ape, norm_weight, cos_sin, state, k_cache, k_scale = layer
    scale: tuple[int, ...]
    if k_scale is None:
        scale = (0, 0, 0, 0)
    else:
        scale = (k_scale.data_ptr(), *k_scale.stride(), k_scale.dtype is float16)
    # A page of bytes holds its scales behind all entries, so its entries are closer together.
    k_entry_stride = HEAD_DIM if k_cache.dtype is uint8 else k_cache.stride(1)
    return (
        ape.data_ptr(),
        norm_weight.data_ptr(),
        norm_weight.dtype is bfloat16,
        cos_sin.data_ptr(),
        cos_sin.stride(0),
        cos_sin.shape[0],
        state.data_ptr(),
        *state.stride()[:2],
        *state.shape[:2],
        k_cache.data_ptr(),
        k_cache.stride(0),
        k_entry_stride,
        *k_cache.shape[:2],
        *scale,
        k_format,
        eps,
    )


class PackedLayer:
    """A layer's LAYER_FIELDS as bytes, behind its geometry where the library asks for that: packed
    once, and again if a tensor has moved."""

    def __init__(
        self,
        layer: Layer,
        k_format: int,
        eps: float,
        packing: struct.Struct,
        geometry: tuple[int, ...] = (),
    ):
        self._fields, self._packing, self._geometry = (layer, k_format, eps), packing, geometry
        self._tensors = [tensor for tensor in layer if tensor is not None]
        self._addresses: list[int] = []
        self._packed = b""

    def packed(self) -> bytes:
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._addresses = addresses
            self._packed = self._packing.pack(*self._geometry, *layer_fields(*self._fields))
        return self._packed


def kv_score_fields(kv_score: Tensor) -> tuple[int, ...]:
    """The values of KV_SCORE_FIELDS."""
    return kv_score.data_ptr(), kv_score.stride(0), kv_score.dtype is bfloat16, kv_score.shape[0]
