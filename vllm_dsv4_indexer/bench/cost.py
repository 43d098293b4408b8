"""What the compressor costs at scale: the bytes that its calls move and the memory that it holds,
computed on paper and counted on real calls.

On paper they follow from the layout (contract.py) and vLLM's pages (cases.py). A kv_score row, a
state row and an entry count once each, whether or not the CPU's caches hold it. Slots, positions
and RoPE rows, 92 bytes a token, are left out. A real call writes the bytes that it changes, and
reads the bytes that change its result.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops, output
from ..contract import FP8_ENTRY_BYTES, FP8_PAGE_ENTRIES, RATIO, ROW_WIDTH, WINDOW, Call
from ..read_later import first_read, read_at_hit
from .cases import (
    LAYERS,
    PAGE,
    PAGE_BYTES,
    Case,
    make_call,
    with_null_pages,
)

if TYPE_CHECKING:
    from rich.table import Table

CONTEXTS = (8 << 10, 128 << 10, 1 << 20)
CHUNKS = (2 << 10, 8 << 10)
ROW_BYTES = 4 * ROW_WIDTH
HALF_ROW = ROW_BYTES // 2  # a window takes the front halves of kv and gate, or the back halves
SAMPLE = Case("sample", "mixed", ((0, 12), (5, 27), (250, 9), (131, 1)))
WAYS = {
    "full": ("cpu", False),
    "readable": ("cpu", True),
    "scatter, then pool": ("scatter_pool", False),
}
SAVED = ("full", "readable")


class Traffic(NamedTuple):
    """Bytes that calls move in one layer. `read_back`: state rows of the call, which scatter, then
    pool reads."""

    kv_score_read: int
    history_read: int
    read_back: int
    state_written: int
    entries_written: int


def on_paper(requests: tuple[tuple[int, int], ...], kv_dtype: torch.dtype, way: str) -> Traffic:
    """The traffic of one call for each of `requests`, (tokens computed before, tokens of the call),
    in one of WAYS."""
    impl, readable = WAYS[way]
    calls = []
    for start, length in requests:
        end = start + length
        closing = range(start - start % RATIO + RATIO - 1, end, RATIO)
        # The first entry has no group before its own.
        pooled = WINDOW * len(closing) - RATIO * (start < RATIO <= end)
        history = len(history_halves(start, length))
        calls.append(
            Traffic(
                kv_score_read=length * ROW_WIDTH * kv_dtype.itemsize,
                history_read=history * HALF_ROW,
                read_back=(pooled - history) * HALF_ROW * (impl == "scatter_pool"),
                state_written=len(rows_saved(start, length, readable)) * ROW_BYTES,
                entries_written=len(closing) * FP8_ENTRY_BYTES,
            )
        )
    return Traffic(*map(sum, zip(*calls)))


def rows_saved(start: int, length: int, readable: bool) -> list[int]:
    """The positions of the rows that a call saves: all, or those that are read later."""
    next_reads = first_read(start + length, RATIO)
    return [
        p
        for p in range(start, start + length)
        if not readable or p >= next_reads or read_at_hit(p, RATIO)
    ]


def history_halves(start: int, length: int) -> list[tuple[int, int]]:
    """The half rows (position, 0 for front or 1 for back) before `start` that a call's first two
    windows read."""
    closing = range(start - start % RATIO + RATIO - 1, start + length, RATIO)[:2]
    windows = (range(max(last - WINDOW + 1, 0), last + 1) for last in closing)
    return [(q, int(q > window[-1] - RATIO)) for window in windows for q in window if q < start]


def state_bytes(context: int, chunk: int, readable: bool) -> int:
    """The bytes of a request's state pages in one layer, during the call of `chunk` tokens that
    brings it to `context`: those with the rows before it that vLLM holds, and with those that it
    saves. (A block of vLLM's pool is as large as its widest group's.)"""
    start = max(context - chunk, 0)
    before = first_read(start, RATIO) if readable else max(start - WINDOW + 1, 0)
    rows = [*range(before, start), *rows_saved(start, context - start, readable)]
    return len({row // PAGE for row in rows}) * PAGE_BYTES


def k_bytes(context: int) -> int:
    """The bytes of the pages of a request's K entries in one layer."""
    return _pages(context, RATIO * FP8_PAGE_ENTRIES) * PAGE_BYTES


def _pages(tokens: int, page: int) -> int:
    return -(-tokens // page)


# ---- counted on real calls -----------------------------------------------------------------------


def counted(case: Case, kv_dtype: torch.dtype, way: str) -> Traffic:
    """The traffic of one call of the op, counted."""
    impl, readable = WAYS[way]
    call = make_call(case, kv_dtype)
    if readable:
        call = with_null_pages(call)
    kv_score = len(halves_read(call, impl, "kv_score")) * ROW_WIDTH // 2 * kv_dtype.itemsize
    # Without slots: a row that is saved first would hide the one that lies there before.
    unsaved = call._replace(inner_state_slot_mapping=torch.full_like(call.positions, -1))
    _calm(case, unsaved)
    rows = halves_read(unsaved, impl, "inner_state_cache")
    history = set(history_rows(case, call))
    return Traffic(
        kv_score,
        len(rows & history) * HALF_ROW,
        len(rows - history) * HALF_ROW,
        *bytes_written(case, call, impl),
    )


def _calm(case: Case, call: Call) -> None:
    """Puts moderate values into all rows of the state that are no history: beside a large one a NaN
    would not show."""
    state = call.inner_state_cache
    at = _history(case, call)
    history = state[at]
    state.normal_(std=0.025)
    state[at] = history


def _history(case: Case, call: Call) -> tuple[Tensor, Tensor]:
    """The pages, and the places in them, of the state rows that the case reads on paper."""
    rows = torch.tensor([row for row, _ in history_rows(case, call)], dtype=torch.int64)
    return rows // PAGE, rows % PAGE


def halves_read(call: Call, impl: str, argument: str) -> set[tuple[int, int]]:
    """The half rows (row, half) of kv_score or of the state that the call reads: a NaN there
    changes what it stores."""

    def stored(poisoned: tuple[int, int] | None) -> Tensor:
        copy = call._replace(
            **{name: value.clone() for name, value in call._asdict().items() if value is not None}
        )
        if poisoned:
            row, half = poisoned
            getattr(copy, argument).view(-1, 4, ROW_WIDTH // 4)[row, half::2] = torch.nan
        ops.compress(*copy, impl=impl)
        saved = copy.inner_state_cache if argument == "kv_score" else copy.k_cache.new_empty(0)
        return torch.cat([copy.k_cache.flatten(), saved.flatten().view(torch.uint8)])

    rows, clean = getattr(call, argument).numel() // ROW_WIDTH, stored(None)
    return {
        (row, half)
        for row in range(rows)
        for half in (0, 1)
        if not stored((row, half)).equal(clean)
    }


def bytes_written(case: Case, call: Call, impl: str) -> tuple[int, int]:
    """How many bytes of the state's and of the K cache's storage, padding included, the call
    writes: each differs afterwards from one of two fills, which are each other's complement. Rows
    that the call reads keep their values."""
    state, k_cache = call.inner_state_cache, call.k_cache
    at = _history(case, call)
    history = state[at]
    storages = [
        torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
        for cache in (state, k_cache)
    ]
    written = [torch.zeros_like(storage, dtype=torch.bool) for storage in storages]
    for fill in (0x55, 0xAA):
        for storage in storages:
            storage.fill_(fill)
        state[at] = history
        before = [storage.clone() for storage in storages]
        ops.compress(*call, impl=impl)
        for changed, storage, old in zip(written, storages, before):
            changed |= storage != old
    rows, entries = (int(changed.sum()) for changed in written)
    return rows, entries


def history_rows(case: Case, call: Call) -> list[tuple[int, int]]:
    """The half rows of the state (row, half) that the case reads on paper."""
    table = call.inner_state_block_table
    return [
        (int(table[request, q // PAGE]) * PAGE + q % PAGE, half)
        for request, (start, length) in enumerate(case.requests)
        for q, half in history_halves(start, length)
    ]


# ---- in words ------------------------------------------------------------------------------------


def tables() -> list["Table | str"]:
    """Everything above."""
    return [
        f"vLLM 0.32: pages of {PAGE_BYTES} bytes, for {PAGE} state rows or {FP8_PAGE_ENTRIES} K "
        "entries",
        "One layer, one request, bytes a token (saves: what `readable` saves of all that is "
        "moved;\nread back: what scatter, then pool reads of the rows that it has just written)",
        _layer_table(),
        *(part for model in LAYERS for part in _model_table(model)),
        "One layer, one call, requests (tokens before, tokens of the call) "
        f"{', '.join(map(str, SAMPLE.requests))}: bytes on paper = counted on the op",
        _counted_table(),
    ]


class Step(NamedTuple):
    """A prompt in chunks, or a group generated token by token."""

    context: int
    chunk: int  # tokens of a call
    requests: tuple[tuple[int, int], ...]  # of its calls

    @property
    def tokens(self) -> int:
        return self.chunk * len(self.requests)

    @property
    def names(self) -> list[str]:
        chunk = f"{self.chunk >> 10}K" if self.chunk > 1 else "decode"
        return [f"{self.context >> 10}K", chunk]


def _steps() -> Iterator[Step]:
    for context in CONTEXTS:
        for chunk in (*CHUNKS, 1):
            starts = range(0, context, chunk) if chunk > 1 else range(context, context + RATIO)
            yield Step(context, chunk, tuple((start, chunk) for start in starts))


def _layer_table() -> "Table":
    columns = ["context", "chunk", "history read", "entries written"]
    columns += ["state written, full", "readable"]
    for dtype in ("bf16", "fp32"):
        columns += [f"moved, {dtype} kv_score, full", "readable", "saves"]
    return output.table([*columns, "read back"], map(_layer_row, _steps()), names=2)


def _layer_row(step: Step) -> list[str]:
    full, readable, scatter = (on_paper(step.requests, torch.bfloat16, way) for way in WAYS)
    sums = [full.history_read, full.entries_written, full.state_written, readable.state_written]
    cells = [_per_token(bytes_, step) for bytes_ in sums]
    for kv_dtype in (torch.bfloat16, torch.float32):
        whole, less = (sum(on_paper(step.requests, kv_dtype, way)) for way in SAVED)
        cells += [_per_token(whole, step), _per_token(less, step), f"{1 - less / whole:.1%}"]
    return [*step.names, *cells, _per_token(scatter.read_back, step)]


def _per_token(bytes_: float, step: Step) -> str:
    return f"{bytes_ / step.tokens:.1f}"


def _model_table(model: str) -> list["Table | str"]:
    layers = LAYERS[model]
    columns = ["context", "chunk", "moved, KiB a token, full", "readable"]
    columns += [
        "moved, GiB, full",
        "readable",
        "held, MiB, state pages, full",
        "readable",
        "K pages",
    ]
    rows = []
    for step in _steps():
        moved = [layers * sum(on_paper(step.requests, torch.bfloat16, way)) for way in SAVED]
        states = [state_bytes(step.context, step.chunk, WAYS[way][1]) for way in SAVED]
        held = [layers * n for n in (*states, k_bytes(step.context))]
        rows.append(
            [
                *step.names,
                *(_per_token(n / (1 << 10), step) for n in moved),
                *(f"{n / (1 << 30):.2f}" if step.chunk > 1 else "" for n in moved),
                *(f"{n / (1 << 20):.2f}" for n in held),
            ]
        )
    title = f"{model}, {layers} layers, one request, bf16 kv_score"
    return [title, output.table(columns, rows, names=2)]


def _counted_table() -> "Table":
    rows = []
    for kv_dtype in (torch.bfloat16, torch.float32):
        for way in WAYS:
            both = zip(on_paper(SAMPLE.requests, kv_dtype, way), counted(SAMPLE, kv_dtype, way))
            name = f"{way}, {str(kv_dtype).removeprefix('torch.')}"
            rows.append([name, *(f"{paper} = {count}" for paper, count in both)])
    columns = [name.replace("_", " ") for name in Traffic._fields]
    return output.table(["", *columns], rows)
