"""Draws batches. The same seed gives the same numbers."""

import random
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import (
    FP8_PAGE_ENTRIES,
    GEOMETRIES,
    INDEXER,
    ROPE_DIM,
    STATE_PAGES,
    Geometry,
    Layer,
    Requests,
    Step,
)
from .batch import CACHES, Batch
from .caches import SHARED, make_caches, random_bytes, with_gaps
from .tables import Pages, Prefixes, ceil, lay_out, slots_of, tokens_of

MAX_POSITION = 512
_KV_BLOCK = 256  # tokens of a block of vLLM's KV cache
_BLOCK = 64  # positions whose rows are drawn together
# What is added to the gates of positions 0, 1, ...: a first window beside which masked rows must
# still weigh nothing, windows that outweigh others, a row without weight beside one that has all
# of it, windows far below zero.
_EXTREMES = torch.tensor(
    [-2e4] * 4 + [0.0] * 4 + [3e4] * 4 + [-torch.inf, 200.0, 0.0, 0.0] + [-1e30] * 8
)
# By format, where it is not what vLLM has in a page of fp8 or in a block of its KV cache.
_K_PAGES = {"int8_hadamard": 16, "fp8_pow2": FP8_PAGE_ENTRIES, "fp8_amax": FP8_PAGE_ENTRIES}


class Spread(NamedTuple):
    """Standard deviations of the values, and the mean of the norm's weights."""

    kv: float
    gate: float
    ape: float
    norm_mean: float
    norm: float


WIDE = Spread(kv=2.0, gate=2.0, ape=0.15, norm_mean=0.7, norm=0.26)


def make_batch(
    requests: list[tuple[int, int]],
    *,
    geometry: Geometry = INDEXER,
    seed: int = 0,
    page: int = 4,
    k_page: int | None = None,
    layout: str = "dense",
    kv_dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.bfloat16,
    spread: Spread = WIDE,
    max_pos: int = MAX_POSITION,
    k_format: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
    padding: int = 0,
    ring: int | None = None,
    prefixes: Prefixes | None = None,
    page_seed: int | None = None,
    eps: float = 1e-6,
    extreme: bool = False,
    gaps: bool = False,
) -> Batch:
    """A packed batch of `requests`, in order, then `padding` rows with arbitrary contents. Pages
    lie anywhere in their caches, as in an engine that has run for a while; those before the last
    window are freed, and have page 0 in the table.

    `ring`: positions p and p + ring share a state row, in every request that has no part in
    `prefixes`. `page_seed` permutes the pages without changing anything else. `k_page`: entries of
    a K page, where the format leaves them free. `k_format`: by default the geometry's first.
    `extreme`: some gates are far from the others. `gaps`: what may have a stride has arbitrary
    bytes between its rows, pages and entries; but for caches that share a storage, whose strides
    are the engine's.
    """
    k_format = k_format or GEOMETRIES[geometry][0]
    k_page = k_page or _K_PAGES.get(k_format, _KV_BLOCK // geometry.ratio)
    numbers, order = (
        torch.Generator().manual_seed(s) for s in (seed, seed if page_seed is None else page_seed)
    )
    ape, norm_weight = _weights(geometry, spread, numbers)
    sequences = [
        _sequence(geometry, seed, number, *request, spread, extreme).to(kv_dtype)
        for number, request in enumerate(requests)
    ]
    shared = layout in SHARED
    pages = lay_out(geometry, requests, page, k_page, ring, prefixes or {}, shared, order)
    caches = make_caches(geometry, pages, k_format, scale_dtype, layout, numbers)
    _save_history(geometry, requests, sequences, ape, pages.table, caches.state, prefixes or {})
    layer = Layer(ape, norm_weight.to(norm_dtype), _rope_table(max_pos), *caches[:3])
    batch = Batch(
        kv_score=torch.cat([rows[-length:] for (_, length), rows in zip(requests, sequences)]),
        **layer._asdict(),
        **_step(requests, pages, geometry.ratio)._asdict(),
        k_format=k_format,
        storages=caches.storages,
        requests=_told_by_requests(requests, pages),
        eps=eps,
    )
    batch = _padded(batch, padding)
    if not gaps:
        return batch
    leave = CACHES if shared else ()
    return with_gaps(batch, lambda size: random_bytes(size, numbers), leave=leave)


def _weights(geometry: Geometry, spread: Spread, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """`ape` and the norm's weight."""
    ape = spread.ape * torch.randn(geometry.ratio, geometry.kv_width, generator=numbers)
    norm_weight = spread.norm_mean + spread.norm * torch.randn(geometry.head_dim, generator=numbers)
    return ape, norm_weight


def _step(requests: list[tuple[int, int]], pages: Pages, ratio: int) -> Step:
    """The tokens of the requests, in their order."""
    request, positions = tokens_of([range(start, start + length) for start, length in requests])
    k_slots = slots_of(pages.k_table, request, positions // ratio, pages.k_page)
    return Step(
        positions,
        request.int(),
        slots_of(pages.table, request, positions, pages.page),
        pages.table,
        torch.where(positions % ratio == ratio - 1, k_slots, -1),
    )


def random_case(
    pick: random.Random, geometry: Geometry = INDEXER, longest: int | None = None
) -> dict[str, Any]:
    """Arguments of `make_batch`, but for the indexer's other formats, whose scales implementations
    round differently. longest: a request has fewer tokens."""
    pages, window = STATE_PAGES[geometry.ratio], geometry.window
    longest = longest or max(40, 2 * window)
    requests = [
        (pick.randrange(140), pick.randrange(1, longest)) for _ in range(pick.randrange(1, 8))
    ]
    prefixes: Prefixes = {}
    while pick.random() < 0.6:  # one more request, which shares the prefix of one that is there
        owner = pick.randrange(len(requests))
        end = sum(requests[owner])
        step = max(pages)
        ends = [length for length in range(step, end + 1, step) if length > requests[owner][0]]
        if not ends:
            break
        length = pick.choice(ends)
        prefixes[len(requests)] = owner, length
        requests.append((length, pick.randrange(1, longest)))
    return {
        "geometry": geometry,
        "requests": requests,
        "prefixes": prefixes,
        "seed": pick.randrange(2**32),
        "page": pick.choice(pages),
        "layout": pick.choice(("dense", "padded", "engine")),
        "kv_dtype": pick.choice((torch.float32, torch.bfloat16)),
        "padding": pick.randrange(4),
        "ring": pick.choice((None, None, window, 2 * window, 8 * window)),
        "max_pos": max(sum(request) for request in requests) + MAX_POSITION,
        "eps": pick.choice((1e-6, 0.3)),
        "extreme": pick.random() < 0.3,
        "gaps": pick.random() < 0.5,
        "k_format": pick.choice(("fp8_pow2",) if geometry == INDEXER else GEOMETRIES[geometry]),
    }


def _sequence(
    geometry: Geometry,
    seed: int,
    request: int,
    start: int,
    length: int,
    spread: Spread,
    extreme: bool,
) -> Tensor:
    """The projections of a request's positions, from the window before `start` on: the same
    whatever the others are, and however the request is cut into calls."""
    begin, end = max(start - geometry.window, 0), start + length
    blocks = []
    for block in range(begin // _BLOCK, ceil(end, _BLOCK)):
        numbers = torch.Generator().manual_seed(
            random.Random(f"{seed} {request} {block}").getrandbits(63)
        )
        blocks.append(torch.randn(_BLOCK, geometry.row_width, generator=numbers))
    rows = torch.cat(blocks)[begin % _BLOCK :][: end - begin]
    kv, gate = rows.chunk(2, dim=1)
    kv *= spread.kv
    gate *= spread.gate
    if extreme:
        gate += _EXTREMES[torch.arange(begin, end) % len(_EXTREMES), None]
    return rows


def _told_by_requests(requests: list[tuple[int, int]], pages: Pages) -> Requests:
    start, length = torch.tensor(requests, dtype=torch.int32).unbind(1)
    query_start_loc = torch.cat([start.new_zeros(1), length.cumsum(0, dtype=torch.int32)])
    return Requests(query_start_loc, start.contiguous(), pages.table, pages.k_table)


def _save_history(
    geometry: Geometry,
    requests: list[tuple[int, int]],
    sequences: list[Tensor],
    ape: Tensor,
    table: Tensor,
    state: Tensor,
    prefixes: Prefixes,
) -> None:
    """Saves the rows of the window before each request's start, but for those of a shared prefix,
    which only this call fills, or which are another's history."""
    before = [
        range(max(start - geometry.window, 0, prefixes.get(r, (0, 0))[1]), start)
        for r, (start, _) in enumerate(requests)
    ]
    request, positions = tokens_of(before)
    ends = [len(sequence) - length for sequence, (_, length) in zip(sequences, requests)]
    parts = [sequence[end - len(r) : end] for sequence, r, end in zip(sequences, before, ends)]
    rows = torch.cat(parts).float()
    rows[:, geometry.kv_width :] += ape[positions % geometry.ratio]
    page = state.shape[1]
    slots = slots_of(table, request, positions, page)
    state[slots // page, slots % page] = rows


def _padded(batch: Batch, padding: int) -> Batch:
    """The batch with so many rows more, of arbitrary contents and without slots."""
    arbitrary = torch.tensor([-(2**62), 2**62, 3, 0, 7, -1]).repeat(padding)[:padding]
    none = torch.full((padding,), -1)
    rows = {
        "kv_score": batch.kv_score.new_full((padding, batch.geometry.row_width), torch.nan),
        "positions": arbitrary,
        "token_to_req": (arbitrary % 1000 - 500).int(),
        "inner_state_slot_mapping": none,
        "k_slot_mapping": none,
    }
    longer: dict[str, Any] = {n: torch.cat([getattr(batch, n), more]) for n, more in rows.items()}
    return replace(batch, **longer)


def _rope_table(positions: int) -> Tensor:
    frequency = 160000.0 ** (-torch.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)
