"""The plans that the AscendC kernels make, run by the emulation, are the reference's."""

import random

import pytest
import torch
from torch import Tensor

from batches import Batch, make_batch, random_case
from steps import (
    INT8,
    K_PAGE,
    PAGES,
    SHARED,
    assert_same_plan,
    random_requests,
    shared_batch,
)
from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import (
    EARLY,
    LATE,
    NO_WINDOW,
    Extents,
    Plan,
    Requests,
    Step,
    row_source,
)
from vllm_dsv4_indexer.ops import ascend, reference
from vllm_dsv4_indexer.ops.requests import step_of

CORES = (1, 7, 48)
MIXED = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (0, 3), (62, 41), (31, 1), (99, 4)]


def step_and_extents(batch: Batch) -> tuple[Step, Extents]:
    return batch.call.step, Extents.of(batch.call.layer)


def compare(emulation, batch: Batch, case: object = "", cores: tuple[int, ...] = CORES) -> Plan:
    expected = batch.plan("reference")
    for count in cores:
        emulation.use(cores=count, order=count)
        assert_same_plan(batch.plan("ascend"), expected, (case, count))
    return Plan.of(expected)


@pytest.mark.parametrize("page", PAGES)
def test_a_mixed_batch_with_padding_is_planned_as_by_the_reference(ascend_emulation, page):
    for seed in range(5):
        batch = make_batch(MIXED, seed=seed, page=page, padding=5, **INT8)
        plan = compare(ascend_emulation, batch, seed)
        assert {EARLY, LATE, NO_WINDOW} == set(plan.windows.tolist())


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", SHARED)
def test_a_prefix_that_the_call_fills_comes_from_its_tokens(ascend_emulation, name, page):
    plan = compare(ascend_emulation, shared_batch(name, page=page, padding=3, **INT8), name)
    early = plan.windows == EARLY
    sources, request = plan.sources[early], plan.requests[early, None]
    assert ((sources >= 0) & (plan.requests[sources.clamp(min=0)] != request)).any()


@pytest.mark.parametrize("seed", range(120))
def test_random_batches_are_planned_as_by_the_reference(ascend_emulation, seed):
    """With shared prefixes, also in rings: only running a plan asks something of the slots."""
    pick = random.Random(seed)
    case = random_case(pick) | INT8 | {"layout": "dense"}
    compare(ascend_emulation, make_batch(**case), case, (pick.randrange(1, 49),))


def test_two_tokens_that_hold_one_row_count_as_the_last_of_them(ascend_emulation):
    """Two requests fill the same pages, and a third shares them."""
    batch = make_batch([(0, 16), (0, 16), (16, 8)], prefixes={2: (0, 16)}, **INT8)
    batch.inner_state_block_table[1] = batch.inner_state_block_table[0]
    batch.inner_state_slot_mapping[16:32] = batch.inner_state_slot_mapping[:16]
    plan = compare(ascend_emulation, batch)
    assert plan.sources[35].tolist() == [28, 29, 30, 31, 32, 33, 34, 35]


def test_tokens_in_any_order_are_planned_as_by_the_reference(ascend_emulation):
    batch = shared_batch("beside other prompts and decode tokens", **INT8)
    for seed in range(5):
        order = torch.randperm(len(batch.positions), generator=torch.Generator().manual_seed(seed))
        compare(ascend_emulation, batch.take(order), seed)


def test_a_call_of_more_than_a_piece_is_planned_as_by_the_reference(ascend_emulation):
    owners = [(0, 400), (7, 300), (3, 450), *((start, 1) for start in range(300))]
    prefixes = {len(owners): (0, 400), len(owners) + 1: (1, 304)}
    batch = make_batch([*owners, (400, 40), (304, 5)], prefixes=prefixes, page=8, **INT8)
    compare(ascend_emulation, batch, cores=(1, 2))


@pytest.mark.parametrize("tokens", (0, 1))
def test_an_empty_call_has_a_plan_too(ascend_emulation, tokens):
    batch = make_batch([(7, 1)], **INT8).take(slice(0, tokens))
    compare(ascend_emulation, batch)


def test_what_has_no_page_is_masked_and_what_is_out_of_range_is_not_written(ascend_emulation):
    """Where the reference refuses, a kernel that must not wait goes on."""
    ascend_emulation.use(cores=2)
    batch = make_batch([(8, 4), (8, 4), (8, 4)], page=4, **INT8)
    step, extents = step_and_extents(batch)
    rows = extents.state_pages * extents.state_page
    step.inner_state_block_table[0, 1] = 0
    step.inner_state_block_table[1, 1] = extents.state_pages
    step.inner_state_slot_mapping[[0, 1, 2]] = torch.tensor([rows, -7, 3])
    step.k_slot_mapping[-1] = extents.k_entries
    plan = Plan.of(ascend.plan(step, extents))
    assert plan.state_slots[:4].tolist() == [-1, -1, -1, int(step.inner_state_slot_mapping[3])]
    assert plan.sources[3].tolist() == [-1] * 4 + [0, 1, 2, 3]
    assert plan.sources[7].tolist() == [-1] * 4 + [4, 5, 6, 7]
    assert (plan.windows[-1], plan.k_slots[-1]) == (NO_WINDOW, -1)


def stray(**changes) -> Plan:
    """The plan of a dozen tokens and one of another request, at position 511, which is changed so:
    its values, how far values may reach, or how many columns the table has."""
    step, extents = step_and_extents(make_batch([(0, 12), (511, 1)], max_pos=512, page=4, **INT8))
    for name, value in changes.items():
        if name in Extents._fields:
            extents = extents._replace(**{name: value})
        elif name == "columns":  # beside which lie others that look sound
            step = step._replace(inner_state_block_table=step.inner_state_block_table[:, :value])
        else:
            getattr(step, name)[-1] = value
    return Plan.of(ascend.plan(step, extents))


@pytest.mark.parametrize(
    "changes",
    [{"max_pos": 511}, {"positions": -1}, {"k_slot_mapping": -1}, {"k_slot_mapping": -(2**40)}],
    ids=str,
)
def test_a_token_that_is_out_of_range_closes_no_window(ascend_emulation, changes):
    ascend_emulation.use(cores=2)
    plan = stray(**changes)
    assert (plan.windows[-1], plan.k_slots[-1]) == (NO_WINDOW, -1)
    assert torch.equal(plan.windows[:-1], stray().windows[:-1])


def test_the_last_page_entry_and_column_are_in_range(ascend_emulation):
    ascend_emulation.use(cores=2)
    whole = stray()
    slots = torch.cat([whole.state_slots, -2 - whole.sources[-1]])
    last = {"state_pages": int(slots.max()) // 4 + 1, "k_entries": int(whole.k_slots.max()) + 1}
    plan = stray(**last, columns=128)
    for name in ("state_slots", "k_slots", "windows"):
        assert torch.equal(getattr(plan, name), getattr(whole, name)), name
    assert torch.equal(plan.sources[-1], whole.sources[-1])
    short = {name: number - 1 for name, number in last.items()}
    fewer = stray(**short)
    assert (fewer.k_slots >= 0).sum() == (whole.k_slots >= 0).sum() - 1
    assert (fewer.sources[-1] == -1).any() or (fewer.state_slots == -1).any()


@pytest.mark.parametrize("request_", (-1, 2, 2**31 - 1))
def test_a_request_out_of_range_has_no_pages(ascend_emulation, request_):
    ascend_emulation.use(cores=2)
    plan = stray(token_to_req=request_)
    assert plan.sources[-1].tolist() == [-1] * 7 + [12]


def test_a_column_out_of_range_has_no_page(ascend_emulation):
    ascend_emulation.use(cores=2)
    plan = stray(columns=127)
    sources = plan.sources[-1].tolist()
    assert sources == stray().sources[-1, :4].tolist() + [-1] * 3 + [12]


@pytest.mark.parametrize("by_requests", (False, True))
def test_what_changes_between_launches_is_read_anew(ascend_emulation, by_requests):
    """In place, as in a graph that is replayed: tables, slots, and which tokens write."""
    ascend_emulation.use(cores=1)
    batch = make_batch([(0, 64), (64, 20), (7, 33)], prefixes={1: (0, 64)}, **INT8)
    step, extents = step_and_extents(batch)
    mapping = torch.zeros(len(step.positions), dtype=torch.int32)
    requests = batch.requests._replace(slot_mapping=mapping)

    def planned() -> Tensor:
        if by_requests:
            told = step_of(requests, len(mapping), extents.state_page, K_PAGE)
            made = ascend.plan_requests(requests, len(mapping), extents, K_PAGE)
        else:
            told, made = step, ascend.plan(step, extents)
        assert_same_plan(made, reference.plan(told, extents))
        return made

    first = planned()
    requests.state_block_table[2, [0, 1]] = requests.state_block_table[2, [1, 0]]
    requests.k_block_table[2] = requests.k_block_table[2].roll(1)
    mapping[56:64] = -1
    step.inner_state_slot_mapping[56:64] = -1
    assert not torch.equal(first, planned())


def test_the_baselines_plan_has_all_windows_early_and_all_rows_in_the_state(ascend_emulation):
    ascend_emulation.use(cores=3)
    batch = make_batch([(0, 12), (9, 20)], page=4, **INT8)
    step, extents = step_and_extents(batch)
    plan = Plan.of(ascend.plan(step, extents, algorithm="scatter_pool"))
    closing = step.k_slot_mapping >= 0
    assert torch.equal(plan.windows, torch.where(closing, EARLY, NO_WINDOW))
    for token in closing.nonzero()[:, 0]:
        request, end = step.token_to_req[token], step.positions[token]
        for row, q in enumerate(range(end - 7, end + 1)):
            slot = step.inner_state_block_table[request, q // 4] * 4 + q % 4
            assert plan.sources[token, row] == (row_source(slot) if q >= 0 else -1)


# ---- a step that is told by its requests ---------------------------------------------------------


def compare_requests(
    emulation, requests: Requests, tokens: int, extents: Extents, cores: int, case: object = ""
) -> Plan:
    emulation.use(cores=cores)
    actual = ops.plan_requests(requests, tokens, extents, K_PAGE, impl="ascend")
    expected = reference.plan(step_of(requests, tokens, extents.state_page, K_PAGE), extents)
    assert_same_plan(actual, expected, case)
    assert len(emulation.counts()) == 1  # launch
    return Plan.of(actual)


@pytest.mark.parametrize("seed", range(60))
def test_requests_are_planned_as_the_tokens_that_they_stand_for(ascend_emulation, seed):
    requests, tokens, extents = random_requests(seed)
    compare_requests(ascend_emulation, requests, tokens, extents, 1 + seed % 48, seed)


@pytest.mark.parametrize("count", (511, 512, 513, 1100))
@pytest.mark.parametrize("cores", (1, 48))
def test_more_requests_than_a_piece_are_planned_as_the_tokens_that_they_stand_for(
    ascend_emulation, count, cores
):
    pick = random.Random(count)
    told = [(7, 33), *((pick.randrange(40), 1) for _ in range(count - 3)), (0, 9), (8, 4)]
    batch = make_batch(told, prefixes={count - 1: (count - 2, 8)}, page=8, **INT8)
    tokens, extents = len(batch.positions), Extents.of(batch.call.layer)
    plan = compare_requests(ascend_emulation, batch.requests, tokens, extents, cores)
    assert (plan.sources[plan.windows == EARLY] >= 0).any()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("stride", (1, 2))
def test_a_token_that_the_slot_mapping_excludes_writes_nothing(ascend_emulation, dtype, stride):
    for seed in range(10):
        requests, tokens, extents = random_requests(seed)
        real = int(requests.query_start_loc[-1])
        numbers = torch.Generator().manual_seed(seed)
        mapping = torch.randint(-1, 3, (tokens, stride), generator=numbers).to(dtype)
        requests = requests._replace(slot_mapping=mapping[:, 0])
        plan = compare_requests(ascend_emulation, requests, tokens, extents, 5, seed)
        excluded = mapping[:real, 0] < 0
        state_slots, k_slots = plan.state_slots[:real], plan.k_slots[:real]
        assert (state_slots[excluded] == -1).all() and (k_slots[excluded] == -1).all()
        assert (state_slots[~excluded] >= 0).all()


def test_a_dummy_run_plans_to_write_nothing(ascend_emulation):
    """Live tables, as a data-parallel rank without work has them, and slots that are all -1."""
    ascend_emulation.use()
    batch = make_batch([(64, 8)], **INT8)
    requests = batch.requests._replace(slot_mapping=torch.full((8,), -1, dtype=torch.int32))
    plan = Plan.of(ascend.plan_requests(requests, 8, Extents.of(batch.call.layer), K_PAGE))
    for section in (plan.state_slots, plan.k_slots):
        assert (section == -1).all()
    assert (plan.windows == NO_WINDOW).all()


def test_positions_outside_the_tables_are_planned_alike_by_both_kernels(ascend_emulation):
    ascend_emulation.use(cores=3)
    batch = make_batch([(0, 40), (20, 40), (9, 3)], **INT8)
    requests, extents = batch.requests, Extents.of(batch.call.layer)
    narrow = requests.state_block_table[:, :9].contiguous()
    before_0 = requests.start_pos - torch.tensor([5, 0, 0]).int()
    requests = requests._replace(state_block_table=narrow, start_pos=before_0)
    step = step_of(requests, 90, 4, K_PAGE)
    ours, theirs = ascend.plan_requests(requests, 90, extents, K_PAGE), ascend.plan(step, extents)
    for section, other in zip(Plan.of(ours)[:-1], Plan.of(theirs)[:-1]):
        assert torch.equal(section, other)
    early = Plan.of(ours).windows == EARLY
    assert torch.equal(Plan.of(ours).sources[early], Plan.of(theirs).sources[early])


# ---- the tests above notice ----------------------------------------------------------------------

CLAIM = "sources_.GetValue(at) == kRowZero - candidate.state_slot"
MISTAKES = {
    "the state, although a token of the call has the row": [("if (low_ <= high_) Claim();", "")],
    "a token of another slot": [(CLAIM, "sources_.GetValue(at) < kMasked")],
    "a token at another position": [
        ("tokens_.Seek(low_, high_)", "tokens_.Seek(0, args_.max_pos)"),
        (
            "const int64_t back = piece_.Get(kPositions, window) - candidate.position;",
            "int64_t back = 0; while (back < kWindow && sources_.GetValue(Place(window) + kWindow "
            "- 1 - back) != kRowZero - candidate.state_slot) ++back;",
        ),
    ],
    "the first token instead of the last": [
        (CLAIM, f"({CLAIM} || sources_.GetValue(at) > candidate.token)")
    ],
    "the row that the table has, although it is the request's own": [
        ("Holds(token - back, request, q)", "back == 0")
    ],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_row_rule_is_found(built_ascend_emulation, tmp_path, mistake):
    emulation = built_ascend_emulation.with_mistake(tmp_path, "planner.h", MISTAKES[mistake])
    with emulation.installed(), pytest.raises(AssertionError):
        for name in SHARED:
            compare(emulation, shared_batch(name, **INT8), cores=(7,))
        compare(emulation, make_batch([(5, 9), (17, 12), (21, 3)], ring=16, **INT8), cores=(7,))
        test_two_tokens_that_hold_one_row_count_as_the_last_of_them(emulation)


def test_without_a_mistake_they_hold(built_ascend_emulation, tmp_path):
    emulation = built_ascend_emulation.with_mistake(tmp_path, "planner.h", [])
    with emulation.installed():
        compare(emulation, make_batch([(5, 9), (17, 12), (21, 3)], ring=16, **INT8), cores=(7,))
