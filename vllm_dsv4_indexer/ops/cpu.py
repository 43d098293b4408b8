"""`compress` on CPUs: hands the tensors' addresses to the native library (csrc/cpu), on torch's own threads.

The library is loaded with this module, which is imported on first use. It has a C interface, so one binary serves every
Python and every torch from 2.10.
It is written for three instruction sets with bitwise equal results, and takes the best that the CPU has; the
environment variable DSV4_INDEXER_ISA (avx512, avx2 or generic) names another.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import contract
from .library import library_path

ISAS = ("avx512", "avx2", "generic")  # best first
ALGORITHMS = ("one_pass", "overlay_scan", "scatter_pool")  # the first is `compress`, the others are in baselines.py
_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_cpu.so"
_K_FORMATS = {"fp8_pow2": 0, "int8_hadamard": 1}


class Arguments(ctypes.Structure):
    """csrc/cpu/abi.h, `struct Arguments`, which explains the fields; all but eps are 8-byte integers or addresses."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "parallel_for tokens "
            "kv_score kv_score_stride kv_score_is_bf16 ape norm_weight norm_weight_is_bf16 "
            "cos_sin cos_sin_stride cos_sin_rows "
            "positions token_to_req state_slots block_table block_table_stride requests table_columns "
            "state state_page_stride state_row_stride state_pages state_page "
            "k_slots k_cache k_page_stride k_entry_stride k_pages k_page "
            "k_scale k_scale_page_stride k_scale_entry_stride k_scale_is_fp16 k_format"
        ).split()
    ] + [("eps", ctypes.c_double)]


class Violation(ctypes.Structure):
    """csrc/cpu/abi.h, `struct Violation`."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("code", "token", "request", "position", "needed", "value", "bound")
    ]


class Native(NamedTuple):
    """The library, the instruction set in use, its compressors by algorithm, and torch's parallel_for."""

    library: ctypes.CDLL
    isa: str
    compressors: dict[str, Callable[..., int]]
    parallel_for: int


def compress(*tensors: Tensor | None, eps: float, k_format: str, algorithm: str = "one_pass") -> int:
    """See `vllm_dsv4_indexer.ops.compress`; returns the number of entries written."""
    arguments = arguments_of(*tensors, eps=eps, k_format=k_format)
    violation = Violation()
    entries = native().compressors[algorithm](ctypes.byref(arguments), ctypes.byref(violation))
    if violation.code:
        raise contract.violation_error(**{name: getattr(violation, name) for name, _ in violation._fields_})
    if entries < 0:
        raise RuntimeError("torch's parallel_for failed: the caches may be half written; see torch's own message")
    return entries


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
        raise contract.ContractError(f"k_format {k_format!r} has no native code for CPUs; use impl 'reference'")
    scale = (
        (0, 0, 0, 0)
        if k_scale_cache is None
        else (k_scale_cache.data_ptr(), *k_scale_cache.stride(), k_scale_cache.dtype is torch.float16)
    )
    return Arguments(
        native().parallel_for, kv_score.shape[0],
        kv_score.data_ptr(), kv_score.stride(0), kv_score.dtype is torch.bfloat16,
        ape.data_ptr(), norm_weight.data_ptr(), norm_weight.dtype is torch.bfloat16,
        cos_sin_cache.data_ptr(), cos_sin_cache.stride(0), cos_sin_cache.shape[0],
        positions.data_ptr(), token_to_req.data_ptr(), inner_state_slot_mapping.data_ptr(),
        inner_state_block_table.data_ptr(), inner_state_block_table.stride(0), *inner_state_block_table.shape,
        inner_state_cache.data_ptr(), *inner_state_cache.stride()[:2], *inner_state_cache.shape[:2],
        k_slot_mapping.data_ptr(), k_cache.data_ptr(), *k_cache.stride()[:2], *k_cache.shape[:2],
        *scale, _K_FORMATS[k_format], eps,
    )  # fmt: skip


@functools.cache
def native() -> Native:
    """The native library, loaded, for this CPU."""
    path = library_path(_LIBRARY)
    library = ctypes.CDLL(str(path))
    if library.dsv4_indexer_arguments_size() != ctypes.sizeof(Arguments):
        raise ImportError(f"{path} has another interface than this package; build and install it again")
    asked = os.environ.get("DSV4_INDEXER_ISA")  # empty counts as unset
    if asked and asked not in ISAS:
        raise ValueError(f"DSV4_INDEXER_ISA is {asked!r}; it names one of {', '.join(ISAS)}")
    for isa in [asked] if asked else ISAS:
        compressors = {name: _compressor(library, name, isa) for name in ALGORITHMS}
        if all(compressors.values()):
            return Native(library, isa, compressors, _torch_parallel_for())
    raise ValueError(f"DSV4_INDEXER_ISA is {asked!r}, which this CPU or build lacks; unset it for the best one")


def _compressor(library: ctypes.CDLL, algorithm: str, isa: str):
    library.dsv4_indexer_compress_for.restype = ctypes.c_void_p
    address = library.dsv4_indexer_compress_for(algorithm.encode(), isa.encode())
    return address and ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)(address)


def _torch_parallel_for() -> int:
    """The address of `torch_parallel_for`, a function of torch's stable C interface."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded already
    try:
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value
    except AttributeError:
        raise ImportError(f"torch {torch.__version__} has no torch_parallel_for; use torch 2.10 or later") from None


native()
