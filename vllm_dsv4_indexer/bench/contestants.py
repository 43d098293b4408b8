"""Who is measured: the op and its algorithms, vLLM's own code for the same step, and the floor.

Each is a function without arguments over the same inputs, which writes to the same caches.

    cpu, reference            `ops.compress(..., impl=NAME)`: everything that a call costs an engine
    tail, tail_first          the same for impl="cpu" with tail-only saving: in a layer that finds the slots to save
                              worked out, and in the step's first, which works them out
    vllm                      all that vLLM 0.32's CPU engine does after the projection: widen kv_score, save the rows,
                              find the eight slots of every token, store the entries
    one_pass, overlay_scan,   the native code of impl="cpu" and of the baselines alone, checks of values included
    scatter_pool
    vllm_ops                  vLLM's two C++ ops alone
    floor, floor_past_cache   csrc/cpu/floor.cpp: move the bytes that everyone must move, with ordinary stores, and with
                              stores that go around the caches

With the projection in front, cpu and vllm project first, each in its own way, and *_projection is that step alone.
"""

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..contract import RATIO, WINDOW
from ..ops import cpu, projection
from .cases import Case, make_projection, with_tail_slots

OPS = ("cpu", "reference")
TAILS = ("tail", "tail_first")  # they leave state rows out
VLLM = ("vllm", "vllm_ops")
PROJECTED = ("cpu", "vllm")  # who can project first
FLOORS = {"floor": False, "floor_past_cache": True}
_VLLM_VERSION = "0.32.0"  # whose private functions `_vllm` calls
_EPS, _K_FORMAT = 1e-6, "fp8_pow2"


def available() -> list[str]:
    """The names that can be measured here: vLLM only where it is the version that we know."""
    return [*OPS, *TAILS, *cpu.ALGORITHMS, *VLLM * (vllm_version() or "").startswith(_VLLM_VERSION)]


def vllm_version() -> str | None:
    """The version of the vLLM in this environment, None if there is none."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def contestants(names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """The functions of `names` and the floors. `inputs` are the first eleven arguments of `compress`."""
    runs = {name: functools.partial(ops.compress, *inputs, eps=_EPS, impl=name) for name in OPS} | _native(inputs)
    runs["tail"] = functools.partial(ops.compress, *with_tail_slots(inputs), eps=_EPS, impl="cpu")
    runs["tail_first"] = lambda: ops.compress(*with_tail_slots(inputs), eps=_EPS, impl="cpu")
    if not set(VLLM).isdisjoint(names):
        runs |= _vllm(lambda: inputs[0], *inputs[1:])
    return {name: runs[name] for name in (*names, *FLOORS)}


def projected(names: list[str], case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """What `contestants` returns, for calls that project first; `names` are of "cpu" and "vllm"."""
    x, weight = make_projection(case)
    projections = {"cpu": functools.partial(projection.project, x, projection.prepare_weight(weight))}
    runs = {"cpu": lambda: ops.compress(projections["cpu"](), *inputs[1:], eps=_EPS, impl="cpu")}
    if "vllm" in names:
        projections["vllm"] = _vllm_projection(x, weight)
        runs["vllm"] = _vllm(projections["vllm"], *inputs[1:])["vllm"]
    alone = {f"{name}_projection": projections[name] for name in names}
    return {name: runs[name] for name in names} | alone | contestants([], inputs)


def _vllm_projection(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """What vLLM's linear layer does with a bfloat16 weight on this CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda: layer.cpu_linear(x, layer.weight, None)


def _native(inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    native = cpu.native()
    arguments = cpu.arguments_of(*inputs, None, eps=_EPS, k_format=_K_FORMAT)
    violation = ctypes.byref(cpu.Violation())
    move = getattr(native.library, f"dsv4_indexer_floor_{native.isa}")
    move.argtypes, move.restype = (ctypes.c_void_p, ctypes.c_int64), None
    runs = {name: functools.partial(run, arguments, violation) for name, run in native.compressors.items()}
    runs |= {name: functools.partial(move, arguments, past_cache) for name, past_cache in FLOORS.items()}
    for run in runs.values():
        run.inputs = inputs  # the arguments have their addresses alone
    return runs


def _vllm(
    project, ape, norm_weight, cos_sin_cache, positions, token_to_req, slots, block_table, state, k_slots, k_cache
) -> dict[str, Callable[[], object]]:
    from vllm._custom_ops import compress_norm_rope_store_indexer_cpu, save_partial_states_cpu
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    def widened() -> tuple[Tensor, Tensor]:
        return project().float().chunk(2, dim=-1)

    def gather_slots() -> Tensor:
        window = positions.unsqueeze(-1) - WINDOW + 1 + torch.arange(WINDOW)
        return map_local_to_global_slots_cpu(window, token_to_req, block_table, state.shape[1])

    def save(kv: Tensor, score: Tensor) -> None:
        save_partial_states_cpu(kv, score, ape, positions, state, slots)

    def pool_and_store(gathered: Tensor) -> None:
        compress_norm_rope_store_indexer_cpu(
            state, gathered, positions, k_slots, norm_weight, _EPS, cos_sin_cache,
            k_cache.view(k_cache.shape[0], -1), k_cache.shape[1], RATIO,
        )  # fmt: skip

    kv, score, gathered = *widened(), gather_slots()
    return {
        "vllm": lambda: (save(*widened()), pool_and_store(gather_slots())),
        "vllm_ops": lambda: (save(kv, score), pool_and_store(gathered)),
    }
