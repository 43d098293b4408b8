"""Tail-only saving: what is kept is enough, each row of it is needed, and it is too little for who
goes back."""

import random
from dataclasses import replace

import pytest
import torch

from batches import IMPLS, Batch, make_batch
from test_invariance import interleavings
from vllm_dsv4_indexer.ops.tail import tail_slots

STARTS = (*range(9), 63, 64, 65, 66)
LENGTHS = (*range(1, 14), 64, 65, 66, 67)


def tail_of(batch: Batch) -> Batch:
    """The same call, which saves the tail alone."""
    slots = tail_slots(batch.positions, batch.token_to_req, batch.inner_state_slot_mapping)
    return replace(batch, inner_state_slot_mapping=slots)


def kept(batch: Batch) -> list[int]:
    """The positions whose rows a call of one request saves."""
    return batch.positions[batch.inner_state_slot_mapping >= 0].tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(10))
def test_the_tail_is_enough_for_any_calls_that_go_on_where_the_last_one_ended(impl, seed):
    pick = random.Random(seed)
    requests = [(pick.randrange(140), pick.randrange(1, 200)) for _ in range(pick.randrange(1, 6))]
    options = {
        "seed": seed,
        "page": pick.choice((2, 4, 8)),
        "layout": pick.choice(("dense", "padded", "engine")),
        "kv_dtype": pick.choice((torch.float32, torch.bfloat16)),
    }
    whole = make_batch(requests, **options)
    cut = whole.clone()
    for call in interleavings(requests, pick):
        tail_of(cut.take(call)).compress(impl)
    assert cut.entries() == whole.compress(impl).entries(), f"seed {seed}: {requests}, {options}"


@pytest.mark.parametrize("start", STARTS)
def test_of_each_request_the_last_whole_group_and_the_open_one_are_saved(start):
    for length in LENGTHS:
        end = start + length
        assert kept(tail_of(make_batch([(start, length)]))) == list(
            range(max(start, end - end % 4 - 4), end)
        ), length


@pytest.mark.parametrize("start", STARTS)
def test_the_windows_to_come_read_every_row_of_the_tail(start):
    for length in LENGTHS:
        batch = make_batch([(start, length + 8)])
        expected = batch.clone().compress("cpu").entries()
        tail = tail_of(batch.take(slice(length)))
        for token in (tail.inner_state_slot_mapping >= 0).nonzero()[:, 0].tolist():
            cut = batch.clone()
            slots = tail.inner_state_slot_mapping.clone()
            slots[token] = -1
            replace(cut.take(slice(length)), inner_state_slot_mapping=slots).compress("cpu")
            cut.take(slice(length, None)).compress("cpu")
            assert cut.entries() != expected, (
                f"length {length}, without the row of position {start + token}"
            )


def test_a_padding_row_that_looks_like_the_next_token_ends_no_tail():
    batch = make_batch([(5, 6), (0, 9)])
    last_request = slice(6, None)
    looks = batch.take([*range(15), *range(6, 15)])
    looks.positions[15:] += 9
    for slots in (looks.inner_state_slot_mapping, looks.k_slot_mapping):
        slots[15:] = -1
    assert kept(tail_of(looks).take(slice(6, 15))) == kept(tail_of(batch.take(last_request)))


@pytest.mark.parametrize("back_to", range(8, 20, 4))
@pytest.mark.parametrize("tail", (False, True), ids=("full", "tail"))
def test_who_goes_back_to_an_earlier_group_needs_full_saving(tail, back_to):
    """What a prefix-cache hit does, and a rejected draft that is longer than the open group."""
    batch = make_batch([(0, 24)])
    expected = batch.clone().compress("cpu").entries()
    (tail_of(batch) if tail else batch).compress("cpu")
    batch.take(slice(back_to, None)).compress("cpu")
    right = [a == b for a, b in zip(batch.entries(), expected)]
    assert right == [not tail or entry != back_to // 4 for entry in range(6)]
