"""Who is measured: the op and its algorithms, vLLM's own code for the same step, and the floor.

A contestant is a function without arguments. All of a case have the same inputs and write to the
same caches.

    ours                      everything of ours from Python: a plan, and a run of each layer
    layer, plan               its two halves: `BoundLayer.run` with the step's plan, which is what
                              a layer costs an engine; `ops.plan`, which it costs once a step
    reference                 the same as ours, by the reference
    readable                  ours with state_save `readable`: rows that nobody reads later are left
                              out
    checked                   the same as ours, in checked mode (ops/invariants.py)
    one_pass, overlay_scan,   the native code of an algorithm alone, on a plan: ours, and the two
    scatter_pool              that it replaces (ops/baselines.py)
    vllm                      all that vLLM 0.32's CPU engine does in a layer after the projection:
                              widen kv_score, save the rows, find the eight slots of every token,
                              store the entries
    vllm_ops                  vLLM's two C++ ops alone
    floor, floor_past_cache   csrc/cpu/floor.cpp: move the bytes that everyone must move, with
                              ordinary stores, and with stores that go around the caches

With the projection in front, ours and vllm project first, each in its own way, and *_projection is
that part alone.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..contract import GEOMETRIES, INDEXER, Call, Extents, Geometry
from ..engines.versions import VLLM_CPU
from ..ops import baselines, cpu, projection
from ..ops.arguments import kv_score_fields, layer_fields
from ..ops.invariants import Ledger, Scheduled, check_step, check_values
from .cases import Case, make_projection, with_null_pages

OURS = ("ours", "reference", "layer", "plan", "readable", "checked", *cpu.ALGORITHMS)
VLLM = ("vllm", "vllm_ops")
WHOLE = ("ours", "vllm")  # who can project first, and run a step of several layers
STEPS = (*WHOLE, "checked")  # who can do the latter
# Who is there for the main compressors too.
EVERY_COMPRESSOR = ("ours", "reference", "layer", "plan", "checked", "one_pass", *VLLM)
_EPS = 1e-6
Contestant = Callable[[], object]


def available() -> list[str]:
    """The names that can be measured here: vLLM only where it is the version that we know."""
    known = (vllm_version() or "").split("+")[0] == VLLM_CPU  # `_vllm` calls its private functions
    return [*OURS, *VLLM * known]


def vllm_version() -> str | None:
    """The version of the vLLM in this environment, None if there is none."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def contestants(names: Sequence[str], calls: Sequence[Call]) -> dict[str, Contestant]:
    """Those of `names` and the floors, for a step with a call for each layer. With several layers
    `names` are of STEPS."""
    return {name: _make(name, calls) for name in (*names, *cpu.FLOORS)}


def projected(names: Sequence[str], case: Case, call: Call) -> dict[str, Contestant]:
    """The same for a call that projects first; `names` are of WHOLE."""
    x, weight = make_projection(case)
    made: dict[str, Contestant] = {}
    for name in names:
        project = _our_projection(x, weight) if name == "ours" else _vllm_projection(x, weight)
        made[name] = _projecting(name, project, call)
        made[f"{name}_projection"] = project
    return made | contestants([], [call])


def _projecting(name: str, project: Callable[[], Tensor], call: Call) -> Contestant:
    if name == "ours":
        return _ours(lambda: call._replace(kv_score=project()), [call])
    return _vllm(project, call)[name]


def _make(name: str, calls: Sequence[Call]) -> Contestant:
    if name in ("ours", "reference"):
        return _ours(lambda: calls[0], calls, impl="cpu" if name == "ours" else name)
    if name == "checked":
        return _checked(calls)
    layers = [_of_one_layer(name, call) for call in calls]
    return layers[0] if len(layers) == 1 else lambda: [layer() for layer in layers]


def _of_one_layer(name: str, call: Call) -> Contestant:
    match name:
        case "layer":
            return functools.partial(_bound(call).run, call.kv_score, _plan(call))
        case "plan":
            return functools.partial(_plan, call)
        case "readable":
            readable = with_null_pages(call)
            return _ours(lambda: readable, [readable])
        case "vllm" | "vllm_ops":
            return _vllm(lambda: call.kv_score, call)[name]
        case _:
            return _native(name, call)


def _ours(step: Callable[[], Call], layers: Sequence[Call], impl: str = "cpu") -> Contestant:
    """A plan of the call that `step` returns, and with it a run of each layer on that call's
    kv_score."""
    bound = [_bound(call, impl) for call in layers]

    def run() -> None:
        call = step()
        plan = _plan(call, impl)
        for layer in bound:
            layer.run(call.kv_score, plan)

    return run


def geometry_of(call: Call) -> Geometry:
    return next(g for g in GEOMETRIES if call.ape.shape == (g.ratio, g.kv_width))


def _k_format(call: Call) -> str:
    """As cases.make_call has it."""
    return GEOMETRIES[geometry_of(call)][0]


def _bound(call: Call, impl: str | None = None) -> ops.BoundLayer:
    return ops.BoundLayer(call.layer, eps=_EPS, k_format=_k_format(call), impl=impl)


def _checked(layers: Sequence[Call]) -> Contestant:
    bound = [_bound(call, "cpu") for call in layers]
    call = layers[0]
    scheduled, ledger = _scheduled(call), _filled(call)

    def run() -> None:
        plan = _plan(call, "cpu")
        check_step(scheduled, ledger)
        ledger.save(call.inner_state_slot_mapping, call.positions)
        for layer in bound:
            check_values(scheduled, call.kv_score)
            layer.run(call.kv_score, plan)

    return run


def _scheduled(call: Call) -> Scheduled:
    """With the block table of the K cache that the call's slots come from."""
    ratio, k_page = geometry_of(call).ratio, call.k_cache.shape[1]
    closing = call.k_slot_mapping >= 0
    column = call.positions // ratio // k_page
    table = torch.zeros(len(call.inner_state_block_table), int(column.max()) + 1, dtype=torch.int32)
    pages = call.k_slot_mapping[closing] // k_page
    table[call.token_to_req[closing].long(), column[closing]] = pages.int()
    return Scheduled(call.step, len(call.positions), table, k_page, ratio)


def _filled(call: Call) -> Ledger:
    """As if earlier steps had saved every row that has a page."""
    ledger = Ledger(Extents.of(call.layer))
    page, table = ledger.extents.state_page, call.inner_state_block_table
    request, column = table.nonzero().unbind(1)
    rows = column[:, None] * page + torch.arange(page)
    ledger.positions.view(-1, page)[table[request, column].long()] = rows
    return ledger


def _plan(call: Call, impl: str | None = None) -> Tensor:
    extents, ratio = Extents.of(call.layer)._asdict(), geometry_of(call).ratio
    return ops.plan(*call.step, **extents, ratio=ratio, impl=impl)


class _Native(functools.partial[int]):
    """The library's function alone. Its arguments are addresses, so the tensors are held here."""

    tensors: tuple[Call, Tensor]


def _native(name: str, call: Call) -> Contestant:
    """An algorithm or a floor on a plan that was made before."""
    make = baselines.plan if name in ("overlay_scan", "scatter_pool") else cpu.plan
    geometry, native = geometry_of(call), cpu.native()
    plan = make(call.step, Extents.of(call.layer), geometry.ratio)
    layer = cpu.LAYER.pack(*layer_fields(call.layer, cpu.K_FORMATS[_k_format(call)], _EPS))
    kv_score = cpu.KV_SCORE.pack(*kv_score_fields(call.kv_score))
    run = _Native(
        native.algorithms[name, geometry], layer, native.parallel_for, plan.data_ptr(), kv_score
    )
    run.tensors = call, plan
    return run


def _our_projection(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return functools.partial(projection.project, x, projection.prepare_weight(weight))


def _vllm_projection(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """What vLLM's linear layer does with a bfloat16 weight on this CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    layer: Any = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda: layer.cpu_linear(x, layer.weight, None)


def _vllm(project: Callable[[], Tensor], call: Call) -> dict[str, Contestant]:
    from vllm import _custom_ops as vllm_ops
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    geometry = geometry_of(call)
    store = (
        vllm_ops.compress_norm_rope_store_indexer_cpu
        if geometry == INDEXER
        else vllm_ops.compress_norm_rope_store_cpu
    )

    def widened() -> tuple[Tensor, Tensor]:
        kv, score = project().float().chunk(2, dim=-1)
        return kv, score

    def gather_slots() -> Tensor:
        first = call.positions.unsqueeze(-1) - geometry.window + 1
        window = first + torch.arange(geometry.window)
        return map_local_to_global_slots_cpu(
            window, call.token_to_req, call.inner_state_block_table, call.inner_state_cache.shape[1]
        )

    def save(kv: Tensor, score: Tensor) -> None:
        vllm_ops.save_partial_states_cpu(
            kv,
            score,
            call.ape,
            call.positions,
            call.inner_state_cache,
            call.inner_state_slot_mapping,
        )

    def pool_and_store(gathered: Tensor) -> None:
        store(
            call.inner_state_cache,
            gathered,
            call.positions,
            call.k_slot_mapping,
            call.norm_weight,
            _EPS,
            call.cos_sin_cache,
            call.k_cache.view(call.k_cache.shape[0], -1),
            call.k_cache.shape[1],
            geometry.ratio,
        )

    def whole() -> None:
        save(*widened())
        pool_and_store(gather_slots())

    kv, score, gathered = *widened(), gather_slots()

    def ops_alone() -> None:
        save(kv, score)
        pool_and_store(gathered)

    return {"vllm": whole, "vllm_ops": ops_alone}
