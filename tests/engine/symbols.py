"""Symbols for the rows of caches, and what is right.

A row's symbol is the history of its token: a hash of its request's tokens up to it. So a read is
right if it finds what the request's own tokens give, whoever wrote it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dsv4_indexer.contract import (
    LATE,
    MASKED,
    NO_WINDOW,
    Extents,
    Geometry,
    Plan,
    row_source,
)

NOTHING = 0  # in a row that nobody wrote, or that another cache has overwritten


def histories(tokens: np.ndarray) -> np.ndarray:
    """The symbol of each token, int64: a hash (splitmix64) of every token and its place, summed."""
    place = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    mixed = (place << np.uint64(20)) + tokens.astype(np.uint64)
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.cumsum(mixed ^ (mixed >> np.uint64(31))).view(np.int64)


Reads = Callable[[int, int], range]


def last(size: int) -> Reads:
    """A token reads the rows of the last `size` positions, its own included."""
    return lambda start, end: range(max(start - size + 1, 0), end)


def entries(ratio: int) -> Reads:
    """A token reads every entry up to its own."""
    return lambda start, end: range(end // ratio)


@dataclass
class Cache:
    """What a layer's cache holds.

    group: of the KV cache groups, which share blocks but not tables. ratio: positions of a row.
    reads: the rows that the tokens [start, end) of a request read, behind the writes of their step.
    rows: int64 [blocks, rows of a block], the symbol of each row's last position.
    """

    layer: str
    group: int
    ratio: int
    reads: Reads
    rows: np.ndarray

    @staticmethod
    def empty(layer: str, group: int, ratio: int, reads: Reads, shape: tuple[int, int]) -> "Cache":
        return Cache(layer, group, ratio, reads, np.full(shape, NOTHING, dtype=np.int64))


class Memory:
    """The blocks of all caches. A block belongs to the group that wrote it last: what other groups'
    caches held there is lost. Block 0 holds nothing."""

    def __init__(self, caches: list[Cache]):
        self.caches = {cache.layer: cache for cache in caches}
        self.owner = np.full(len(caches[0].rows), -1)

    def write(self, cache: Cache, slots: np.ndarray, symbols: np.ndarray) -> None:
        """Each symbol at its slot; at none if that is -1."""
        written = slots >= 0
        block, row = np.divmod(slots[written], cache.rows.shape[1])
        taken = block[self.owner[block] != cache.group]
        for other in self.caches.values():
            if other.group != cache.group:
                other.rows[taken] = NOTHING
        self.owner[block] = cache.group
        cache.rows[block, row] = symbols[written]
        cache.rows[0] = NOTHING


class Batch:
    """The requests of a step, each with its symbols, in the order of their rows in the tables."""

    def __init__(self, runner: Any):
        batch = runner.input_batch
        self.names = batch.req_ids
        self.starts = batch.num_computed_tokens_cpu[: len(self.names)]
        self.ends = self.starts + np.diff(runner.query_start_loc.np[: len(self.names) + 1])
        self.past = [histories(batch.token_ids_cpu[r, :end]) for r, end in enumerate(self.ends)]
        self.tables = [table.block_table.np for table in batch.block_table.block_tables]

    def of_tokens(self, values: Iterator[np.ndarray]) -> np.ndarray:
        """What there is for each position of each request, for the tokens of the step."""
        parts = zip(values, self.starts, self.ends)
        return np.concatenate([value[start:end] for value, start, end in parts])

    @property
    def symbols(self) -> np.ndarray:
        """[T]: of each token."""
        return self.of_tokens(iter(self.past))

    def windows(self, size: int) -> np.ndarray:
        """[T, size]: of the positions up to each token's, NOTHING before the first."""
        view = np.lib.stride_tricks.sliding_window_view
        return self.of_tokens(view(np.pad(past, (size - 1, 0)), size) for past in self.past)

    def who(self, token: int) -> tuple[str, int]:
        """The request and position of a token of the step."""
        lengths = self.ends - self.starts
        request = int(np.searchsorted(lengths.cumsum(), token, side="right"))
        return self.names[request], int(self.ends[request] + token - lengths[: request + 1].sum())

    def check(self, cache: Cache) -> None:
        """Every row that a token of the step reads, found through the request's table."""
        for request, (start, end) in enumerate(zip(self.starts.tolist(), self.ends.tolist())):
            row = np.array(cache.reads(start, end), dtype=np.int64)
            block, offset = np.divmod(row, cache.rows.shape[1])
            block = self.tables[cache.group][request, block]
            right = self.past[request][(row + 1) * cache.ratio - 1]
            wrong = np.flatnonzero(cache.rows[block, offset] != right)
            assert not len(wrong), (
                f"{cache.layer}: request {self.names[request]}, tokens {start} to {end - 1}: "
                f"row {row[wrong[0]]}, in block {block[wrong[0]]}, is not what its tokens give"
            )


@dataclass
class SymbolicLayer:
    """What `ops.BoundLayer` is: reads the rows that the plan names, then writes."""

    memory: Memory
    state: Cache
    keys: Cache
    extents: Extents
    geometry: Geometry
    batch: Batch | None = None
    of_other_requests: int = 0  # rows that windows took from tokens of other requests

    @property
    def layer(self) -> Any:
        return SimpleNamespace(k_cache=self.keys.rows)

    def run(self, symbols: torch.Tensor, plan: torch.Tensor) -> None:
        step, rows = Plan.of(plan, self.geometry.ratio), symbols.numpy()
        token = (step.windows != NO_WINDOW).nonzero()[:, 0]
        own = token[:, None] - torch.arange(self.geometry.window - 1, -1, -1)
        late = step.windows[token, None] == LATE
        sources = torch.where(late, own, step.sources[token]).numpy()
        self.of_other_requests += int(((sources >= 0) & (sources != own.numpy())).sum())
        self._check(token.tolist(), sources, rows)
        for cache, slots in ((self.state, step.state_slots), (self.keys, step.k_slots)):
            self.memory.write(cache, slots.numpy(), rows)

    def _check(self, token: list[int], sources: np.ndarray, rows: np.ndarray) -> None:
        slots = np.maximum(row_source(sources), 0)
        block, row = np.divmod(slots, self.state.rows.shape[1])
        found = np.where(sources >= 0, rows[np.maximum(sources, 0)], self.state.rows[block, row])
        found[sources == MASKED] = NOTHING
        size = sources.shape[1]
        wrong = np.argwhere(found != self.batch.windows(size)[token])
        if len(wrong):
            window, row = wrong[0].tolist()
            name, position = self.batch.who(token[window])
            source = int(sources[window, row])
            where = f"token {source}" if source >= 0 else f"state row {row_source(source)}"
            raise AssertionError(
                f"request {name}: the window that ends at position {position} takes the row of "
                f"position {position - size + 1 + row} from {where}, which is not what the "
                "request's tokens give"
            )
