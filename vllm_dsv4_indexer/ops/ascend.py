"""`compress` on Ascend NPUs: hands the tensors' addresses to the native library (csrc/ascend), on the current stream.

Nothing here waits for the device, so values are not checked: a row whose slot is out of range or in page 0 is not
written, a window's row without a page counts for nothing. What the kernels cannot do is refused with the table of
csrc/ascend/tiling.h. Two conditions beyond the op's own, both kept by vLLM Ascend (csrc/ascend/README.md says why): the
slots of a call are unique, and none of them is a row that a window of the same call reads from the state.
"""

import ctypes
import functools

import torch
from torch import Tensor

from .. import contract
from .library import library_path

_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_ascend.so"
_K_FORMATS = {"int8_hadamard": 1, "fp8_amax": 2}


class Arguments(ctypes.Structure):
    """csrc/ascend/abi.h, `struct Arguments`, which explains the fields; all but eps are integers of 8 bytes."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "tokens kv_score kv_score_stride ape norm_weight norm_weight_is_bf16 cos_sin cos_sin_stride cos_sin_rows "
            "positions token_to_req state_slots block_table block_table_stride requests table_columns "
            "state state_page_stride state_row_stride state_pages state_page "
            "k_slots k_cache k_page_stride k_entry_stride k_pages k_page "
            "k_scale k_scale_page_stride k_scale_entry_stride k_scale_is_fp16 k_format"
        ).split()
    ] + [("eps", ctypes.c_float)]


def compress(*tensors: Tensor | None, eps: float, k_format: str, algorithm: str = "one_pass") -> None:
    """See `vllm_dsv4_indexer.ops.compress`. How many entries are written only the device knows."""
    arguments = arguments_of(*tensors, eps=eps, k_format=k_format)
    message = ctypes.create_string_buffer(500)
    stream = _stream(tensors[0].device)
    if native().dsv4_indexer_ascend_compress(
        algorithm.encode(), ctypes.byref(arguments), stream, message, len(message)
    ):
        raise contract.ContractError(message.value.decode())


def arguments_of(
    kv_score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    token_to_req: Tensor,
    inner_state_slot_mapping: Tensor,
    inner_state_block_table: Tensor,
    inner_state_cache: Tensor,
    k_slot_mapping: Tensor,
    k_cache: Tensor,
    k_scale_cache: Tensor | None,
    *,
    eps: float,
    k_format: str,
) -> Arguments:
    """The arguments of `compress` as the library takes them: addresses, which do not keep the tensors alive."""
    if k_format not in _K_FORMATS:
        raise contract.ContractError(f"k_format {k_format!r} has no kernel for NPUs; there are {', '.join(_K_FORMATS)}")
    if kv_score.dtype is not torch.float32:
        raise contract.ContractError(
            f"kv_score has dtype {kv_score.dtype}; on NPUs the projection's output is torch.float32"
        )
    entry_stride = k_cache.stride(1) if k_format == "int8_hadamard" else contract.HEAD_DIM  # fp8 pages are opaque
    scale = (
        (0, 0, 0, 0)
        if k_scale_cache is None
        else (k_scale_cache.data_ptr(), *k_scale_cache.stride(), k_scale_cache.dtype is torch.float16)
    )
    return Arguments(
        kv_score.shape[0], kv_score.data_ptr(), kv_score.stride(0), ape.data_ptr(),
        norm_weight.data_ptr(), norm_weight.dtype is torch.bfloat16,
        cos_sin_cache.data_ptr(), cos_sin_cache.stride(0), cos_sin_cache.shape[0],
        positions.data_ptr(), token_to_req.data_ptr(), inner_state_slot_mapping.data_ptr(),
        inner_state_block_table.data_ptr(), inner_state_block_table.stride(0), *inner_state_block_table.shape,
        inner_state_cache.data_ptr(), *inner_state_cache.stride()[:2], *inner_state_cache.shape[:2],
        k_slot_mapping.data_ptr(), k_cache.data_ptr(), k_cache.stride(0), entry_stride, *k_cache.shape[:2],
        *scale, _K_FORMATS[k_format], eps,
    )  # fmt: skip


@functools.cache
def native() -> ctypes.CDLL:
    """The native library, loaded."""
    path = library_path(_LIBRARY)
    library = ctypes.CDLL(str(path))
    if library.dsv4_indexer_ascend_arguments_size() != ctypes.sizeof(Arguments):
        raise ImportError(f"{path} has another interface than this package; build and install it again")
    library.dsv4_indexer_ascend_compress.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64,
    ]  # fmt: skip
    return library


def _stream(device: torch.device) -> int:
    return torch.npu.current_stream(device).npu_stream
