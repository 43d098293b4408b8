"""Which pages of the caches the requests of a batch hold, as block tables."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Geometry

# A request's computed prefix, which another request of the batch fills: {request: (the other, its
# length)}.
Prefixes = dict[int, tuple[int, int]]


class Pages(NamedTuple):
    """The block tables of the state and of the K cache, how many tokens and entries a page of each
    has, and how many pages there are."""

    table: Tensor
    k_table: Tensor
    page: int
    k_page: int
    state_pages: int
    k_pages: int


def lay_out(
    geometry: Geometry,
    requests: list[tuple[int, int]],
    page: int,
    k_page: int,
    ring: int | None,
    prefixes: Prefixes,
    shared: bool,
    order: torch.Generator,
) -> Pages:
    """Pages in any order. Page 0 and a few others are nobody's. In a shared storage the pages are
    as many as both need, and those of the K cache come last."""
    sharing = prefixes.keys() | {owner for owner, _ in prefixes.values()}
    rings = [None if request in sharing else ring for request in range(len(requests))]
    ends = [start + length for start, length in requests]
    # What lies before the last window is freed.
    live = [
        range(max(start - geometry.window, 0) // page, ceil(end, page))
        for (start, _), end in zip(requests, ends)
    ]
    held = [min(len(those), ceil(ring or end, page)) for those, end, ring in zip(live, ends, rings)]
    k_held = [ceil(end, geometry.ratio * k_page) for end in ends]
    state_pages = sum(held) + 3
    k_pages = sum(k_held) + 2 + (state_pages if shared else 0)
    first_k_page = state_pages if shared else 1
    free_k = first_k_page + torch.randperm(sum(k_held) + 1, generator=order)
    free = 1 + torch.randperm(sum(held) + 2, generator=order)
    table, k_table = _table(live, held, free), _table([range(n) for n in k_held], k_held, free_k)
    _share(prefixes, requests, table, page)
    return Pages(table, k_table, page, k_page, k_pages if shared else state_pages, k_pages)


def _share(prefixes: Prefixes, requests: list[tuple[int, int]], table: Tensor, page: int) -> None:
    """Gives requests the pages of the prefixes that others fill."""
    for request, (owner, length) in prefixes.items():
        assert length % page == 0, "prefixes are shared by whole pages"
        assert length <= requests[request][0], "a shared prefix is computed"
        table[request, : length // page] = table[owner, : length // page]


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


def tokens_of(positions: list[range]) -> tuple[Tensor, Tensor]:
    """The request and the position of each token."""
    pairs = [(request, position) for request, those in enumerate(positions) for position in those]
    request, position = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return request, position


def slots_of(table: Tensor, request: Tensor, index: Tensor, page: int) -> Tensor:
    """Where a cache with pages of that size has the rows, or entries, of that index."""
    return table[request, index // page].long() * page + index % page


def ceil(a: int, b: int) -> int:
    return -(-a // b)
