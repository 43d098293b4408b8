"""`compress` on CPUs: hands the tensors' addresses to the native library (csrc/cpu), on torch's own threads.

The library is loaded on first use, or by `ops.prepare`. It has a C interface, so one binary serves every
Python and every torch from 2.10.
It is written for three instruction sets with bitwise equal results, and takes the best that the CPU has; the
environment variable DSV4_INDEXER_ISA (avx512, avx2 or generic) names another.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import contract
from .arguments import field_values
from .library import library_path

ISAS = ("avx512", "avx2", "generic")  # best first
ALGORITHMS = ("one_pass", "overlay_scan", "scatter_pool")  # the first is `compress`, the others are in baselines.py
_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_cpu.so"
ARGUMENTS = struct.Struct("34qd")  # csrc/cpu/abi.h, `struct Arguments`
_K_FORMATS = {"fp8_pow2": 0, "int8_hadamard": 1}


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
    entries = native().compressors[algorithm](arguments, ctypes.byref(violation))
    if violation.code:
        raise contract.violation_error(**{name: getattr(violation, name) for name, _ in violation._fields_})
    if entries < 0:
        raise RuntimeError("torch's parallel_for failed: the caches may be half written; see torch's own message")
    return entries


def arguments_of(*tensors: Tensor | None, eps: float, k_format: str) -> bytes:
    """The arguments of `compress` as the library takes them: addresses, which do not keep the tensors alive."""
    if k_format not in _K_FORMATS:
        raise contract.ContractError(f"k_format {k_format!r} has no native code for CPUs; use impl 'reference'")
    return ARGUMENTS.pack(native().parallel_for, *field_values(tensors, _K_FORMATS[k_format], eps))


@functools.cache
def native() -> Native:
    """The native library, loaded, for this CPU."""
    path = library_path(_LIBRARY)
    library = ctypes.CDLL(str(path))
    if library.dsv4_indexer_arguments_size() != ARGUMENTS.size:
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


def prepare() -> None:
    """Load the native library, or say what is missing."""
    native()
