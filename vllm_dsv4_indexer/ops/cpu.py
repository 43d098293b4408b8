"""The op on CPUs: gives the tensors' addresses to the native library (csrc/cpu), which runs on
torch's threads.

The library is loaded when the implementation is asked for. It has a C interface, so one binary
serves every Python and every torch from 2.10 on. It has code for three instruction sets, which give
the same bits, and takes the best that the CPU has. The environment variable DSV4_INDEXER_ISA
(avx512, avx2 or generic) names another.
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
from ..contract import GEOMETRIES, INDEXER, RATIO, Extents, Geometry, Layer, Step
from ..errors import NotInstalled, UserError
from .arguments import (
    KV_SCORE_FIELDS,
    LAYER_FIELDS,
    STEP_FIELDS,
    PackedLayer,
    kv_score_fields,
    step_fields,
)
from .library import load_library

ISAS = ("avx512", "avx2", "generic")  # best first
# The first is the op's, the others are in baselines.py.
ALGORITHMS = ("one_pass", "overlay_scan", "scatter_pool")
FLOORS = ("floor", "floor_past_cache")  # csrc/cpu/comparison/floor.cpp
# What the library has: the baselines for the indexer alone.
_FUNCTIONS = [(name, geometry) for name in ("one_pass", *FLOORS) for geometry in GEOMETRIES] + [
    (name, INDEXER) for name in ALGORITHMS[1:]
]
K_FORMATS = {"fp8_pow2": 0, "int8_hadamard": 1, "fp8_ds_mla": 2, "bf16": 3}
_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_cpu.so"
# csrc/cpu/abi.h: struct StepArguments, LayerArguments, KvScore, enum Rule, enum Failure.
STEP = struct.Struct(f"{len(STEP_FIELDS)}q")
LAYER = struct.Struct(f"{len(LAYER_FIELDS) - 1}qd")
KV_SCORE = struct.Struct(f"{len(KV_SCORE_FIELDS)}q")
ROW_RULE, STATE_ONLY = 0, 1
_VIOLATION, _THREADS_FAILED, _NO_MEMORY, _PLAN_DOES_NOT_FIT = -1, -2, -3, -4


class Violation(ctypes.Structure):
    """csrc/cpu/abi.h, `struct Violation`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("code", "token", "request", "position", "needed", "value", "bound")
    ]


class Native(NamedTuple):
    """The library, the instruction set in use, its functions, and torch's parallel_for."""

    library: ctypes.CDLL
    isa: str
    algorithms: dict[tuple[str, Geometry], Callable[..., int]]
    parallel_for: int


def plan(step: Step, extents: Extents, ratio: int = RATIO, rule: int = ROW_RULE) -> Tensor:
    """See `vllm_dsv4_indexer.ops.plan`."""
    made = torch.empty(contract.plan_size(step.positions.shape[0], ratio), dtype=torch.int64)
    violation = Violation()
    windows = native().library.dsv4_indexer_plan(
        STEP.pack(*step_fields(step, extents)),
        ratio,
        rule,
        made.data_ptr(),
        ctypes.byref(violation),
    )
    if windows == _NO_MEMORY:
        raise MemoryError(
            f"no memory for the plan of {step.positions.shape[0]} tokens; nothing was written"
        )
    if windows == _VIOLATION:
        raise contract.violation_error(
            **{field[0]: getattr(violation, field[0]) for field in violation._fields_},
            window=contract.window_of(ratio),
        )
    return made


class Bound:
    """A layer's tensors, ready for the library."""

    def __init__(self, layer: Layer, *, eps: float, k_format: str, algorithm: str = "one_pass"):
        self._layer, self._algorithm = layer, algorithm
        self._arguments = PackedLayer(layer, K_FORMATS[k_format], eps, LAYER)
        geometry = contract.geometry_of(layer.ape, k_format)
        self._run = native().algorithms[algorithm, geometry]
        self._parallel_for = native().parallel_for

    def __call__(self, kv_score: Tensor, plan: Tensor) -> int:
        """Runs the layer; returns the number of entries written."""
        entries = self._run(
            self._arguments.packed(),
            self._parallel_for,
            plan.data_ptr(),
            KV_SCORE.pack(*kv_score_fields(kv_score)),
        )
        if entries >= 0:
            return entries
        if entries == _PLAN_DOES_NOT_FIT:
            layout = (
                contract.PLAN_LAYOUT
                if self._algorithm == "one_pass"
                else contract.STATE_ONLY_LAYOUT
            )
            contract.check_plan_header(plan, kv_score.shape[0], Extents.of(self._layer), layout)
        raise RuntimeError(
            "torch's parallel_for failed: the caches may be half written; see torch's own message"
        )


bind = Bound


@functools.cache
def native() -> Native:
    """The native library, loaded, for this CPU."""
    library = load_library(_LIBRARY, "cpu")
    library.dsv4_indexer_plan.restype = ctypes.c_int64
    library.dsv4_indexer_plan.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    asked = os.environ.get("DSV4_INDEXER_ISA")  # empty counts as unset
    if asked and asked not in ISAS:
        raise UserError(f"DSV4_INDEXER_ISA is {asked!r}; it names one of {', '.join(ISAS)}")
    for isa in [asked] if asked else ISAS:
        found = {(name, g): algorithm_for(library, name, isa, g) for name, g in _FUNCTIONS}
        algorithms = {key: function for key, function in found.items() if function}
        if algorithms.keys() == found.keys():
            return Native(library, isa, algorithms, _torch_parallel_for())
    raise UserError(
        f"DSV4_INDEXER_ISA is {asked!r}, which this CPU or build lacks; unset it for the best one"
    )


def algorithm_for(
    library: ctypes.CDLL, name: str, isa: str, geometry: Geometry = INDEXER
) -> Callable[..., int] | None:
    """The library's function for an algorithm, an instruction set and a compressor; None if the
    library or the CPU lacks it."""
    find = library.dsv4_indexer_run_for
    find.restype = ctypes.c_void_p
    find.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p]
    address = find(name.encode(), *geometry, isa.encode())
    function = ctypes.CFUNCTYPE(
        ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    )
    return function(address) if address else None


def _torch_parallel_for() -> int:
    """The address of `torch_parallel_for`, a function of torch's stable C interface."""
    loaded_already = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    torch_cpu = ctypes.CDLL(str(loaded_already))
    try:
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value or 0
    except AttributeError:
        raise NotInstalled(
            f"torch {torch.__version__} has no torch_parallel_for; use torch 2.10 or later"
        ) from None
