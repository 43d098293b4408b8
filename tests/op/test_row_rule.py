"""A prefix that a request finds computed, and that another request fills in the same call: the row
rule.

Whatever is in one call, each request stores what it stores alone, after the one whose prefix it
shares.
"""

import random

import pytest
import torch

from batches import (
    Batch,
    Prefixes,
    assert_close,
    assert_identical,
    make_batch,
    one_after_the_other,
    tokens_of,
)
from vllm_dsv4_indexer.contract import EARLY, RATIO, Plan, PlanHeader

IMPLS = ("reference", "cpu")
PAGES = (2, 4, 8)
WITH_SCATTER = (*IMPLS, "scatter_pool")  # right where rows are unique


def assert_as_alone(batch: Batch, impl: str, case: object = "") -> None:
    assert_identical(batch.clone().compress(impl), one_after_the_other(batch.clone(), impl), case)


@pytest.mark.parametrize("impl", WITH_SCATTER)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("length", (8, 64, 128))
@pytest.mark.parametrize("sharers", (1, 2, 9))
def test_sharers_store_what_they_store_after_the_owner(impl, page, length, sharers):
    """Their tails are of 1 to 9 tokens: a window may close on the first token, or on none."""
    requests = [(0, length + 7), *((length, 1 + i % 9) for i in range(sharers))]
    prefixes = {1 + i: (0, length) for i in range(sharers)}
    assert_as_alone(make_batch(requests, page=page, prefixes=prefixes), impl)


@pytest.mark.parametrize("impl", WITH_SCATTER)
@pytest.mark.parametrize("tail", range(1, 10))
@pytest.mark.parametrize("beyond", (0, 1, 4, 30))
def test_the_owner_may_end_with_the_prefix_or_go_on(impl, tail, beyond):
    assert_as_alone(make_batch([(0, 64 + beyond), (64, tail)], prefixes={1: (0, 64)}), impl)


@pytest.mark.parametrize("impl", WITH_SCATTER)
@pytest.mark.parametrize("page", PAGES)
def test_a_sharer_of_a_sharer(impl, page):
    requests = [(0, 70), (64, 75), (136, 20), (128, 5)]
    prefixes = {1: (0, 64), 2: (1, 136), 3: (2, 128)}
    assert_as_alone(make_batch(requests, page=page, prefixes=prefixes), impl)


@pytest.mark.parametrize("impl", WITH_SCATTER)
@pytest.mark.parametrize("start", (57, 60, 62, 63))
def test_the_owner_may_fill_only_the_last_rows_of_the_prefix(impl, start):
    """A decode token that completes a block, say: the rows before it are history of both."""
    assert_as_alone(
        make_batch([(start, 64 - start), (64, 9), (64, 3)], prefixes={1: (0, 64), 2: (0, 64)}), impl
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ([1, 0, 2], [2, 1, 0], [1, 2, 0]))
def test_the_place_of_the_owner_in_the_call_changes_nothing(impl, order):
    batch = make_batch([(0, 64), (64, 9), (64, 30)], prefixes={1: (0, 64), 2: (0, 64)})
    expected = batch.clone().compress(impl)
    turned = batch.take(torch.cat([tokens_of(batch, request) for request in order]))
    assert_identical(turned.compress(impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("ring", (None, 16, 64))
def test_beside_rings_decode_tokens_and_padding(impl, page, ring):
    requests = [(90, 33), (0, 130), (128, 1), (131, 1), (128, 40), (63, 1), (64, 50)]
    prefixes = {2: (1, 128), 4: (1, 128), 6: (5, 64)}
    assert_as_alone(make_batch(requests, page=page, ring=ring, padding=5, prefixes=prefixes), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_at_the_same_slot_and_another_position_is_not_taken(impl):
    """A page is recycled within the call: one request reads what is in it, another overwrites
    it."""
    batch = make_batch([(40, 8), (0, 16)])
    expected = batch.clone().compress(impl).entries()[:2]
    reader, writer = tokens_of(batch, 0), tokens_of(batch, 1)
    table = batch.inner_state_block_table
    table[1, :2] = table[0, 8:10]  # positions 32 .. 39 of the reader, 0 .. 7 of the writer
    batch.inner_state_slot_mapping[writer[:8]] = (
        table[1, :2, None].long() * 4 + torch.arange(4)
    ).flatten()
    both = batch.take(torch.cat([writer, reader])).compress(impl)
    assert both.entries()[-2:] == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_at_the_same_position_and_another_slot_is_not_taken(impl):
    """Two prompts at the same positions which share nothing."""
    batch = make_batch([(64, 9), (0, 72)])
    expected = batch.clone().take(tokens_of(batch, 0)).compress(impl).entries()
    assert batch.compress(impl).entries()[: len(expected)] == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_of_two_tokens_at_one_slot_and_position_the_last_is_taken(impl):
    """As of two tokens that are saved in one row. With another slot twice in the call, too."""
    for spoil in (False, True):
        batch = make_batch([(0, 64), (0, 64), (64, 4)], prefixes={2: (1, 64)})
        batch.inner_state_block_table[0] = batch.inner_state_block_table[1]
        batch.inner_state_slot_mapping[:64] = batch.inner_state_slot_mapping[64:128]
        if spoil:
            batch.inner_state_slot_mapping[70] = batch.inner_state_slot_mapping[60]
        together, apart = batch.clone().compress(impl), one_after_the_other(batch.clone(), impl)
        assert together.entries()[-1] == apart.entries()[-1]


def calls_of(
    requests: list[tuple[int, int]], prefixes: Prefixes, pick: random.Random
) -> list[list[int]]:
    """The packed tokens, cut into calls as a scheduler may: a request waits until its prefix is
    filled, at the latest by the call that it starts in, which may have it in any place."""
    first = [sum(length for _, length in requests[:r]) for r in range(len(requests))]
    done = [0] * len(requests)
    calls = []
    while any(done[r] < length for r, (_, length) in enumerate(requests)):
        parts = []
        for r in pick.sample(range(len(requests)), len(requests)):
            owner, length = prefixes.get(r, (r, 0))
            if requests[owner][0] + done[owner] < length:
                continue
            n = min(pick.choice((0, 1, 1, 2, 5, 40, 200)), requests[r][1] - done[r])
            parts.append(list(range(first[r] + done[r], first[r] + done[r] + n)))
            done[r] += n
        pick.shuffle(parts)
        calls.append(sum(parts, []))
    return calls


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(12))
def test_any_cut_into_calls_changes_no_byte(impl, seed):
    pick = random.Random(seed)
    requests = [(0, 150), (64, 90), (128, 9), (144, 30), (5, 40), (128, 3)]
    prefixes = {1: (0, 64), 2: (1, 128), 3: (1, 144), 5: (0, 128)}
    whole = make_batch(requests, page=pick.choice(PAGES), seed=seed, prefixes=prefixes)
    cut = whole.clone()
    for call in calls_of(requests, prefixes, pick):
        cut.take(call).compress(impl)
    assert_identical(cut, one_after_the_other(whole, impl), f"calls_of(..., Random({seed}))")


@pytest.mark.parametrize("seed", range(6))
def test_the_native_kernel_stores_what_the_reference_stores(seed):
    batch = make_batch(
        [(0, 150), (64, 90), (128, 9)], seed=seed, prefixes={1: (0, 64), 2: (1, 128)}, padding=2
    )
    assert_close(batch.clone().compress("cpu"), batch.clone().compress("reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_rows_before_a_request_come_from_another(impl):
    """The look-up concerns at most the seven rows before a request's first token."""
    batch = make_batch([(0, 64), (64, 12)], prefixes={1: (0, 64)})
    plan = Plan.of(batch.plan(impl))
    assert PlanHeader.of(plan.header).shared == 4
    early = (plan.windows == EARLY).nonzero()[:, 0].tolist()
    assert early == [3, 64 + RATIO - 1]  # each request's first window; the next ones are late
    assert plan.sources[early[1]].tolist() == [60, 61, 62, 63, 64, 65, 66, 67]
