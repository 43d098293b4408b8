"""Ways in which an indexer compressor can be wrong: each a `compress` with one fault planted."""

from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch

from vllm_dsv4_indexer import contract
from vllm_dsv4_indexer.contract import Call, Extents, row_source
from vllm_dsv4_indexer.ops import Functions, baselines, cpu, reference

HALF = 128  # channels
Compress = Callable[..., int]  # of a Call; returns the number of entries written
FAULTS: dict[str, Compress] = {}
REFERENCE = Functions(reference.plan, reference.bind)
SCATTER_POOL = Functions(baselines.plan, baselines.scatter_pool)


def compress(call: Call, functions: Functions = Functions(cpu.plan, cpu.bind), **options) -> int:
    """The right one."""
    plan = functions.plan(call.step, Extents.of(call.layer))
    return functions.bind(call.layer, **options)(call.kv_score, plan)


def spoils_arguments(name: str, *functions: Functions):
    """Registers a fault: a function that changes the arguments before a right implementation takes
    them."""

    def register(spoil: Callable[[SimpleNamespace], None]) -> None:
        def wrong(call: Call, **options) -> int:
            arguments = SimpleNamespace(**call._asdict())
            spoil(arguments)
            return compress(Call(**vars(arguments)), *functions, **options)

        FAULTS[name] = wrong

    return register


def spoils_reference(name: str, part: str, **others):
    """Registers a fault: a wrong value or function in the place of `part` of the reference, whose
    own it is given.

    others: what stands in the place of further parts."""

    def register(spoil: Callable) -> None:
        parts = others | {part: spoil(getattr(reference, part))}

        def wrong(call: Call, **options) -> int:
            with mock.patch.multiple(reference, **parts):
                return compress(call, REFERENCE, **options)

        FAULTS[name] = wrong

    return register


@spoils_arguments("no positional bias")
def _(a):
    a.ape = torch.zeros_like(a.ape)


@spoils_arguments("previous and current halves swapped")
def _(a):
    a.kv_score = a.kv_score.unflatten(1, (2, 2, HALF)).flip(2).flatten(1)
    a.ape = a.ape.unflatten(1, (2, HALF)).flip(1).flatten(1)


# No slot counts as unique, so that the plan says of every row where it comes from.
@spoils_reference("window one row too early", "_windows", _unique=lambda slots: False)
def _(windows):
    def early(token, step, window):
        right = windows(token, step, window)
        q = right.q - 1
        u = token[:, None] + q - step.positions[token, None]
        held = u.clamp(min=0)
        own = (
            (u >= 0)
            & (step.positions[held] == q)
            & (step.token_to_req[held] == step.token_to_req[token, None])
        )
        return right._replace(q=q, u=held, own=own)

    return early


@spoils_reference("rows of other requests from before the call", "_sources")
def _(sources):
    def old(windows, step, page):
        right = sources(windows, step, page)
        others = windows.history & (right >= 0)
        slots = step.inner_state_slot_mapping[right.clamp(min=0)]
        return torch.where(others, row_source(slots), right)

    return old


@spoils_arguments("RoPE at the window's last position")
def _(a):
    a.cos_sin_cache = a.cos_sin_cache.roll(-3, 0)


@spoils_arguments("stale state at a chunk border")
def _(a):
    four_later = a.token_to_req.roll(-4)
    four_later[-4:] = -1
    a.inner_state_slot_mapping = a.inner_state_slot_mapping.masked_fill(
        four_later != a.token_to_req, -1
    )


@spoils_arguments("a missing state row under scatter-first", SCATTER_POOL)
def _(a):
    a.inner_state_slot_mapping = a.inner_state_slot_mapping.masked_fill(a.positions % 4 == 3, -1)


@spoils_reference("scale's exponent without the carry", "_store_fp8_pow2")
def _(store):
    def without_carry(x, slots, k_cache):
        carries = (reference._amax(x, contract.AMAX_MIN).view(torch.int32) & 0x7FFFFF) > 0x600000
        # The same codes, with half the scale.
        store(x * torch.where(carries, 0.5, 1.0)[:, None], slots, k_cache)

    return without_carry


@spoils_arguments("K slot off by one")
def _(a):
    last = a.k_cache.shape[0] * a.k_cache.shape[1] - 1
    a.k_slot_mapping = torch.where(a.k_slot_mapping < 0, -1, (a.k_slot_mapping + 1).clamp(max=last))


@spoils_arguments("previous half ignored")
def _(a):
    a.ape = a.ape.clone()
    a.ape[:, :HALF] = -1e30


@spoils_arguments("state of another request")
def _(a):
    others = a.inner_state_block_table.clone()
    requests = int(a.token_to_req.max()) + 1
    others[:requests] = others[:requests].roll(1, 0)
    a.inner_state_block_table = torch.where(others > 0, others, a.inner_state_block_table)


@spoils_reference("rotation (Hadamard) on keys only", "_store_fp8_pow2")
def _(store):
    return lambda x, slots, k_cache: store(reference._hadamard(x), slots, k_cache)


def twelve_rows(call: Call, **options) -> int:
    with mock.patch.object(contract, "window_of", lambda ratio: 12):
        return compress(call, REFERENCE, **options)


FAULTS["window of twelve rows"] = twelve_rows


@spoils_reference("random keys", "_store_fp8_pow2")
def _(store):
    return lambda x, slots, k_cache: store(torch.randn_like(x), slots, k_cache)
