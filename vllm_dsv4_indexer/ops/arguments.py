"""The fields that the native libraries' C structs share, from the arguments of `compress`.

In the order of csrc/cpu/abi.h and csrc/ascend/abi.h, which explain them. Packed into bytes they cost less than a
`ctypes.Structure`, which sets each field by its name: about a microsecond of a call's twenty.
"""

import torch
from torch import Tensor

from ..contract import HEAD_DIM


def field_values(tensors: tuple[Tensor | None, ...], k_format: int, eps: float) -> tuple[int | float, ...]:
    """The fields from `tokens` on: 33 integers, of which the addresses do not keep the tensors alive, and eps.

    `tensors` are in the order of the op's signature, `k_format` is the library's number for it.
    """
    (
        kv_score, ape, norm_weight, cos_sin, positions, token_to_req, state_slots, block_table, state,
        k_slots, k_cache, k_scale,
    ) = tensors  # fmt: skip
    if k_scale is None:  # an fp8 page is opaque
        k_entry_stride, scale = HEAD_DIM, (0, 0, 0, 0)
    else:
        k_entry_stride = k_cache.stride(1)
        scale = (k_scale.data_ptr(), *k_scale.stride(), k_scale.dtype is torch.float16)
    return (
        kv_score.shape[0], kv_score.data_ptr(), kv_score.stride(0), kv_score.dtype is torch.bfloat16,
        ape.data_ptr(), norm_weight.data_ptr(), norm_weight.dtype is torch.bfloat16,
        cos_sin.data_ptr(), cos_sin.stride(0), cos_sin.shape[0],
        positions.data_ptr(), token_to_req.data_ptr(), state_slots.data_ptr(),
        block_table.data_ptr(), block_table.stride(0), *block_table.shape,
        state.data_ptr(), *state.stride()[:2], *state.shape[:2],
        k_slots.data_ptr(), k_cache.data_ptr(), k_cache.stride(0), k_entry_stride, *k_cache.shape[:2],
        *scale, k_format, eps,
    )  # fmt: skip
