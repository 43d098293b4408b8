"""Batches in which requests share the pages of a prefix that others fill in the same call."""

from dataclasses import dataclass

from batches import Batch, make_batch

from vllm_dsv4_indexer.contract import WINDOW


@dataclass(frozen=True)
class Request:
    start: int
    length: int
    of: int | None = None  # the request, before this one, whose pages hold the positions before `start`


def shared_batch(requests: list[Request], **options) -> Batch:
    """A batch of `requests`. A sharer begins with a page; of what lies before it, it has no pages of
    its own."""
    batch = make_batch([(r.start, r.length) for r in requests], **options)
    table, page = batch.inner_state_block_table, batch.inner_state_cache.shape[1]
    for row, request in enumerate(requests):
        if request.of is None:
            continue
        assert request.start % page == 0 and request.of < row
        shared = range(max(request.start - WINDOW, 0) // page, request.start // page)
        for column in shared:
            table[row, column] = table[request.of, column]
    return batch


def one_after_the_other(batch: Batch, requests: int) -> list[Batch]:
    """The call cut into one a request, in order: then a prefix is in the state when a sharer comes."""
    of_one = [(batch.token_to_req == r).nonzero()[:, 0] for r in range(requests)]
    return [batch.take(tokens) for tokens in of_one]


# By name: what is shared. All starts are multiples of eight, the largest page.
SHARED = {
    "one sharer": [Request(0, 64), Request(64, 20, of=0)],
    "many sharers": [Request(0, 40), *(Request(40, n, of=0) for n in (1, 4, 5, 9, 60))],
    "a sharer of a sharer": [Request(0, 64), Request(64, 16, of=0), Request(80, 16, of=1)],
    "a sharer of four tokens of a sharer": [Request(0, 64), Request(64, 8, of=0), Request(72, 7, of=1)],
    "a prefix that began in an earlier call": [Request(57, 7), Request(64, 12, of=0)],
    "an owner of a single token": [Request(63, 1), Request(64, 12, of=0), Request(64, 4, of=0)],
    "a sharer of a decode token's page": [Request(71, 1), Request(72, 1, of=0), Request(72, 8, of=0)],
    "beside other prompts and decode tokens": [
        Request(17, 1), Request(0, 130), Request(30, 1), Request(128, 9, of=1), Request(3, 1),
        Request(128, 4, of=1), Request(8, 70), Request(72, 3, of=6), Request(72, 130, of=6),
    ],
}  # fmt: skip


def random_sharing(pick) -> list[Request]:
    """Prompts, decode tokens, and sharers of either at the end of a page of eight."""
    requests: list[Request] = []
    for _ in range(pick.randrange(2, 12)):
        owner = pick.randrange(len(requests)) if requests else None
        ends = [] if owner is None else _ends_of_pages(requests[owner])
        if ends and pick.random() < 0.7:
            requests.append(Request(pick.choice(ends), pick.choice((1, 3, 4, 8, 9, 33)), of=owner))
        else:
            requests.append(Request(pick.randrange(100), pick.choice((1, 1, 2, 9, 40, 90))))
    return requests


def _ends_of_pages(request: Request, page: int = 8) -> list[int]:
    return [p for p in range(request.start + 1, request.start + request.length + 1) if p % page == 0]

