"""`vllm-dsv4-indexer replay`: runs a capture through an implementation, and compares what it stores
with what the reference stores."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .capture import Capture
from .contract import Call, ContractError, geometry_of
from .entries import SHARE_OF_TIES, Entries, bf16_differ, in_order

MOST_TIES = 4  # or SHARE_OF_TIES, if that is more


class Stored(NamedTuple):
    """What an implementation stored. `refused` says why it stored nothing."""

    refused: str
    call: Call
    rows: Tensor  # fp32 [N, row width], those of the state pages that are compared
    closing: Tensor  # [E], the tokens that close a window
    scales: Tensor  # [E, 1] fp32 or [E, 8] exponents, of these tokens
    codes: Tensor  # [E, codes], in the order of the values that they stand for
    rotated: Tensor  # bf16 [E, 64] or [E, 0]


def replay(file: Path, impl: str) -> int:
    """Prints what was captured and the first number that differs. Returns 0 if none does, else 1.
    Raises UserError for a file that is no capture, or an implementation that does not run here."""
    capture = Capture.load(file)
    call = capture.call()
    print(f"captured: {len(call.positions)} tokens, {len(call.inner_state_block_table)} requests")
    print(f"compressor: {capture.geometry}, {capture.k_format}")
    for name, note in sorted(capture.notes.items()):
        print(f"{name}: {''.join(filter(str.isprintable, ' '.join(note.split())))}")
    pages = capture.tensors["kept_pages"]
    options = capture.eps, capture.k_format
    reference = store(call, *options, "reference", pages)
    other = store(capture.call(), *options, impl, pages)
    if reference.refused or other.refused:
        return _compare_refusals(reference.refused, other.refused, impl)
    if difference := first_difference(reference, other, pages):
        print(f"differs: {difference} by {impl}")
        return 1
    ties = int((reference.codes != other.codes).sum())
    print(f"the same: {impl} stores what the reference stores; neighbouring codes: {ties}")
    return 0


def store(call: Call, eps: float, k_format: str, impl: str, pages: Tensor) -> Stored:
    """pages: those of the state that are compared."""
    refused = ""
    try:
        ops.compress(*call, eps=eps, k_format=k_format, impl=impl)
    except ContractError as error:
        refused = str(error)
    rows = call.inner_state_cache[pages].flatten(0, 1)
    closing = call.step.closing(geometry_of(call.ape, k_format).ratio)
    slots = call.k_slot_mapping[closing]
    k_cache = call.k_cache
    inside = slots < k_cache.shape[0] * k_cache.shape[1]  # else it was refused
    codes, rotated, scales = Entries.of(k_cache, k_format).at(slots[inside])
    scales = scales[..., None].flatten(1, -1)
    return Stored(refused, call, rows, closing[inside], scales, in_order(codes), rotated)


def _compare_refusals(reference: str, other: str, impl: str) -> int:
    if reference == other:
        print(f"the same: {impl} and the reference refuse it: {reference}")
        return 0
    for name, refused in (("reference", reference), (impl, other)):
        print(f"differs: {name}: {refused or 'stores it'}")
    return 1


def first_difference(reference: Stored, other: Stored, pages: Tensor) -> str:
    """The first number that differs, empty if none does. State and scales must be equal bit by bit,
    codes but for a few neighbours, rotated channels to the last step of bf16."""
    call, closing = reference.call, reference.closing.tolist()
    distance = (reference.codes - other.codes).abs()
    ties = max(MOST_TIES, int(SHARE_OF_TIES * distance.numel()))
    allowed = 1 if int((distance == 1).sum()) <= ties else 0
    for what, one, two, differs in (
        ("state", reference.rows, other.rows, _bits(reference.rows) != _bits(other.rows)),
        ("scale", reference.scales, other.scales, _bits(reference.scales) != _bits(other.scales)),
        ("code", reference.codes, other.codes, distance > allowed),
        (
            "rotated channel",
            reference.rotated,
            other.rotated,
            bf16_differ(other.rotated, reference.rotated),
        ),
    ):
        for row, column in differs.nonzero()[:1].tolist():
            token = _saver(call, pages, row) if what == "state" else closing[row]
            expected, found = one[row, column].item(), two[row, column].item()
            where = f"{_who(call, token)}, {what} {column}"
            return f"{where} is {expected} by the reference and {found}"
    return ""


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8 if numbers.dtype is torch.uint8 else torch.int32)


def _saver(call: Call, pages: Tensor, row: int) -> int:
    """The token whose row it is; -1: none of the step."""
    page = call.inner_state_cache.shape[1]
    slot = pages[row // page] * page + row % page
    return max([-1, *(call.inner_state_slot_mapping == slot).nonzero()[:, 0].tolist()])


def _who(call: Call, token: int) -> str:
    if token < 0:
        return "in a row that no token of the step saves"
    request, position = int(call.token_to_req[token]), int(call.positions[token])
    return f"token {token} (request {request}, position {position})"
