"""Steps in which requests share a prefix that others fill, steps told by their requests, and how a
device's plan of a step is compared."""

import random

import torch

from batches import Batch, Prefixes, make_batch, random_case
from vllm_dsv4_indexer.contract import EARLY, Extents, Plan, PlanHeader, Requests

PAGES = (2, 4, 8)  # of the state, in tokens
K_PAGE = 32  # entries
INT8 = {"k_format": "int8_hadamard", "k_page": K_PAGE}

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


def padded(requests: Requests, count: int) -> Requests:
    """With so many requests of a graph's padding, without tokens and with block 0."""
    starts, start_pos, state, keys, mapping = requests
    starts = torch.cat([starts, starts[-1:].expand(count)])
    longer = (torch.cat([t, t.new_zeros(count, *t.shape[1:])]) for t in (start_pos, state, keys))
    return Requests(starts, *longer, mapping)


def random_requests(seed: int) -> tuple[Requests, int, Extents]:
    pick = random.Random(seed)
    case = random_case(pick)
    batch = make_batch(**case | INT8 | {"layout": "dense"})
    tokens = len(batch.positions)
    requests = batch.requests
    if pick.random() < 0.5:
        requests = padded(requests, pick.randrange(1, 4))
    return requests, tokens, Extents.of(batch.call.layer)


def assert_same_plan(actual: torch.Tensor, expected: torch.Tensor, case: object = "") -> None:
    """But for what a device cannot know: how many windows there are, and whether slots are unique.
    The reference has all windows early if they are not."""
    ours, theirs = Plan.of(actual.cpu()), Plan.of(expected.cpu())
    told = PlanHeader.of(theirs.header)
    header = told._replace(entries=-1, early=-1, unique=1, saved=-1, shared=-1)
    assert ours.header.tolist() == [*header] + [0] * (len(ours.header) - len(header)), case
    for name in ("positions", "requests", "state_slots", "k_slots"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, case)
    if told.unique:
        assert torch.equal(ours.windows, theirs.windows), case
    early = ours.windows == EARLY
    assert torch.equal(ours.sources[early], theirs.sources[early]), case
