"""What holds of every step that an engine schedules right, beyond what the op needs.

`plan` refuses what the op cannot follow. What it can follow is stored as told, also if it is wrong:
a row that nobody saves, a slot of another request. Checked mode looks for this before a layer
writes: `check_step` once a step and kind of compressor, `check_values` once a layer.

Tensor operations alone, on the host.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import ContractError, Extents, Step, window_of

_REMEDY = (
    "The step's metadata are wrong: leave out plugins of vLLM that change its scheduler or its "
    "caches, else report this"
)
_PADDING = "lies behind the step's last token and has the slot {value}: padding has slot -1"
_UNSAVED = "has no state row (slot {value}), which the windows of later steps need"
_NO_ENTRY = "closes a window and has no K slot ({value})"
_STRAY = "closes no window and has the K slot {value}"
_GAP = "stands behind position {value} of its request: a step has all positions once, in order"
_SPLIT = "is apart from the tokens of request {value} that come before it"
_SLOT = "has the {cache} slot {value}, where its block table gives {expected} (-1: no page)"
_PAGE = (
    "writes {cache} page {value}, which token {other} writes for another request or for other "
    "positions"
)
_HISTORY = (
    "needs the row of position {needed} in state slot {value}, which has that of position {found} "
    "(-1: none): it was not saved, or its page was given away too early"
)
_NOT_FINITE = (
    "has {value} in channel {channel} of its {part}: check the checkpoint, and the layers before "
    "this one"
)


class Scheduled(NamedTuple):
    """A step as an engine has scheduled it. `plan` has accepted it."""

    step: Step
    tokens: int  # the rows behind them are padding
    k_block_table: Tensor  # [R, K] int32: the K pages of each request
    k_page: int  # entries of a K page
    ratio: int
    all_saved: bool = True  # else a row whose page is the null page is not


class Ledger:
    """Which position's row each slot of the state holds, -1 for none.

    It cannot tell the rows of two requests at one position apart: in a shared prefix they are one.
    """

    def __init__(self, extents: Extents):
        self.extents = extents
        self.positions = torch.full((extents.state_pages * extents.state_page,), -1)

    def save(self, slots: Tensor, positions: Tensor) -> None:
        """Notes the rows that a step saves. A token with slot -1 saves none."""
        saves = slots >= 0
        self.positions[slots[saves]] = positions[saves]

    def forget(self, pages: Tensor) -> None:
        """Notes that other caches have been given these pages."""
        self.positions.view(-1, self.extents.state_page)[pages] = -1


class _Invariant(NamedTuple):
    """`broken`: [T], the tokens that break it. `numbers`: [T] each, for the message."""

    message: str
    broken: Tensor
    numbers: dict[str, Tensor]
    cache: str = ""


def check_step(scheduled: Scheduled, ledger: Ledger) -> None:
    """Raises ContractError for the first token of the first invariant that is broken. Writes
    nothing."""
    for message, broken, numbers, cache in _invariants(scheduled, ledger):
        for token in broken.nonzero()[:1, 0].tolist():
            values = {name: int(number[token]) for name, number in numbers.items()}
            raise _error(scheduled, token, f"{message}. {_REMEDY}", cache=cache, **values)


def check_values(scheduled: Scheduled, kv_score: Tensor) -> None:
    """Raises ContractError for the first value of a layer's projection [T, row width] that is not
    finite."""
    rows = kv_score[: scheduled.tokens]
    if rows.sum().isfinite():  # as it never is if one of them is not
        return
    for token, column in (~rows.isfinite()).nonzero()[:1].tolist():
        kv_width = rows.shape[1] // 2
        part, channel = ("kv", "gate")[column // kv_width], column % kv_width
        value = rows[token, column].item()
        raise _error(scheduled, token, _NOT_FINITE, part=part, channel=channel, value=value)


def _error(scheduled: Scheduled, token: int, message: str, **values: object) -> ContractError:
    request = int(scheduled.step.token_to_req[token])
    who = f"token {token} (request {request}, position {int(scheduled.step.positions[token])}) "
    return ContractError(who + message.format_map(values), request=request)


def _invariants(scheduled: Scheduled, ledger: Ledger) -> Iterator[_Invariant]:
    """In an order in which each may rely on those before it."""
    step, tokens, k_table, k_page, ratio, all_saved = scheduled
    slots = torch.maximum(step.inner_state_slot_mapping, step.k_slot_mapping)
    behind = torch.arange(len(slots)) >= tokens
    yield _Invariant(_PADDING, behind & (slots >= 0), {"value": slots})

    table, page = step.inner_state_block_table, ledger.extents.state_page
    positions, requests, state_slots, k_slots = (
        per_token[:tokens] for per_token in (*step[:3], step.k_slot_mapping)
    )
    closes = positions % ratio == ratio - 1
    has_page = _slots(table, requests, positions, page) >= 0
    unsaved = (state_slots < 0) & (all_saved | has_page)
    yield _Invariant(_UNSAVED, unsaved, {"value": state_slots})
    yield _Invariant(_NO_ENTRY, closes & (k_slots < 0), {"value": k_slots})
    yield _Invariant(_STRAY, ~closes & (k_slots >= 0), {"value": k_slots})
    begins = torch.ones_like(closes)
    begins[1:] = requests[1:] != requests[:-1]
    before = positions.roll(1)
    yield _Invariant(_GAP, ~begins & (positions != before + 1), {"value": before})
    yield _Invariant(_SPLIT, begins & (_earlier(requests, begins) >= 0), {"value": requests})
    saves, entries = state_slots >= 0, positions // ratio
    yield from _pages("state", saves, state_slots, table, requests, positions, page)
    yield from _pages("K", closes, k_slots, k_table, requests, entries, k_page)
    yield _history(begins, positions, requests, state_slots, table, ledger, ratio)


def _pages(
    cache: str,
    writes: Tensor,
    slots: Tensor,
    table: Tensor,
    requests: Tensor,
    index: Tensor,
    page: int,
) -> Iterator[_Invariant]:
    """That the tokens which write to a cache do so where their block table says, each to pages of
    its own. index: of the rows or entries, in their request."""
    expected = _slots(table, requests, index, page)
    differs = writes & ((slots != expected) | (slots < page))  # page 0 is nobody's
    yield _Invariant(_SLOT, differs, {"value": slots, "expected": expected}, cache)
    pages, place = slots // page, requests * table.shape[1] + index // page
    other = _earlier(pages, writes)
    elsewhere = (other >= 0) & (place[other] != place)
    yield _Invariant(_PAGE, elsewhere, {"value": pages, "other": other}, cache)


def _history(
    begins: Tensor,
    positions: Tensor,
    requests: Tensor,
    state_slots: Tensor,
    table: Tensor,
    ledger: Ledger,
    ratio: int,
) -> _Invariant:
    """That the rows before a request's first token which belong to a window that is still open are
    in the state, or written in this step. They are those of its group and, where windows overlap,
    of the group before it."""
    first = begins.nonzero()
    start, page = positions[first], ledger.extents.state_page
    window = window_of(ratio)  # not by read_later.py: a fault there must not hide itself here
    needed = start - torch.arange(window - 1, 0, -1)
    exists = needed >= (start - start % ratio - (window - ratio)).clamp(min=0)
    slots = _slots(table, requests[first], needed.clamp(min=0), page)
    slots = slots.clamp(min=0, max=len(ledger.positions) - 1)  # in page 0 there is no row
    found = ledger.positions[slots]
    missing = exists & (found != needed)
    if missing.any():
        missing &= ~torch.isin(_rows(slots, needed), _rows(state_slots, positions))
    which = missing.int().argmax(dim=1, keepdim=True)
    numbers = {"needed": needed, "value": slots, "found": found}
    return _Invariant(
        _HISTORY,
        _spread(missing.any(dim=1, keepdim=True), first, len(positions)),
        {n: _spread(t.gather(1, which), first, len(positions)) for n, t in numbers.items()},
    )


def _rows(slots: Tensor, positions: Tensor) -> Tensor:
    """A number for each pair."""
    return (slots << 32) + positions


def _spread(values: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The values [N, 1] at these tokens [N, 1], and 0 at all others: [count]."""
    return values.new_zeros(count).index_put((tokens[:, 0],), values[:, 0])


def _slots(table: Tensor, requests: Tensor, index: Tensor, page: int) -> Tensor:
    """Where a block table puts the rows, or entries, of that index; -1 without a page."""
    column = index // page
    pages = table[requests, column.clamp(max=table.shape[1] - 1)].long()
    missing = (column >= table.shape[1]) | (pages <= 0)
    return (pages * page + index % page).masked_fill(missing, -1)


def _earlier(values: Tensor, among: Tensor) -> Tensor:
    """For each token that is `among` those that count, the last one before it of the same value
    that does too, else -1."""
    tokens = among.nonzero()[:, 0]
    ordered, order = values[tokens].sort(stable=True)
    same = ordered[1:] == ordered[:-1]
    result = torch.full_like(values, -1, dtype=torch.int64)
    result[tokens[order[1:]][same]] = tokens[order[:-1]][same]
    return result
