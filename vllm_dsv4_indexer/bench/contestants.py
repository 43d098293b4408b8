"""Who is measured: the op and its algorithms, vLLM's own code for the same step, and the floor.

Each is a function without arguments over the same inputs, which writes to the same caches.

    cpu, reference            `ops.compress(..., impl=NAME)`: plan and run in one call. Of a step of
                              several layers: a plan, and a `BoundLayer.run` for each of them, as an
                              engine calls them
    layer                     a `BoundLayer.run` with the step's plan: everything that a layer costs
                              an engine
    plan                      `ops.plan`: what it costs once a step
    tail, tail_first          `ops.compress` with tail-only saving, in a layer that finds the slots
                              to save worked out, and in the step's first, which works them out
    vllm                      all that vLLM 0.32's CPU engine does in each layer after the
                              projection: widen kv_score, save the rows, find the eight slots of
                              every token, store the entries
    one_pass, overlay_scan,   the native code of impl="cpu" and of the baselines alone, on a plan
    scatter_pool
    vllm_ops                  vLLM's two C++ ops alone
    floor, floor_past_cache   csrc/cpu/floor.cpp: move the bytes that everyone must move, with
                              ordinary stores, and with stores that go around the caches

With the projection in front, cpu and vllm project first, each in its own way, and *_projection is
that step alone.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..contract import RATIO, WINDOW, Call, Extents
from ..ops import baselines, cpu, projection
from ..ops.arguments import kv_score_fields, layer_fields
from .cases import Case, make_projection, with_tail_slots

OPS = ("cpu", "reference")
PLANNED = ("layer", "plan")
TAILS = ("tail", "tail_first")  # they leave state rows out
VLLM = ("vllm", "vllm_ops")
WHOLE = ("cpu", "vllm")  # who can project first, and run a step of several layers
_VLLM_VERSION = "0.32.0"  # whose private functions `_vllm` calls
_EPS, _K_FORMAT = 1e-6, "fp8_pow2"
Run = Callable[[], object]


def available() -> list[str]:
    """The names that can be measured here: vLLM only where it is the version that we know."""
    ours = [*OPS, *PLANNED, *TAILS, *cpu.ALGORITHMS]
    return [*ours, *VLLM * (vllm_version() or "").startswith(_VLLM_VERSION)]


def vllm_version() -> str | None:
    """The version of the vLLM in this environment, None if there is none."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def contestants(names: list[str], call: Call) -> dict[str, Run]:
    """The functions of `names` and the floors."""
    runs = {name: functools.partial(ops.compress, *call, eps=_EPS, impl=name) for name in OPS}
    made, bound = _plan(call), ops.BoundLayer(call.layer, eps=_EPS)
    runs |= {
        "plan": functools.partial(_plan, call),
        "layer": functools.partial(bound.run, call.kv_score, made),
    }
    runs |= {name: _native(name, call) for name in (*cpu.ALGORITHMS, *cpu.FLOORS)}
    runs["tail"] = functools.partial(ops.compress, *with_tail_slots(call), eps=_EPS, impl="cpu")
    runs["tail_first"] = lambda: ops.compress(*with_tail_slots(call), eps=_EPS, impl="cpu")
    if not set(VLLM).isdisjoint(names):
        runs |= _vllm(lambda: call.kv_score, call)
    return {name: runs[name] for name in (*names, *cpu.FLOORS)}


def step(names: list[str], calls: list[Call]) -> dict[str, Run]:
    """What `contestants` returns, for a step of several layers; `names` are of WHOLE."""
    bounds = [ops.BoundLayer(call.layer, eps=_EPS) for call in calls]

    def ours() -> None:
        made = _plan(calls[0])
        for bound, call in zip(bounds, calls):
            bound.run(call.kv_score, made)

    def each(name: str) -> Run:
        layers = [contestants([name], call)[name] for call in calls]
        return lambda: [run() for run in layers]

    runs = {"cpu": ours} | {
        name: each(name) for name in ("vllm", *cpu.FLOORS) if name in (*names, *cpu.FLOORS)
    }
    return {name: runs[name] for name in (*names, *cpu.FLOORS)}


def projected(names: list[str], case: Case, call: Call) -> dict[str, Run]:
    """What `contestants` returns, for calls that project first; `names` are of WHOLE."""
    x, weight = make_projection(case)
    projections = {
        "cpu": functools.partial(projection.project, x, projection.prepare_weight(weight))
    }
    runs = {
        "cpu": lambda: ops.compress(
            *call._replace(kv_score=projections["cpu"]()), eps=_EPS, impl="cpu"
        )
    }
    if "vllm" in names:
        projections["vllm"] = _vllm_projection(x, weight)
        runs["vllm"] = _vllm(projections["vllm"], call)["vllm"]
    alone = {f"{name}_projection": projections[name] for name in names}
    return {name: runs[name] for name in names} | alone | contestants([], call)


def _vllm_projection(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """What vLLM's linear layer does with a bfloat16 weight on this CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda: layer.cpu_linear(x, layer.weight, None)


def _plan(call: Call) -> Tensor:
    return ops.plan(*call.step, **Extents.of(call.layer)._asdict())


def _native(name: str, call: Call) -> Run:
    """The library's function alone, on a plan that was made before."""
    plan = baselines.plan if name in ("overlay_scan", "scatter_pool") else cpu.plan
    made, native = plan(call.step, Extents.of(call.layer)), cpu.native()
    layer = cpu.LAYER.pack(*layer_fields(call.layer, cpu.K_FORMATS[_K_FORMAT], _EPS))
    kv_score = cpu.KV_SCORE.pack(*kv_score_fields(call.kv_score))
    run = functools.partial(
        native.algorithms[name], layer, native.parallel_for, made.data_ptr(), kv_score
    )
    run.tensors = call, made  # the arguments have their addresses alone
    return run


def _vllm(project: Callable[[], Tensor], call: Call) -> dict[str, Run]:
    from vllm._custom_ops import compress_norm_rope_store_indexer_cpu, save_partial_states_cpu
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    def widened() -> tuple[Tensor, Tensor]:
        return project().float().chunk(2, dim=-1)

    def gather_slots() -> Tensor:
        window = call.positions.unsqueeze(-1) - WINDOW + 1 + torch.arange(WINDOW)
        return map_local_to_global_slots_cpu(
            window, call.token_to_req, call.inner_state_block_table, call.inner_state_cache.shape[1]
        )

    def save(kv: Tensor, score: Tensor) -> None:
        save_partial_states_cpu(
            kv,
            score,
            call.ape,
            call.positions,
            call.inner_state_cache,
            call.inner_state_slot_mapping,
        )

    def pool_and_store(gathered: Tensor) -> None:
        compress_norm_rope_store_indexer_cpu(
            call.inner_state_cache,
            gathered,
            call.positions,
            call.k_slot_mapping,
            call.norm_weight,
            _EPS,
            call.cos_sin_cache,
            call.k_cache.view(call.k_cache.shape[0], -1),
            call.k_cache.shape[1],
            RATIO,
        )

    kv, score, gathered = *widened(), gather_slots()
    return {
        "vllm": lambda: (save(*widened()), pool_and_store(gather_slots())),
        "vllm_ops": lambda: (save(kv, score), pool_and_store(gathered)),
    }
