"""Calls in which requests share a prefix that others fill in the same call, by what is shared."""

from batches import Batch, Prefixes, make_batch

# Requests, as (start, length), and the prefixes that some of them share.
SHARED: dict[str, tuple[list[tuple[int, int]], Prefixes]] = {
    "one sharer": ([(0, 64), (64, 20)], {1: (0, 64)}),
    "many sharers": ([(0, 40), (40, 1), (40, 4), (40, 5), (40, 9), (40, 60)], {r: (0, 40) for r in range(1, 6)}),
    "a sharer of a sharer": ([(0, 64), (64, 16), (80, 16)], {1: (0, 64), 2: (1, 80)}),
    "a sharer whose window has rows of two others": ([(0, 68), (64, 8), (72, 7)], {1: (0, 64), 2: (1, 72)}),
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
