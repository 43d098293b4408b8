"""What checked mode finds in a step: each planted fault by its name, and nothing in a step that a
scheduler may make."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from batches import Batch, make_batch, tokens_of
from steps import PAGES, SHARED
from test_row_rule import calls_of
from vllm_dsv4_indexer.contract import ContractError, Extents
from vllm_dsv4_indexer.ops.invariants import Ledger, Scheduled, check_step, check_values

REQUESTS = [(0, 130), (64, 9), (71, 1), (5, 2), (66, 70)]
PREFIXES = {1: (0, 64)}
PADDING = 2


@dataclass
class Step:
    """A step as an engine schedules it, with what the steps before it have saved."""

    batch: Batch
    ledger: Ledger
    padding: int = PADDING

    @property
    def scheduled(self) -> Scheduled:
        tokens = len(self.batch.positions) - self.padding
        tables = self.batch.requests.k_block_table
        return Scheduled(self.batch.call.step, tokens, tables, self.batch.k_cache.shape[1])

    def check(self) -> None:
        self.batch.plan("reference")  # as an engine does first
        check_step(self.scheduled, self.ledger)
        check_values(self.scheduled, self.batch.kv_score)

    def slots(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        """Of the state, where the request's block table has them."""
        page = self.batch.inner_state_cache.shape[1]
        pages = self.batch.inner_state_block_table[request, positions // page].long()
        return torch.where(pages > 0, pages * page + positions % page, -1)


def step_of(requests=REQUESTS, prefixes=PREFIXES, **options) -> Step:
    batch = make_batch(requests, prefixes=prefixes, padding=PADDING, **options)
    step = Step(batch, Ledger(Extents.of(batch.call.layer)))
    for request, (start, _) in enumerate(requests):
        positions = torch.arange(prefixes.get(request, (0, 0))[1], start)
        step.ledger.save(step.slots(request, positions), positions)
    return step


# ---- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", SHARED)
def test_a_prefix_that_another_request_fills_in_the_step_is_right(name, page):
    requests, prefixes = SHARED[name]
    step_of(requests, prefixes, page=page).check()


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_of_requests_into_steps_is_right(seed):
    pick = random.Random(seed)
    requests = [(0, 150), (64, 90), (128, 9), (144, 30), (5, 40), (128, 3)]
    prefixes = {1: (0, 64), 2: (1, 128), 3: (1, 144), 5: (0, 128)}
    step = step_of(requests, prefixes, page=pick.choice(PAGES), seed=seed)
    for tokens in calls_of(requests, prefixes, pick):
        part = Step(step.batch.take(tokens), step.ledger, padding=0)
        part.check()
        step.ledger.save(part.batch.inner_state_slot_mapping, part.batch.positions)


def test_positions_that_are_run_again_after_rejected_drafts_are_right():
    step = step_of([(64, 9)], {})
    for tokens in ([0, 1, 2, 3], [2, 3, 4, 5], [3], [4, 5, 6, 7, 8]):
        part = Step(step.batch.take(tokens), step.ledger, padding=0)
        part.check()
        step.ledger.save(part.batch.inner_state_slot_mapping, part.batch.positions)


def test_a_page_that_was_freed_belongs_to_the_request_that_gets_it():
    step = step_of([(0, 40), (0, 8)], {})
    first, second = (tokens_of(step.batch, request) for request in (0, 1))
    part = Step(step.batch.take(first[:32]), step.ledger, padding=0)
    part.check()
    step.ledger.save(part.batch.inner_state_slot_mapping, part.batch.positions)
    table = step.batch.inner_state_block_table  # the engine leaves freed pages in it
    table[1, :2] = table[0, :2]
    step.batch.inner_state_slot_mapping[second] = step.slots(1, torch.arange(8))
    Step(step.batch.take(torch.cat([first[32:], second])), step.ledger, padding=0).check()


def test_a_step_of_nothing_is_right():
    step = step_of()
    Step(step.batch.take([]), step.ledger, padding=0).check()


# ---- what is wrong -------------------------------------------------------------------------------


def at(step: Step, request: int, position: int) -> int:
    tokens = tokens_of(step.batch, request)
    return int(tokens[step.batch.positions[tokens] == position][0])


def padding_with_a_slot(step: Step) -> None:
    step.batch.k_slot_mapping[-1], step.batch.positions[-1], step.batch.token_to_req[-1] = 70, 3, 0


def no_row(step: Step) -> None:
    step.batch.inner_state_slot_mapping[at(step, 0, 62)] = -1


def no_entry(step: Step) -> None:
    step.batch.k_slot_mapping[at(step, 0, 63)] = -1


def an_entry_too_many(step: Step) -> None:
    step.batch.k_slot_mapping[at(step, 0, 62)] = 70


def a_gap(step: Step) -> None:
    step.batch.positions[at(step, 4, 100) : at(step, 4, 135) + 1] += 4


def a_row_twice(step: Step) -> None:
    step.batch.positions[at(step, 4, 101)] = 100


def a_request_in_two_places(step: Step) -> None:
    step.batch.token_to_req[at(step, 4, 66) : at(step, 4, 135) + 1] = 0


def slots_exchanged(step: Step) -> None:
    slots = step.batch.inner_state_slot_mapping
    one, other = at(step, 0, 60), at(step, 0, 61)
    slots[[one, other]] = slots[[other, one]]


def entries_exchanged(step: Step) -> None:
    slots = step.batch.k_slot_mapping
    one, other = at(step, 0, 59), at(step, 0, 63)
    slots[[one, other]] = slots[[other, one]]


def the_null_page(step: Step) -> None:
    step.batch.inner_state_block_table[0, 15] = 0
    step.batch.inner_state_slot_mapping[at(step, 0, 60) : at(step, 0, 63) + 1] = torch.arange(4)


def a_table_that_is_too_short(step: Step) -> None:
    table = step.batch.inner_state_block_table[:, :33]
    step.batch = replace(step.batch, inner_state_block_table=table)


def a_page_of_two_requests(step: Step) -> None:
    table = step.batch.inner_state_block_table
    table[3, 1] = table[0, 1]
    step.batch.inner_state_slot_mapping[tokens_of(step.batch, 3)] = step.slots(
        3, torch.arange(5, 7)
    )


def a_page_in_two_places(step: Step) -> None:
    table = step.batch.inner_state_block_table
    table[0, 16] = table[0, 15]
    step.batch.inner_state_slot_mapping[at(step, 0, 64) : at(step, 0, 67) + 1] = step.slots(
        0, torch.arange(64, 68)
    )


def a_k_page_of_two_requests(step: Step) -> None:
    table = step.batch.requests.k_block_table
    slots = step.batch.k_slot_mapping
    theirs = tokens_of(step.batch, 4)[slots[tokens_of(step.batch, 4)] >= 0]
    slots[theirs] += 64 * (table[0, 0] - table[4, 0])
    table[4, 0] = table[0, 0]


def history_that_was_freed(step: Step) -> None:
    step.batch.inner_state_block_table[3, 0] = 0


def history_that_was_overwritten(step: Step) -> None:
    step.ledger.positions[step.slots(2, torch.tensor(70))] = 2


def history_that_was_never_saved(step: Step) -> None:
    step.ledger = Ledger(step.ledger.extents)


def a_prefix_that_nobody_fills(step: Step) -> None:
    step.batch.inner_state_block_table[1, :16] = step.batch.inner_state_block_table[4, 17]


def not_a_number(step: Step) -> None:
    step.batch.kv_score[at(step, 2, 71), 300] = torch.nan


def two_infinities(step: Step) -> None:
    step.batch.kv_score[at(step, 2, 71), 3:5] = torch.tensor([torch.inf, -torch.inf])


FAULTS = {  # the fault; request and position of the token that is named, and what is said of it
    padding_with_a_slot: (0, 3, r"lies behind .* and has the slot 70: "),
    no_row: (0, 62, r"has no state row \(slot -1\)"),
    no_entry: (0, 63, r"closes a window and has no K slot \(-1\)"),
    an_entry_too_many: (0, 62, r"closes no window and has the K slot 70"),
    a_gap: (4, 104, r"stands behind position 99 of its request"),
    a_row_twice: (4, 100, r"stands behind position 100 of its request"),
    a_request_in_two_places: (0, 66, r"is apart from the tokens of request 0"),
    slots_exchanged: (0, 60, r"has the state slot \d+, where its block table gives \d+ "),
    entries_exchanged: (0, 59, r"has the K slot \d+, where its block table gives \d+ "),
    the_null_page: (0, 60, r"has the state slot 0, where its block table gives -1 "),
    a_table_that_is_too_short: (4, 132, r"has the state slot \d+, where its block table gives -1 "),
    a_page_of_two_requests: (3, 5, r"writes state page \d+, which token 7 writes "),
    a_page_in_two_places: (0, 64, r"writes state page \d+, which token 63 writes "),
    a_k_page_of_two_requests: (4, 67, r"writes K page \d+, which token 127 writes "),
    history_that_was_freed: (3, 5, r"needs the row of position 0 in state slot 0, .* -1 "),
    history_that_was_overwritten: (2, 71, r"needs the row of position 70 .* that of position 2 "),
    history_that_was_never_saved: (2, 71, r"needs the row of position 64 .* that of position -1 "),
    a_prefix_that_nobody_fills: (1, 64, r"needs the row of position 60 in state slot \d+, "),
    not_a_number: (2, 71, r"has nan in channel 44 of its gate: check the checkpoint"),
    two_infinities: (2, 71, r"has inf in channel 3 of its kv: check the checkpoint"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_is_told_with_its_token_and_value_and_nothing_is_written(plant):
    request, position, says = FAULTS[plant]
    step = step_of()
    step.check()
    plant(step)
    before, held = step.batch.clone(), step.ledger.positions.clone()
    who = rf"token \d+ \(request {request}, position {position}\) "
    with pytest.raises(ContractError, match=f"^{who}.*{says}") as told:
        step.check()
    assert told.value.request == request
    assert all(map(torch.equal, step.batch.storages, before.storages))
    assert torch.equal(step.ledger.positions, held)
