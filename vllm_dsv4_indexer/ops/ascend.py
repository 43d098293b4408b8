"""`compress` on Ascend NPUs: hands the tensors' addresses to the native library (csrc/ascend), on the current stream.

Nothing here waits for the device, so values are not checked: a row whose slot is out of range or in page 0 is not
written, a window's row without a page counts for nothing. What the kernels cannot do is refused with the table of
csrc/ascend/tiling.h. Two conditions beyond the op's own, both kept by vLLM Ascend (csrc/ascend/README.md says why): the
slots of a call are unique, and none of them is a row that a window of the same call reads from the state.
"""

import ctypes
import functools
import struct

import torch
from torch import Tensor

from .. import contract
from .arguments import field_values
from .library import library_path

_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_ascend.so"
_ARGUMENTS = struct.Struct("33qf0q")  # csrc/ascend/abi.h, `struct Arguments`; 0q pads it as C does
_K_FORMATS = {"int8_hadamard": 1, "fp8_amax": 2}


def compress(*tensors: Tensor | None, eps: float, k_format: str, algorithm: str = "one_pass") -> None:
    """See `vllm_dsv4_indexer.ops.compress`. How many entries are written only the device knows."""
    if k_format not in _K_FORMATS:
        raise contract.ContractError(f"k_format {k_format!r} has no kernel for NPUs; there are {', '.join(_K_FORMATS)}")
    kv_score = tensors[0]
    if kv_score.dtype is not torch.float32:
        raise contract.ContractError(
            f"kv_score has dtype {kv_score.dtype}; on NPUs the projection's output is torch.float32"
        )
    arguments = _ARGUMENTS.pack(*field_values(tensors, _K_FORMATS[k_format], eps))
    message = ctypes.create_string_buffer(500)
    if native().dsv4_indexer_ascend_compress(
        algorithm.encode(), arguments, _stream(kv_score.device), message, len(message)
    ):
        raise contract.ContractError(message.value.decode())


@functools.cache
def native() -> ctypes.CDLL:
    """The native library, loaded."""
    path = library_path(_LIBRARY)
    library = ctypes.CDLL(str(path))
    if library.dsv4_indexer_ascend_arguments_size() != _ARGUMENTS.size:
        raise ImportError(f"{path} has another interface than this package; build and install it again")
    library.dsv4_indexer_ascend_compress.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64,
    ]  # fmt: skip
    return library


def _stream(device: torch.device) -> int:
    return torch.npu.current_stream(device).npu_stream
