"""The one generator of batches, for the benchmark and for every test of the op, the emulation and
the NPU: paged caches with random bytes in them, slots and tables for a list of requests.

A request is (start, length): its history, the state rows of the window before `start`, is in the
state already. The same seed gives the same projections at the same positions,
however the requests are cut into calls.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contract, ops
from ..contract import (
    FP8_PAGE_ENTRIES,
    GEOMETRIES,
    HEAD_DIM,
    INDEXER,
    ROPE_DIM,
    STATE_PAGES,
    Call,
    Extents,
    Geometry,
    Requests,
)
from ..entries import Entries, in_order

MAX_POSITION = 512
_KV_BLOCK = 256  # tokens of a block of vLLM's KV cache
_BLOCK = 64  # positions whose projections are drawn together
_GAP = 16  # elements between rows, pages or entries
# What is added to the gates of positions 0, 1, ...: a first window beside which masked rows must
# still weigh nothing, windows that outweigh others, a row without weight beside one that has all
# of it, windows far below zero.
_EXTREMES = torch.tensor(
    [-2e4] * 4 + [0.0] * 4 + [3e4] * 4 + [-torch.inf, 200.0, 0.0, 0.0] + [-1e30] * 8
)


class Spread(NamedTuple):
    """Standard deviations of the values, and the mean of the norm's weights."""

    kv: float
    gate: float
    ape: float
    norm_mean: float
    norm: float


WIDE = Spread(kv=2.0, gate=2.0, ape=0.15, norm_mean=0.7, norm=0.26)
# (bytes per state page, per fp8 page, offset of both): None is dense.
LAYOUTS = {
    "dense": (None, None, 0),
    "vllm": (8640, 8640, 0),  # vLLM 0.32 aligns both to 576: 8192 and 8448 bytes are used
    "padded": (8640, 8704, 0),
    # vLLM 0.32, four layers: one storage for the state and the K cache of all layers, here those of
    # the layer whose slot begins at byte 8640. State and K views begin at the same byte and use
    # different pages.
    "engine": (93888, 93888, 8640),
    # vLLM Ascend 0.26.0rc1: one storage of pages, each as large as a K page with its scales behind
    # the values; a state page begins where a K page would.
    "ascend": (None, None, 0),
}
_SHARED = ("engine", "ascend")
# By format, where it is not what vLLM has in a page of fp8 or in a block of its KV cache.
_K_PAGES = {"int8_hadamard": 16, "fp8_pow2": FP8_PAGE_ENTRIES, "fp8_amax": FP8_PAGE_ENTRIES}
_MAIN = ("fp8_ds_mla", "bf16")  # formats that keep the rotated channels as they are


# A request's computed prefix, which another request of the batch fills: {request: (the other, its
# length)}.
Prefixes = dict[int, tuple[int, int]]


# The tensors of a call that have a row for each token.
PER_TOKEN = (
    "kv_score",
    "positions",
    "token_to_req",
    "inner_state_slot_mapping",
    "k_slot_mapping",
)


CACHES = ("inner_state_cache", "k_cache", "k_scale_cache")


def view_like(tensor: Tensor, storage: Tensor) -> Tensor:
    """The same view as `tensor` of another storage, given as a flat tensor of any type."""
    return storage.view(tensor.dtype).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


@dataclass(frozen=True)
class Batch:
    kv_score: Tensor
    ape: Tensor
    norm_weight: Tensor
    cos_sin_cache: Tensor
    positions: Tensor
    token_to_req: Tensor
    inner_state_slot_mapping: Tensor
    inner_state_block_table: Tensor
    inner_state_cache: Tensor
    k_slot_mapping: Tensor
    k_cache: Tensor
    k_scale_cache: Tensor | None
    k_format: str
    storages: tuple[Tensor, ...]  # every byte behind the caches, each storage once
    requests: Requests  # the same tokens, but for padding, as `ops.plan_requests` is told them
    eps: float = 1e-6

    def compress(self, impl: str | None = None) -> "Batch":
        ops.compress(*self.call, eps=self.eps, k_format=self.k_format, impl=impl)
        return self

    @property
    def call(self) -> Call:
        return Call(*(getattr(self, name) for name in Call._fields))

    @property
    def geometry(self) -> Geometry:
        return contract.geometry_of(self.ape, self.k_format)

    def plan(self, impl: str | None = None, extents: Extents | None = None) -> Tensor:
        extents = extents or Extents.of(self.call.layer)
        ratio = self.geometry.ratio
        return ops.plan(*self.call.step, **extents._asdict(), ratio=ratio, impl=impl)

    def run_planned(self, plan: Tensor, impl: str | None = None) -> "Batch":
        layer = self.call.layer
        bound = ops.BoundLayer(layer, eps=self.eps, k_format=self.k_format, impl=impl)
        bound.run(self.kv_score, plan)
        return self

    def take(self, tokens: Any) -> "Batch":
        """The call with these tokens only, on the same caches."""
        return replace(self, **{name: getattr(self, name)[tokens] for name in PER_TOKEN})

    def clone(self) -> "Batch":
        """An equal batch on tensors of its own."""
        return self.to(self.kv_score.device)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on a device; the caches keep their strides and share their storages as before."""
        copies = {
            storage.untyped_storage().data_ptr(): storage.to(device, copy=True)
            for storage in self.storages
        }

        def copied(tensor: Tensor) -> Tensor:
            storage = copies.get(tensor.untyped_storage().data_ptr())
            return tensor.to(device, copy=True) if storage is None else view_like(tensor, storage)

        tensors: dict[str, Any] = {
            name: copied(t) for name, t in self.__dict__.items() if isinstance(t, Tensor)
        }
        return replace(self, **tensors, storages=tuple(copies.values()))

    @property
    def _stored(self) -> Entries:
        return Entries.of(self.k_cache, self.k_format, self.k_scale_cache)

    def codes(self) -> Tensor:
        """[pages, entries, codes] view of the K values, without the `rotated` ones."""
        return self._stored.codes

    def rotated(self) -> Tensor:
        """[pages, entries, 64] view of the channels that the main caches keep in bfloat16."""
        return self._stored.rotated

    def ordered_codes(self) -> Tensor:
        """The codes as integers in the order of the values that they stand for."""
        return in_order(self.codes())

    def scales(self) -> Tensor:
        """[pages, entries] view of the scales; [pages, entries, 8] exponents of `fp8_ds_mla`;
        [pages, entries, 0] of `bf16`."""
        return self._stored.scales

    def written(self, part: Tensor) -> Tensor:
        """[E, ...]: of such a view, what each window-closing token stored, in the order of the
        tokens."""
        slots = self.k_slot_mapping[self.k_slot_mapping >= 0]
        return part[slots // part.shape[1], slots % part.shape[1]]

    def entries(self) -> list[bytes]:
        """What each window-closing token stored, in the order of the tokens."""
        parts = [self.codes(), self.scales()]
        if self.k_format in _MAIN:
            parts.append(self.rotated())
        stored = [self.written(part) for part in parts]
        rows = torch.cat([part[..., None].flatten(1).view(torch.uint8) for part in stored], dim=1)
        return [bytes(row.tolist()) for row in rows]


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
    prefixes = prefixes or {}
    k_format = k_format or GEOMETRIES[geometry][0]
    ratio, window = geometry.ratio, geometry.window
    numbers, pages = (
        torch.Generator().manual_seed(s) for s in (seed, seed if page_seed is None else page_seed)
    )
    ape = spread.ape * torch.randn(ratio, geometry.kv_width, generator=numbers)
    norm_weight = spread.norm_mean + spread.norm * torch.randn(geometry.head_dim, generator=numbers)
    first = [max(start - window, 0) for start, _ in requests]
    # The projection of every position from `first` on; the caller's calls select from it.
    sequences = [
        _projection(geometry, seed, number, begin, start + length, spread, extreme).to(kv_dtype)
        for number, (begin, (start, length)) in enumerate(zip(first, requests))
    ]
    k_page = k_page or _K_PAGES.get(k_format, _KV_BLOCK // ratio)
    table, k_table, state_pages, k_pages = _tables(
        geometry, requests, page, k_page, ring, prefixes, layout in _SHARED, pages
    )
    state, k_cache, k_scale, storages = _caches(
        geometry, state_pages, page, k_pages, k_page, k_format, scale_dtype, layout, numbers
    )
    _save_history(window, requests, sequences, ape, table, state, prefixes)
    request, positions = _tokens([range(s, s + n) for s, n in requests])
    k_slots = _slots(k_table, request, positions // ratio, k_page)
    batch = Batch(
        kv_score=torch.cat(
            [sequence[-length:] for (_, length), sequence in zip(requests, sequences)]
        ),
        ape=ape,
        norm_weight=norm_weight.to(norm_dtype),
        cos_sin_cache=_rope_table(max_pos),
        positions=positions,
        token_to_req=request.int(),
        inner_state_slot_mapping=_slots(table, request, positions, page),
        inner_state_block_table=table,
        inner_state_cache=state,
        k_slot_mapping=torch.where(positions % ratio == ratio - 1, k_slots, -1),
        k_cache=k_cache,
        k_scale_cache=k_scale,
        k_format=k_format,
        storages=storages,
        requests=_told_by_requests(requests, table, k_table),
        eps=eps,
    )
    batch = _padded(batch, padding)
    if not gaps:
        return batch
    return with_gaps(
        batch, lambda size: _storage(size, numbers), leave=CACHES if layout in _SHARED else ()
    )


def random_case(
    pick: random.Random, geometry: Geometry = INDEXER, longest: int | None = None
) -> dict[str, Any]:
    """Arguments of `make_batch`, but for the indexer's other formats, whose scales implementations
    round differently. longest: tokens of a request."""
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


def _told_by_requests(requests: list[tuple[int, int]], table: Tensor, k_table: Tensor) -> Requests:
    start, length = torch.tensor(requests, dtype=torch.int32).unbind(1)
    query_start_loc = torch.cat([start.new_zeros(1), length.cumsum(0, dtype=torch.int32)])
    return Requests(query_start_loc, start.contiguous(), table, k_table)


def _tables(
    geometry: Geometry,
    requests: list[tuple[int, int]],
    page: int,
    k_page: int,
    ring: int | None,
    prefixes: Prefixes,
    shared: bool,
    pages: torch.Generator,
) -> tuple[Tensor, Tensor, int, int]:
    """The block tables of the state and of the K cache, and how many pages each cache has: page 0
    and a few others are nobody's. In a shared storage the pages are as many as both need, and those
    of the K cache come last."""
    sharing = prefixes.keys() | {owner for owner, _ in prefixes.values()}
    rings = [None if request in sharing else ring for request in range(len(requests))]
    ends = [start + length for start, length in requests]
    # What lies before the last window is freed.
    live = [
        range(max(start - geometry.window, 0) // page, _ceil(end, page))
        for (start, _), end in zip(requests, ends)
    ]
    held = [
        min(len(those), _ceil(ring or end, page)) for those, end, ring in zip(live, ends, rings)
    ]
    k_held = [_ceil(end, geometry.ratio * k_page) for end in ends]
    state_pages = sum(held) + 3
    k_pages = sum(k_held) + 2 + (state_pages if shared else 0)
    first_k_page = state_pages if shared else 1
    free_k = first_k_page + torch.randperm(sum(k_held) + 1, generator=pages)
    free = 1 + torch.randperm(sum(held) + 2, generator=pages)
    table, k_table = _table(live, held, free), _table([range(n) for n in k_held], k_held, free_k)
    for request, (owner, length) in prefixes.items():
        assert length % page == 0, "prefixes are shared by whole pages"
        assert length <= requests[request][0], "a shared prefix is computed"
        table[request, : length // page] = table[owner, : length // page]
    return table, k_table, k_pages if shared else state_pages, k_pages


def _table(columns: list[range], held: list[int], pages: Tensor) -> Tensor:
    """[R, M]: each request gets as many of the pages as it holds, in its columns over and over;
    elsewhere is page 0."""
    free = pages.tolist()
    table = torch.zeros(len(columns), max(those.stop for those in columns) + 1, dtype=torch.int32)
    for row, those, count in zip(table, columns, held):
        owned = [free.pop() for _ in range(count)]
        for column in those:
            row[column] = owned[column % count]
    return table


def _tokens(positions: list[range]) -> tuple[Tensor, Tensor]:
    """The request and the position of each token."""
    pairs = [(request, position) for request, those in enumerate(positions) for position in those]
    request, position = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return request, position


def _slots(table: Tensor, request: Tensor, index: Tensor, page: int) -> Tensor:
    """Where a cache with pages of that size has the rows, or entries, of that index."""
    return table[request, index // page].long() * page + index % page


def _save_history(
    window: int,
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
        range(max(start - window, 0, prefixes.get(r, (0, 0))[1]), start)
        for r, (start, _) in enumerate(requests)
    ]
    request, positions = _tokens(before)
    ends = [len(sequence) - length for sequence, (_, length) in zip(sequences, requests)]
    parts = [sequence[end - len(r) : end] for sequence, r, end in zip(sequences, before, ends)]
    rows = torch.cat(parts).float()
    ratio, kv_width = ape.shape
    rows[:, kv_width:] += ape[positions % ratio]
    page = state.shape[1]
    slots = _slots(table, request, positions, page)
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


def with_gaps(
    batch: Batch, memory: Callable[[int], Tensor], span: int = 0, leave: Sequence[str] = ()
) -> Batch:
    """The batch with gaps wherever the contract allows a stride, in what `memory` gives for so many
    bytes. The first dimension of each tensor spans more than `span` elements. The tensors that
    `leave` names stay as they are."""
    storages = list(batch.storages if leave else ())
    views: dict[str, Any] = {}
    arguments = contract.arguments_of_call(batch.k_format, batch.geometry)
    for name, (_, _, _, dense) in arguments.items():
        tensor = getattr(batch, name)
        if tensor.dim() <= dense or name in leave:
            continue
        strides = _strides_with_gaps(tensor.shape, dense, span)
        storages.append(memory(strides[0] * len(tensor) * tensor.itemsize))
        views[name] = storages[-1].view(tensor.dtype).as_strided(tensor.shape, strides)
        views[name].copy_(tensor)
    return replace(batch, **views, storages=tuple(storages))


def _strides_with_gaps(shape: torch.Size, dense: int, span: int) -> tuple[int, ...]:
    """Of a tensor whose last `dense` dimensions are contiguous: a gap behind each index of the
    others."""
    strides: list[int] = []
    extent = 1
    for dim in reversed(range(len(shape))):
        strides.insert(0, extent + (_GAP if dim < len(shape) - dense else 0))
        extent = strides[0] * shape[dim]
    apart = span // max(shape[0] - 1, 1) // _GAP * _GAP + _GAP
    return max(strides[0], apart), *strides[1:]


def _caches(
    geometry: Geometry,
    state_pages: int,
    page: int,
    k_pages: int,
    k_page: int,
    k_format: str,
    scale_dtype: torch.dtype,
    layout: str,
    numbers: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The state, the K cache and its scales, as views, and every storage behind them."""
    int8 = k_format == "int8_hadamard"
    argument = contract.arguments_of_call(k_format, geometry)["k_cache"]
    width, k_dtype = int(argument.sizes[-1]), argument.dtypes[0]
    entry = width * k_dtype.itemsize
    state_stride, k_stride, offset = LAYOUTS[layout]
    if layout == "ascend":
        state_stride = k_stride = k_page * (HEAD_DIM + scale_dtype.itemsize if int8 else entry)
    state_stride = _stride(state_stride, page * geometry.row_width * 4)
    k_stride = _stride(k_stride, k_page * entry)
    if layout in _SHARED:
        state_stride = k_stride = max(state_stride, k_stride)
    state_storage = _storage(state_pages * state_stride + offset, numbers)
    shared = layout in _SHARED
    k_storage = state_storage if shared else _storage(k_pages * k_stride, numbers)
    state = state_storage.view(torch.float32).as_strided(
        (state_pages, page, geometry.row_width),
        (state_stride // 4, geometry.row_width, 1),
        offset // 4,
    )
    k_cache = k_storage.view(k_dtype).as_strided(
        (k_pages, k_page, width),
        (k_stride // k_dtype.itemsize, width, 1),
        offset // k_dtype.itemsize,
    )
    storages = (state_storage,) if shared else (state_storage, k_storage)
    if not int8:
        return state, k_cache, None, storages
    if layout == "ascend":  # behind the values of each page
        strides, first = (k_stride // scale_dtype.itemsize, 1), k_page * HEAD_DIM
        scales = k_storage.view(scale_dtype).as_strided(
            (k_pages, k_page), strides, first // scale_dtype.itemsize
        )
        return state, k_cache, scales, storages
    scale_storage = _storage(k_pages * k_page * 8, numbers)
    scales = scale_storage.view(scale_dtype).as_strided((k_pages, k_page), (k_page * 2, 2), 0)
    return state, k_cache, scales, (*storages, scale_storage)


def _stride(stride: int | None, page: int) -> int:
    """Bytes from page to page: as many strides as a page of so many bytes needs."""
    return page if stride is None else stride * _ceil(page, stride)


def _storage(size: int, numbers: torch.Generator) -> Tensor:
    """At least so many random bytes, by eights."""
    words = torch.randint(-(2**63), 2**63 - 1, (_ceil(size, 8),), generator=numbers)
    return words.view(torch.uint8)


def _projection(
    geometry: Geometry,
    seed: int,
    request: int,
    begin: int,
    end: int,
    spread: Spread,
    extreme: bool,
) -> Tensor:
    """[end - begin, row width]: the rows of a request at these positions, the same whatever the
    others are."""
    blocks = []
    for block in range(begin // _BLOCK, _ceil(end, _BLOCK)):
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


def _rope_table(positions: int) -> Tensor:
    frequency = 160000.0 ** (-torch.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
