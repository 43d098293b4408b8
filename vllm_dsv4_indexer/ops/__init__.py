"""The ops `dsv4_indexer::plan`, `run` and `compress`: schemas, fake implementations and dispatch.

`plan` runs once a step. It checks all values and decides which windows the step closes and where
their rows come from. `run` runs once a layer, with the step's plan. `compress` is both in one call.

An implementation is a module of this folder with two functions. Their tensors are checked already:

    plan(step, extents) -> Tensor             checks the values; writes nothing but the plan. A
                                              third argument is the ratio, if it is not 4
    bind(layer, eps=..., k_format=...)        returns a function of kv_score and a plan, which runs
                                              the layer and returns how many entries it wrote, or
                                              None if only the device knows

To add one, write the module and its line in `IMPLEMENTATIONS`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contract
from ..contract import RATIO, Call, Extents, Layer, PlanHeader, Requests, Step, plan_size
from ..errors import UserError
from .requests import step_of


class Functions(NamedTuple):
    """The functions of an implementation. The third is for engines whose metadata list requests,
    not tokens."""

    plan: Callable[..., Tensor]
    bind: Callable[..., Callable[[Tensor, Tensor], int | None]]
    plan_requests: Callable[[Requests, int, Extents, int], Tensor] | None = None


class Implementation(NamedTuple):
    """How to load an implementation, its formats, its device types and its ratios. Without device
    types it serves every device, but only by name. The default of a device is the first that names
    it."""

    load: Callable[[], Functions]
    k_formats: tuple[str, ...]
    devices: tuple[str, ...] = ()
    ratios: tuple[int, ...] = (RATIO,)


def _cpu() -> Functions:
    from . import cpu

    cpu.native()  # finds now what is wrong with the library
    return Functions(cpu.plan, cpu.bind)


def _ascend() -> Functions:
    from . import ascend

    ascend.native()
    return Functions(ascend.plan, ascend.bind, ascend.plan_requests)


def _reference() -> Functions:
    from . import reference

    return Functions(reference.plan, reference.bind)


def _overlay_scan() -> Functions:
    from . import baselines

    return Functions(baselines.plan, baselines.overlay_scan)


def _scatter_pool() -> Functions:
    from . import baselines

    return Functions(baselines.plan, baselines.scatter_pool)


IMPLEMENTATIONS = {
    "cpu": Implementation(
        _cpu,
        ("fp8_pow2", "int8_hadamard", "fp8_ds_mla", "bf16"),
        ("cpu",),
        tuple(contract.STATE_PAGES),
    ),
    "ascend": Implementation(_ascend, ("int8_hadamard", "fp8_amax", "bf16"), ("npu",)),
    "reference": Implementation(
        _reference, tuple(contract.K_FORMATS), ratios=tuple(contract.STATE_PAGES)
    ),
    "overlay_scan": Implementation(_overlay_scan, ("fp8_pow2", "int8_hadamard"), ("cpu",)),
    "scatter_pool": Implementation(_scatter_pool, ("fp8_pow2", "int8_hadamard"), ("cpu",)),
}


@dataclass
class Work:
    """What the op has done in this process: the proof that an engine calls it. A call is one layer
    of a step; a plan is one for each kind of compressor."""

    plans: int = 0
    calls: int = 0
    tokens: int = 0  # of all calls
    entries: int = 0
    seconds: float = 0.0  # in plans and calls; on a CPU until the last byte was written
    uncounted: int = 0  # calls whose entries only the device knows
    unsaved: int = 0  # tokens of plans whose state row is not saved; on a CPU
    shared: int = 0  # rows of windows that plans found in another request of the step; on a CPU

    def __str__(self) -> str:
        entries = f"wrote {self.entries} entries in {self.seconds:.4f} s"
        if self.uncounted:
            entries = (
                f"wrote {self.entries} entries, not counting {self.uncounted} calls whose entries "
                "only the device knows (nor any call that a captured graph repeats)"
            )
        return f"{self.plans} plans; {self.calls} calls on {self.tokens} tokens {entries}"


work = Work()

_WRITTEN = {"inner_state_cache": "(a!)", "k_cache": "(b!)", "k_scale_cache": "(c!)?"}


def _schema(tensors: Sequence[str], options: str, result: str) -> str:
    """Of a function of these tensors; only `k_scale_cache` may be left out."""
    arguments = [f"Tensor{_WRITTEN.get(name, '')} {name}" for name in tensors]
    listed = ", ".join(arguments).replace("k_scale_cache", "k_scale_cache=None")
    return f"({listed}, *, {options}) -> {result}"


_OPTIONS = "float eps=1e-6, str k_format='fp8_pow2', str? impl=None"
_RUN = ("kv_score", *Layer._fields[:3], "plan", *Layer._fields[3:])
_EXTENTS = ", ".join(f"SymInt {name}" for name in Extents._fields)
_library = torch.library.Library("dsv4_indexer", "DEF")
_library.define(
    "plan" + _schema(Step._fields, f"{_EXTENTS}, int ratio={RATIO}, str? impl=None", "Tensor")
)
_library.define("run" + _schema(_RUN, _OPTIONS, "()"))
_library.define("compress" + _schema(Call._fields, _OPTIONS, "()"))


def plan(
    positions: Tensor,
    token_to_req: Tensor,
    inner_state_slot_mapping: Tensor,
    inner_state_block_table: Tensor,
    k_slot_mapping: Tensor,
    *,
    state_pages: int,
    state_page: int,
    k_entries: int,
    max_pos: int,
    ratio: int = RATIO,
    impl: str | None = None,
) -> Tensor:
    """Checks a step and decides its windows: once for all layers whose caches have the same pages.

    Compressors of the same ratio share it, whatever their head dimension.

    Args:
        positions: [T] int64, the position of each token in its request.
        token_to_req: [T] int32, each token's row of `inner_state_block_table`.
        inner_state_slot_mapping: [T] int64, the state row of each token, `page * state_page + row`;
            -1, or one in page 0, for none.
        inner_state_block_table: [R, M] int32, the state page of each `state_page` positions of a
            request. Page 0 is the null page. A token that closes a window needs other pages for all
            positions of the window.
        k_slot_mapping: [T] int64, the entry slot of a token that closes a window; -1 for none.
        state_pages: how many pages `inner_state_cache` has.
        state_page: how many tokens a state page has: 2, 4 or 8; with the ratio 128: 4, 8, 16 or 32.
        k_entries: how many entries `k_cache` has.
        max_pos: how many rows `cos_sin_cache` has.
        ratio: positions per entry, 4 or 128.
        impl: see `compress`.

    Returns:
        The plan: one int64 tensor on the same device. `contract.Plan.of` names its sections. It
            copies what it needs, so it stays right when the arguments are overwritten. A graph can
            replay it from a persistent buffer.

    Raises:
        ContractError: see `compress`. Nothing of the step was written.
    """
    return torch.ops.dsv4_indexer.plan(
        positions,
        token_to_req,
        inner_state_slot_mapping,
        inner_state_block_table,
        k_slot_mapping,
        state_pages=state_pages,
        state_page=state_page,
        k_entries=k_entries,
        max_pos=max_pos,
        ratio=ratio,
        impl=impl,
    )


def plan_requests(
    requests: Requests, tokens: int, extents: Extents, k_page: int, *, impl: str | None = None
) -> Tensor:
    """Makes the plan of a step from its requests, for an engine whose metadata do not list tokens.

    The ratio is 4. It is one launch where the implementation has a kernel for it. Elsewhere tensor
    operations list the tokens first.

    Args:
        requests: the requests of the step.
        tokens: T, how many tokens the step has, padding included.
        extents: those of the caches.
        k_page: how many entries a K page has.
        impl: see `compress`.

    Returns:
        The plan: see `plan`.

    Raises:
        ContractError: see `compress`. Nothing of the step was written.
    """
    contract.check_requests(requests, tokens)
    contract.check_extents(extents)
    kernel = _functions(impl, requests.start_pos.device.type).plan_requests
    if kernel is None:
        return plan(
            *step_of(requests, tokens, extents.state_page, k_page), **extents._asdict(), impl=impl
        )
    return _counted_plan(kernel, requests, tokens, extents, k_page)


def run(
    kv_score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_sin_cache: Tensor,
    plan: Tensor,
    inner_state_cache: Tensor,
    k_cache: Tensor,
    k_scale_cache: Tensor | None = None,
    *,
    eps: float = 1e-6,
    k_format: str = "fp8_pow2",
    impl: str | None = None,
) -> None:
    """Runs one layer of a planned step: saves its state rows and writes its K entries.

    Arguments and errors are those of `compress`. An engine that runs a layer step after step uses a
    `BoundLayer`, which checks the layer's tensors once.
    """
    torch.ops.dsv4_indexer.run(
        kv_score,
        ape,
        norm_weight,
        cos_sin_cache,
        plan,
        inner_state_cache,
        k_cache,
        k_scale_cache,
        eps=eps,
        k_format=k_format,
        impl=impl,
    )


class BoundLayer:
    """`run` for one layer. It checks the layer's tensors once, when it is made.

    Arguments and errors are those of `compress`. It holds the tensors, whose shapes must stay what
    they are. If a tensor moves to another address, it is followed.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        eps: float = 1e-6,
        k_format: str = "fp8_pow2",
        impl: str | None = None,
    ):
        self.geometry = contract.check_layer(layer, k_format)
        self._row_width, self._ratio = self.geometry.row_width, self.geometry.ratio
        self.layer, self.extents = layer, Extents.of(layer)
        self.k_format, self.eps, self._impl = k_format, eps, impl
        self._device = layer.ape.device
        self._bound = _functions(impl, self._device.type, k_format, self._ratio).bind(
            layer, eps=eps, k_format=k_format
        )

    def run(self, kv_score: Tensor, plan: Tensor) -> None:
        """Runs the layer.

        Args:
            kv_score: [T, row width] fp32 or bf16, the layer's projection.
            plan: the step's plan, from `plan` with the same `impl` and the layer's ratio.
        """
        if torch.compiler.is_compiling():
            ape, norm_weight, cos_sin, *caches = self.layer
            options = dict(eps=self.eps, k_format=self.k_format, impl=self._impl)
            torch.ops.dsv4_indexer.run(
                kv_score, ape, norm_weight, cos_sin, plan, *caches, **options
            )
        else:
            self._run_eagerly(kv_score, plan)

    def _run_eagerly(self, kv_score: Tensor, plan: Tensor) -> None:
        tokens = kv_score.shape[0] if kv_score.dim() else 0
        # The conditions of the two checks, written out: called for every layer, these would cost as
        # much as all the rest.
        if not (
            kv_score.shape == (tokens, self._row_width)
            and kv_score.dtype in contract.FLOATS
            and kv_score.stride(1) == 1
            and kv_score.device == self._device
        ):
            contract.check_kv_score(kv_score, self._device, self.geometry)
        if not (
            plan.device == self._device
            and plan.dtype is torch.int64
            and plan.shape == (plan_size(tokens, self._ratio),)
            and plan.is_contiguous()
        ):
            contract.check_plan_tensor(plan, tokens, self._device, self._ratio)
        _counted_run(self._bound, kv_score, plan, tokens)


def compress(
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
    k_scale_cache: Tensor | None = None,
    *,
    eps: float = 1e-6,
    k_format: str = "fp8_pow2",
    impl: str | None = None,
) -> None:
    """Saves the state rows of a batch and writes the K entries of the windows that it closes.

    It is `plan` and `run` in one call.

    A token at position p with a state slot saves the row `[kv | gate + ape[p % 4]]`. A token with
    (p + 1) % 4 == 0 and a K slot also writes one entry. The entry pools the rows of positions
    p-7 .. p by a softmax per channel over their gates: front halves of the first four, back halves
    of the last four. RMSNorm, RoPE at position p-3, one rounding to bfloat16 and quantisation
    follow.

    So it is for the ratio 4. With the ratio 128 an entry pools positions p-127 .. p, whose rows
    have no halves, and RoPE is at position p-127. The shape of `ape` says which compressor it is:

    | compressor | D | `ape` | a row: 2 W | `k_format` |
    |---|---|---|---|---|
    | the indexer's | 128 | [4, W = 256] | 512 | `fp8_pow2`, `int8_hadamard`, `fp8_amax` |
    | main, ratio 4 | 512 | [4, W = 1024] | 2048 | `fp8_ds_mla`, `bf16` |
    | main, ratio 128 | 512 | [128, W = 512] | 1024 | `fp8_ds_mla`, `bf16` |

    The main compressors' implementations are `cpu` and `reference`, and for the ratio 4 with `bf16`
    also `ascend`.

    A window's row is the first of these that exists:

    1. the row of the request's own token of this call at that position;
    2. the row of a token of this call, of any request, with the same position and the state slot
       that this request's table gives it (a prefix that is filled in the same call);
    3. the state as it was before the call.

    So a token without a state slot still counts in its own call. If a slot occurs twice, the last
    token wins. A padding row has both slots -1. Its position and request may be anything that no
    window of a later token in this call asks for.

    The caches may be views of one storage with any page stride. Only their pages must not overlap.

    Args:
        kv_score: [T, 2 W] fp32 or bf16, the projection `[kv | gate]`, without the positional bias.
        ape: [ratio, W] fp32, the gate's positional bias.
        norm_weight: [D] fp32 or bf16, the RMSNorm weight.
        cos_sin_cache: [max_pos, 64] fp32, 32 cosines then 32 sines of each position.
        positions: see `plan`.
        token_to_req: see `plan`.
        inner_state_slot_mapping: see `plan`.
        inner_state_block_table: see `plan`.
        inner_state_cache: [pages, state_page, 2 W] fp32 rows; state_page: see `plan`. Read and
            written.
        k_slot_mapping: see `plan`.
        k_cache: written. `fp8_pow2`: uint8 [pages, 64, 132], a page of `stride(0)` bytes with entry
            o's values at o * 128 and its fp32 scale at 8192 + 4 * o. `fp8_amax`: uint8 [pages, bs,
            132], the same with bs entries a page. `int8_hadamard`: int8 [pages, bs, 128].
            `fp8_ds_mla`: uint8 [pages, bs, 584], a page of `stride(0)` bytes with entry o's values
            at o * 576, and at bs * 576 + 8 * o its scales. `bf16`: bfloat16 [pages, bs, 512].
        k_scale_cache: written. [pages, bs] fp32 or fp16 for `int8_hadamard`, None for the others.
        eps: RMSNorm epsilon.
        k_format: `fp8_pow2` (power-of-two scale, e4m3fn), `int8_hadamard` (Hadamard rotation, scale
            amax / 127), `fp8_amax` (Hadamard rotation, scale amax / 448, e4m3fn), `fp8_ds_mla`
            (448 channels e4m3fn with a power-of-two scale for every 64, UE8M0; 64 bf16) or `bf16`
            (as they are).
        impl: the name of an implementation; None for the default of the tensors' device.

    Raises:
        ContractError: (a ValueError) the arguments break the contract; nothing was written.
        UserError: `impl` is unknown, or there is none for the device and the format.
    """
    torch.ops.dsv4_indexer.compress(
        kv_score,
        ape,
        norm_weight,
        cos_sin_cache,
        positions,
        token_to_req,
        inner_state_slot_mapping,
        inner_state_block_table,
        inner_state_cache,
        k_slot_mapping,
        k_cache,
        k_scale_cache,
        eps=eps,
        k_format=k_format,
        impl=impl,
    )


def prepare(impl: str | None, device: str, k_format: str) -> None:
    """Loads an implementation now, so that whatever is missing is known before the first call.

    Args:
        impl: see `compress`.
        device: a device type, such as `cpu`.
        k_format: see `compress`.

    Raises:
        UserError: `impl` is unknown, or there is none for the device and the format, or a setting
            in the environment is wrong.
        NotInstalled: the native library, or something in torch that it needs, is missing.
    """
    _functions(impl, device, k_format)


# ---- the torch ops -------------------------------------------------------------------------------
# torch leaves out the arguments that equal their default, so the defaults are needed here too.


def _plan_op(*step: Tensor, ratio: int = RATIO, impl: str | None = None, **extents: int) -> Tensor:
    contract.check_step(Step(*step))
    contract.check_extents(Extents(**extents), ratio)
    functions = _functions(impl, step[0].device.type, ratio=ratio)
    return _counted_plan(functions.plan, Step(*step), Extents(**extents), *_other(ratio))


def _other(ratio: int) -> tuple[int, ...]:
    """Implementations for the indexer's ratio alone do not take it."""
    return () if ratio == RATIO else (ratio,)


def _run_op(
    kv_score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_sin_cache: Tensor,
    plan: Tensor,
    *caches: Tensor,
    **options: Any,
) -> None:
    BoundLayer(Layer(ape, norm_weight, cos_sin_cache, *caches), **options)._run_eagerly(
        kv_score, plan
    )


def _compress_op(
    *tensors: Tensor, eps: float = 1e-6, k_format: str = "fp8_pow2", impl: str | None = None
) -> None:
    call = Call(*tensors)
    ratio = contract.check_call(call, k_format).ratio
    functions = _functions(impl, call.kv_score.device.type, k_format, ratio)
    made = _counted_plan(functions.plan, call.step, Extents.of(call.layer), *_other(ratio))
    run = functions.bind(call.layer, eps=eps, k_format=k_format)
    _counted_run(run, call.kv_score, made, len(call.kv_score))


def _counted_plan(plan: Callable[..., Tensor], *arguments: Any) -> Tensor:
    start = time.perf_counter()
    made = plan(*arguments)
    work.plans += 1
    work.seconds += time.perf_counter() - start
    # A look at a plan on another device would wait for it; what was made like there has no numbers.
    if made.device.type == "cpu" and (header := PlanHeader.of(made)).saved >= 0:
        work.unsaved += header.tokens - header.saved
        work.shared += header.shared
    return made


def _counted_run(
    run: Callable[[Tensor, Tensor], int | None], kv_score: Tensor, plan: Tensor, tokens: int
) -> None:
    if not tokens:
        return
    start = time.perf_counter()
    entries = run(kv_score, plan)
    work.entries += entries or 0
    work.uncounted += entries is None
    work.calls += 1
    work.tokens += tokens
    work.seconds += time.perf_counter() - start


# The fakes are also what torch calls if only some of the tensors are on the meta device: an error,
# not a call that does nothing.


def _plan_fake(
    *step: Tensor, ratio: int = RATIO, impl: str | None = None, **extents: int
) -> Tensor:
    contract.check_step(Step(*step))
    contract.check_extents(Extents(**extents), ratio)
    return step[0].new_empty(plan_size(step[0].shape[0], ratio))


def _run_fake(
    kv_score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_sin_cache: Tensor,
    plan: Tensor,
    *caches: Tensor,
    k_format: str = "fp8_pow2",
    **_: Any,
) -> None:
    geometry = contract.check_layer(Layer(ape, norm_weight, cos_sin_cache, *caches), k_format)
    contract.check_kv_score(kv_score, ape.device, geometry)
    contract.check_plan_tensor(plan, kv_score.shape[0], ape.device, geometry.ratio)


def _compress_fake(*tensors: Tensor, k_format: str = "fp8_pow2", **_: Any) -> None:
    contract.check_call(Call(*tensors), k_format)


@functools.cache
def _functions(
    name: str | None, device: str, k_format: str | None = None, ratio: int = RATIO
) -> Functions:
    """`k_format` None: any of the implementation's."""
    usable = [
        n
        for n, i in IMPLEMENTATIONS.items()
        if (not i.devices or device in i.devices)
        and (k_format is None or k_format in i.k_formats)
        and ratio in i.ratios
    ]
    if name is None:
        name = next((n for n in usable if IMPLEMENTATIONS[n].devices), None)
    if name not in usable:
        what = "there is no default impl" if name is None else f"impl {name!r} is not one"
        serves = f"device {device!r}" + (f" and k_format {k_format!r}" if k_format else "")
        geometry = contract.geometry_for(k_format, ratio)
        serves += f" ({geometry})" if geometry != contract.INDEXER else ""
        raise UserError(f"{what} for {serves}; available by name: {', '.join(usable)}")
    return IMPLEMENTATIONS[name].load()


# One Python kernel for every device: it costs about 3 us a call more than a C++ one, and
# torch.library.custom_op 60.
for _name, _op, _fake in (
    ("plan", _plan_op, _plan_fake),
    ("run", _run_op, _run_fake),
    ("compress", _compress_op, _compress_fake),
):
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsv4_indexer::{_name}", _fake, lib=_library)
