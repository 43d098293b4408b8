"""Steps in which requests share a prefix that others fill, and steps told by their requests."""

import random

import torch

from batches import MAX_POSITION, Batch, Prefixes, make_batch, random_case
from vllm_dsv4_indexer.contract import RATIO, WINDOW, Extents, Requests

PAGES = (2, 4, 8)  # of the state, in tokens
K_PAGE = 32  # entries

# Requests, as (start, length), and the prefixes that some of them share.
SHARED: dict[str, tuple[list[tuple[int, int]], Prefixes]] = {
    "one sharer": ([(0, 64), (64, 20)], {1: (0, 64)}),
    "many sharers": (
        [(0, 40), *((40, n) for n in (1, 4, 5, 9, 60))],
        dict.fromkeys(range(1, 6), (0, 40)),
    ),
    "a sharer of a sharer": ([(0, 64), (64, 16), (80, 16)], {1: (0, 64), 2: (1, 80)}),
    "a window with rows of two others": ([(0, 68), (64, 8), (72, 7)], {1: (0, 64), 2: (1, 72)}),
    "a prefix that began in an earlier call": ([(57, 7), (64, 12)], {1: (0, 64)}),
    "an owner of a single token": ([(63, 1), (64, 12), (64, 4)], {1: (0, 64), 2: (0, 64)}),
    "sharers behind a decode token's page": ([(71, 1), (72, 1), (72, 8)], {1: (0, 72), 2: (0, 72)}),
    "beside other prompts and decode tokens": (
        [(17, 1), (0, 130), (30, 1), (128, 9), (3, 1), (128, 4), (8, 70), (72, 3), (72, 130)],
        {3: (1, 128), 5: (1, 128), 7: (6, 72), 8: (6, 72)},
    ),
}


def shared_batch(name: str, **options) -> Batch:
    requests, prefixes = SHARED[name]
    return make_batch(requests, prefixes=prefixes, **options)


def by_requests(
    requests: list[tuple[int, int]], prefixes: Prefixes, pick: random.Random, page: int
) -> tuple[Requests, Extents]:
    """The requests in vLLM Ascend's form, with the pages that each needs and block 0 elsewhere."""
    count, ends = len(requests), [start + length for start, length in requests]
    columns, k_columns = max(ends) // page + 1, max(ends) // (RATIO * K_PAGE) + 1
    blocks = pick.sample(range(1, count * columns + 3), count * columns)
    keys = pick.sample(range(1, count * k_columns + 3), count * k_columns)
    state = torch.zeros(count, columns, dtype=torch.int32)
    for row, (start, _) in enumerate(requests):
        owner, shared = prefixes.get(row, (row, 0))
        for column in range(max(start - WINDOW, 0) // page, -(-ends[row] // page)):
            state[row, column] = state[owner, column] if column * page < shared else blocks.pop()
    starts = torch.tensor([0] + [length for _, length in requests]).cumsum(0).int()
    start_pos = torch.tensor([start for start, _ in requests], dtype=torch.int32)
    extents = Extents(count * columns + 3, page, (count * k_columns + 3) * K_PAGE, MAX_POSITION)
    k_table = torch.tensor(keys, dtype=torch.int32).view(count, k_columns)
    return Requests(starts, start_pos, state, k_table), extents


def padded(requests: Requests, count: int) -> Requests:
    """With so many requests of a graph's padding, without tokens and with block 0."""
    starts, start_pos, state, keys, mapping = requests
    starts = torch.cat([starts, starts[-1:].expand(count)])
    longer = (torch.cat([t, t.new_zeros(count, *t.shape[1:])]) for t in (start_pos, state, keys))
    return Requests(starts, *longer, mapping)


def random_requests(seed: int) -> tuple[Requests, int, Extents]:
    pick = random.Random(seed)
    case = random_case(pick)
    requests, extents = by_requests(case["requests"], case["prefixes"], pick, case["page"])
    tokens = int(requests.query_start_loc[-1]) + pick.choice((0, 0, 1, 9))
    if pick.random() < 0.5:
        requests = padded(requests, pick.randrange(1, 4))
    return requests, tokens, extents
