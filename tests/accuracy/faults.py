"""Ways in which an indexer compressor can be wrong: each an implementation of the op with one fault planted."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from vllm_dsv4_indexer.ops import baselines, cpu, reference

HALF = 128  # channels
ARGUMENTS = [name for name in inspect.signature(reference.compress).parameters if name not in ("eps", "k_format")]
FAULTS: dict[str, Callable[..., int]] = {}
right = cpu.compress


def spoils_arguments(name: str, implementation: Callable[..., int] = right):
    """Registers a fault: a function that changes the arguments of the op before a right implementation takes them."""

    def register(spoil: Callable[[SimpleNamespace], None]) -> None:
        def compress(*tensors: Tensor | None, **options) -> int:
            arguments = SimpleNamespace(**dict(zip(ARGUMENTS, tensors, strict=True)))
            spoil(arguments)
            return implementation(*vars(arguments).values(), **options)

        FAULTS[name] = compress

    return register


def spoils_reference(name: str, part: str):
    """Registers a fault: a wrong value or function in the place of `part` of the reference, whose own it is given."""

    def register(spoil: Callable) -> None:
        wrong = spoil(getattr(reference, part))

        def compress(*tensors: Tensor | None, **options) -> int:
            with mock.patch.object(reference, part, wrong):
                return reference.compress(*tensors, **options)

        FAULTS[name] = compress

    return register


@spoils_arguments("no positional bias")
def _(a):
    a.ape = torch.zeros_like(a.ape)


@spoils_arguments("previous and current halves swapped")
def _(a):
    a.kv_score = a.kv_score.unflatten(1, (2, 2, HALF)).flip(2).flatten(1)
    a.ape = a.ape.unflatten(1, (2, HALF)).flip(1).flatten(1)


@spoils_reference("window one row too early", "_windows")
def _(windows):
    def early(token, positions, token_to_req):
        right = windows(token, positions, token_to_req)
        q = right.q - 1
        u = token[:, None] + q - positions[token, None]
        held = u.clamp(min=0)
        in_call = (u >= 0) & (positions[held] == q) & (token_to_req[held] == token_to_req[token, None])
        return right._replace(q=q, u=held, in_call=in_call)

    return early


@spoils_arguments("RoPE at the window's last position")
def _(a):
    a.cos_sin_cache = a.cos_sin_cache.roll(-3, 0)


@spoils_arguments("stale state at a chunk border")
def _(a):
    four_later = a.token_to_req.roll(-4)
    four_later[-4:] = -1
    a.inner_state_slot_mapping = a.inner_state_slot_mapping.masked_fill(four_later != a.token_to_req, -1)


@spoils_arguments("a missing state row under scatter-first", baselines.scatter_pool)
def _(a):
    a.inner_state_slot_mapping = a.inner_state_slot_mapping.masked_fill(a.positions % 4 == 3, -1)


@spoils_reference("scale's exponent without the carry", "_store_fp8_pow2")
def _(store):
    def without_carry(x, slots, k_cache):
        carries = (reference._amax(x).view(torch.int32) & 0x7FFFFF) > 0x600000
        store(x * torch.where(carries, 0.5, 1.0)[:, None], slots, k_cache)  # the same codes, with half the scale

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


@spoils_reference("window of twelve rows", "WINDOW")
def _(rows):
    return rows + 4


@spoils_reference("random keys", "_store_fp8_pow2")
def _(store):
    return lambda x, slots, k_cache: store(torch.randn_like(x), slots, k_cache)
