"""Requests that advance in random chunks over recycled pages, and what a step of theirs must store,
found by hand."""

import random

import torch
from layer import BLOCKS, EPS, Layer, Rows
from torch import Tensor
from vllm_ascend.ops.rope_dsv4 import get_full_cos_and_sin_dsa

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import RATIO, WINDOW

LONGEST = 200


class Request:
    def __init__(self):
        self.computed, self.state_table, self.k_table = 0, [], []


class Schedule:
    """A block manager that frees state pages as vLLM's does, as soon as no window can need them,
    and hands out first what was freed last. Block 0 is the null block."""

    def __init__(self, seed: int, page: int, k_page: int, decode_tokens: int = 1):
        self.random, self.page, self.k_page, self.decode_tokens = (
            random.Random(seed),
            page,
            k_page,
            decode_tokens,
        )
        self.free, self.k_free = list(range(1, BLOCKS)), list(range(1, BLOCKS))
        self.random.shuffle(self.free)
        self.random.shuffle(self.k_free)
        self.requests = [Request() for _ in range(4)]

    def step(self) -> Rows:
        """Some of the requests, each by a chunk; one that is long enough ends, and another takes
        its place."""
        for index, request in enumerate(self.requests):
            if request.computed > LONGEST:
                self.free += filter(None, request.state_table)
                self.k_free += request.k_table
                self.requests[index] = Request()
        chosen = self.random.sample(self.requests, self.random.randint(1, len(self.requests)))
        chunks = [(request, self._length()) for request in chosen]
        chunks.sort(key=lambda chunk: chunk[1] > self.decode_tokens)
        for request, length in chunks:
            self._advance(request, length)
        return Rows(
            starts=[request.computed - length for request, length in chunks],
            lengths=[length for _, length in chunks],
            state_tables=[list(request.state_table) for request, _ in chunks],
            k_tables=[list(request.k_table) for request, _ in chunks],
        )

    def _length(self) -> int:
        longest = (
            self.decode_tokens if self.random.random() < 0.6 else self.random.choice((7, 9, 50))
        )
        return self.random.randint(1, longest)

    def _advance(self, request: Request, length: int) -> None:
        for column, page in enumerate(request.state_table):
            if page and (column + 1) * self.page <= request.computed - (WINDOW - 1):
                request.state_table[column] = 0
                self.free.append(page)
        request.computed += length
        while len(request.state_table) * self.page < request.computed:
            request.state_table.append(self.free.pop())
        while len(request.k_table) * self.k_page * RATIO < request.computed:
            request.k_table.append(self.k_free.pop())


def slots(rows: Rows, page: int, k_page: int) -> tuple[list[int], list[int]]:
    """The state slot of each token, and the K slot of each that closes a window, else -1."""
    state_slots, k_slots = [], []
    for request, position in rows.tokens():
        state_slots.append(rows.state_tables[request][position // page] * page + position % page)
        entry = position // RATIO
        block = rows.k_tables[request][entry // k_page]
        k_slots.append(block * k_page + entry % k_page if position % RATIO == RATIO - 1 else -1)
    return state_slots, k_slots


def store(layer: Layer, storages: list[Tensor], rows: Rows, x: Tensor) -> None:
    """What the step must do to the storages, by the readable op on arguments that are made here."""
    state, k, k_scale, *page = layer.views(storages)
    if page:  # an A5's
        keys = dict(k_cache=page[0].view(torch.uint8)[:, :, 0], k_format="fp8_amax")
    else:
        keys = dict(k_cache=k[:, :, 0], k_scale_cache=k_scale[:, :, 0, 0], k_format="int8_hadamard")
    compressor = layer.module.indexer.compressor
    cos, sin = get_full_cos_and_sin_dsa("c4")
    request, positions = zip(*rows.tokens())
    state_slots, k_slots = slots(rows, layer.page, layer.k_page)
    width = max(map(len, rows.state_tables))
    table = [row + [0] * (width - len(row)) for row in rows.state_tables]
    ops.compress(
        (
            x.double() @ layer.projection.double().t()
        ).float(),  # exact: the factors are small multiples of 1/32
        compressor.ape,
        compressor.norm.weight,
        torch.cat([cos[:, 0, 0, ::2], sin[:, 0, 0, ::2]], dim=1),
        torch.tensor(positions),
        torch.tensor(request, dtype=torch.int32),
        torch.tensor(state_slots),
        torch.tensor(table, dtype=torch.int32),
        state[:, :, 0],
        torch.tensor(k_slots),
        **keys,
        eps=EPS,
        impl="reference",
    )
