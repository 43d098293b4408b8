"""What checked mode finds in a step: each planted fault by its name, and nothing in a step that a
scheduler may make."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from batches import MAIN_4, MAIN_128, Batch, make_batch, tokens_of
from steps import SHARED
from test_row_rule import calls_of
from vllm_dsv4_indexer.contract import INDEXER, STATE_PAGES, ContractError, Extents, Geometry
from vllm_dsv4_indexer.ops.invariants import Ledger, Scheduled, check_step, check_values

# By ratio. Request 1 shares a prefix that request 0 fills; the first token of request 2 closes a
# window.
REQUESTS = {
    4: [(0, 130), (64, 9), (71, 1), (5, 2), (66, 70)],
    128: [(0, 260), (136, 9), (255, 1), (9, 2), (130, 140)],
}
PREFIXES = {4: {1: (0, 64)}, 128: {1: (0, 136)}}
PAGES = {4: 4, 128: 8}  # tokens of a state page, as vLLM has them
PADDING = 2
every_compressor = pytest.mark.parametrize("geometry", (INDEXER, MAIN_4, MAIN_128), ids=str)


@dataclass
class Step:
    """A step as an engine schedules it, with what the steps before it have saved."""

    batch: Batch
    ledger: Ledger
    padding: int = PADDING

    @property
    def ratio(self) -> int:
        return self.batch.geometry.ratio

    @property
    def page(self) -> int:
        """Tokens of a state page."""
        return self.batch.inner_state_cache.shape[1]

    @property
    def scheduled(self) -> Scheduled:
        tokens = len(self.batch.positions) - self.padding
        tables, k_page = self.batch.requests.k_block_table, self.batch.k_cache.shape[1]
        return Scheduled(self.batch.call.step, tokens, tables, k_page, self.ratio)

    def check(self) -> None:
        self.batch.plan("reference")  # as an engine does first
        check_step(self.scheduled, self.ledger)
        check_values(self.scheduled, self.batch.kv_score)

    def slots(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        """Of the state, where the request's block table has them."""
        pages = self.batch.inner_state_block_table[request, positions // self.page].long()
        return torch.where(pages > 0, pages * self.page + positions % self.page, -1)

    def take(self, tokens) -> "Step":
        """A step of these tokens alone."""
        return Step(self.batch.take(tokens), self.ledger, padding=0)

    def save(self) -> None:
        self.ledger.save(self.batch.inner_state_slot_mapping, self.batch.positions)


def step_of(geometry: Geometry, requests, prefixes, **options) -> Step:
    options = {"page": PAGES[geometry.ratio], "padding": PADDING} | options
    batch = make_batch(requests, geometry=geometry, prefixes=prefixes, **options)
    step = Step(batch, Ledger(Extents.of(batch.call.layer)))
    for request, (start, _) in enumerate(requests):
        positions = torch.arange(prefixes.get(request, (0, 0))[1], start)
        step.ledger.save(step.slots(request, positions), positions)
    return step


# ---- what is right -------------------------------------------------------------------------------


@every_compressor
@pytest.mark.parametrize("name", SHARED)
def test_a_prefix_that_another_request_fills_in_the_step_is_right(name, geometry):
    requests, prefixes = SHARED[name]
    for page in (4, 8):
        step_of(geometry, requests, prefixes, page=page).check()


@every_compressor
@pytest.mark.parametrize("seed", range(8))
def test_any_cut_of_requests_into_steps_is_right(seed, geometry):
    pick = random.Random(seed)
    requests = [(0, 150), (64, 90), (128, 9), (144, 30), (5, 140), (128, 3)]
    prefixes = {1: (0, 64), 2: (1, 128), 3: (1, 144), 5: (0, 128)}
    pages = [page for page in STATE_PAGES[geometry.ratio] if page <= 16]
    step = step_of(geometry, requests, prefixes, page=pick.choice(pages), seed=seed)
    for tokens in calls_of(requests, prefixes, pick):
        part = step.take(tokens)
        part.check()
        part.save()


@every_compressor
def test_positions_that_are_run_again_after_rejected_drafts_are_right(geometry):
    step = step_of(geometry, [(252, 9)], {})
    for tokens in ([0, 1, 2, 3], [2, 3, 4, 5], [3], [4, 5, 6, 7, 8]):
        part = step.take(tokens)
        part.check()
        part.save()


def recycled(geometry: Geometry, computed: int) -> Step:
    """The next step of two requests: the first has computed so many tokens, the second has got the
    second page of the first."""
    step = step_of(geometry, [(0, 200), (0, 4)], {})
    first, second = (tokens_of(step.batch, request) for request in (0, 1))
    part = step.take(first[:computed])
    part.check()
    part.save()
    table = step.batch.inner_state_block_table  # the engine leaves freed pages in it
    table[1, 0] = table[0, 1]
    step.batch.inner_state_slot_mapping[second] = step.slots(1, torch.arange(4))
    return step.take(torch.cat([second, first[computed:]]))


@every_compressor
def test_a_page_that_was_freed_belongs_to_the_request_that_gets_it(geometry):
    recycled(geometry, computed=160).check()


def test_of_the_ratio_128_the_group_before_a_request_s_own_may_be_freed():
    step = recycled(MAIN_128, computed=128)
    step.take(range(4)).save()
    step.take(range(4, 76)).check()


@every_compressor
def test_a_step_of_nothing_is_right(geometry):
    step_of(geometry, REQUESTS[geometry.ratio], {}).take([]).check()


# ---- what is wrong -------------------------------------------------------------------------------


def at(step: Step, request: int, position: int) -> int:
    tokens = tokens_of(step.batch, request)
    return int(tokens[step.batch.positions[tokens] == position][0])


LAST = {4: 63, 128: 127}  # a position of request 0 that closes a window and ends a page


def last(step: Step) -> int:
    return at(step, 0, LAST[step.ratio])


def padding_with_a_slot(step: Step) -> None:
    step.batch.k_slot_mapping[-1], step.batch.positions[-1], step.batch.token_to_req[-1] = 9, 3, 0


def no_row(step: Step) -> None:
    step.batch.inner_state_slot_mapping[last(step) - 1] = -1


def no_entry(step: Step) -> None:
    step.batch.k_slot_mapping[last(step)] = -1


def an_entry_too_many(step: Step) -> None:
    step.batch.k_slot_mapping[last(step) - 1] = 9


def a_gap(step: Step) -> None:
    step.batch.positions[at(step, 4, 132) : at(step, 4, 135) + 1] += 4


def a_row_twice(step: Step) -> None:
    step.batch.positions[at(step, 4, 133)] = 132


def a_request_in_two_places(step: Step) -> None:
    step.batch.token_to_req[tokens_of(step.batch, 4)] = 0


def exchange(slots: torch.Tensor, one: int, other: int) -> None:
    slots[[one, other]] = slots[[other, one]]


def slots_exchanged(step: Step) -> None:
    exchange(step.batch.inner_state_slot_mapping, last(step) - 3, last(step) - 2)


def entries_exchanged(step: Step) -> None:
    exchange(step.batch.k_slot_mapping, last(step), last(step) + step.ratio)


def the_null_page(step: Step) -> None:
    end, page = last(step) + 1, step.page
    step.batch.inner_state_block_table[0, end // page - 1] = 0
    step.batch.inner_state_slot_mapping[end - page : end] = torch.arange(page)


def a_table_that_is_too_short(step: Step) -> None:
    table = step.batch.inner_state_block_table[:, :33]
    step.batch = replace(step.batch, inner_state_block_table=table)


def a_page_of_two_requests(step: Step) -> None:
    table, theirs = step.batch.inner_state_block_table, tokens_of(step.batch, 3)
    table[3, 1] = table[0, 1]
    slots = step.slots(3, step.batch.positions[theirs])
    step.batch.inner_state_slot_mapping[theirs] = slots


def a_page_in_two_places(step: Step) -> None:
    table, tokens = step.batch.inner_state_block_table, tokens_of(step.batch, 0)
    table[0, 16] = table[0, 15]
    slots = step.slots(0, step.batch.positions[tokens])
    step.batch.inner_state_slot_mapping[tokens] = slots


def a_k_page_of_two_requests(step: Step) -> None:
    table = step.batch.requests.k_block_table
    slots = step.batch.k_slot_mapping
    theirs = tokens_of(step.batch, 4)[slots[tokens_of(step.batch, 4)] >= 0]
    slots[theirs] += step.batch.k_cache.shape[1] * (table[0, 0] - table[4, 0])
    table[4, 0] = table[0, 0]


def history_that_was_freed(step: Step) -> None:
    step.batch.inner_state_block_table[3, 0] = 0


def history_that_was_overwritten(step: Step) -> None:
    (token,) = tokens_of(step.batch, 2)
    step.ledger.positions[step.slots(2, step.batch.positions[token] - 1)] = 2


def history_in_a_page_of_other_caches(step: Step) -> None:
    (token,) = tokens_of(step.batch, 2)
    step.ledger.forget(step.slots(2, step.batch.positions[token, None] - 1) // step.page)


def history_that_was_never_saved(step: Step) -> None:
    step.ledger = Ledger(step.ledger.extents)


def a_prefix_that_nobody_fills(step: Step) -> None:
    _, prefix = PREFIXES[step.ratio][1]
    table = step.batch.inner_state_block_table
    table[1, : prefix // step.page] = table[4, 33]


def not_a_number(step: Step) -> None:
    gate = step.batch.geometry.kv_width
    step.batch.kv_score[tokens_of(step.batch, 2), gate + 44] = torch.nan


def two_infinities(step: Step) -> None:
    infinities = torch.tensor([torch.inf, -torch.inf])
    step.batch.kv_score[tokens_of(step.batch, 2), 3:5] = infinities


# The fault; the request and the position of the token that is named, by ratio, and what is said.
FAULTS = {
    padding_with_a_slot: (0, (3, 3), r"lies behind .* and has the slot 9: "),
    no_row: (0, (62, 126), r"has no state row \(slot -1\)"),
    no_entry: (0, (63, 127), r"closes a window and has no K slot \(-1\)"),
    an_entry_too_many: (0, (62, 126), r"closes no window and has the K slot 9"),
    a_gap: (4, (136, 136), r"stands behind position 131 of its request"),
    a_row_twice: (4, (132, 132), r"stands behind position 132 of its request"),
    a_request_in_two_places: (0, (66, 130), r"is apart from the tokens of request 0"),
    slots_exchanged: (0, (60, 124), r"has the state slot \d+, where its block table gives \d+ "),
    entries_exchanged: (0, (63, 127), r"has the K slot \d+, where its block table gives \d+ "),
    the_null_page: (0, (60, 120), r"has the state slot 0, where its block table gives -1 "),
    a_table_that_is_too_short: (4, (132, 264), r"has the state slot \d+, .* gives -1 "),
    a_page_of_two_requests: (3, (5, 9), r"writes state page \d+, which token (7|15) writes "),
    a_page_in_two_places: (0, (64, 128), r"writes state page \d+, which token (63|127) writes "),
    a_k_page_of_two_requests: (4, (67, 255), r"writes K page \d+, which token (127|255) writes "),
    history_that_was_freed: (3, (5, 9), r"needs the row of position 0 in state slot 0, .* -1 "),
    history_that_was_overwritten: (2, (71, 255), r"position (70|254) .* that of position 2 "),
    history_in_a_page_of_other_caches: (2, (71, 255), r"position (68|248) .* of position -1 "),
    history_that_was_never_saved: (2, (71, 255), r"position (64|128) .* that of position -1 "),
    a_prefix_that_nobody_fills: (1, (64, 136), r"the row of position (60|128) in state slot \d+, "),
    not_a_number: (2, (71, 255), r"has nan in channel 44 of its gate: check the checkpoint"),
    two_infinities: (2, (71, 255), r"has inf in channel 3 of its kv: check the checkpoint"),
}


@every_compressor
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_is_told_with_its_token_and_value_and_nothing_is_written(plant, geometry):
    request, positions, says = FAULTS[plant]
    step = step_of(geometry, REQUESTS[geometry.ratio], PREFIXES[geometry.ratio])
    step.check()
    plant(step)
    before, held = step.batch.clone(), step.ledger.positions.clone()
    who = rf"token \d+ \(request {request}, position {positions[geometry.ratio == 128]}\) "
    with pytest.raises(ContractError, match=f"^{who}.*{says}") as told:
        step.check()
    assert told.value.request == request
    assert all(map(torch.equal, step.batch.storages, before.storages))
    assert torch.equal(step.ledger.positions, held)


def test_of_the_ratio_128_a_page_of_the_group_that_is_open_may_not_be_freed():
    step = recycled(MAIN_128, computed=124)
    step.take(range(4)).save()
    says = r"token 0 \(request 0, position 124\) needs the row of position 8 .* of position 0 "
    with pytest.raises(ContractError, match=says):
        step.take(range(4, 80)).check()
