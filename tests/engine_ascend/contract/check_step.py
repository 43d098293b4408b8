"""The op's per-token arguments: right for every batch, and made so that a captured graph can make
them again."""

from types import SimpleNamespace

import pytest
import torch
from layer import BLOCKS, Rows
from schedule import LONGEST, Schedule, slots
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import RATIO, Extents, Requests, Step
from vllm_dsv4_indexer.engines.vllm_ascend.step import requests_of, tokens_of
from vllm_dsv4_indexer.ops import requests as told

PAGE, K_PAGE, WIDTH = 4, 64, 128


def tensors(rows: Rows, padding: int = 0, empty: bool = False) -> Requests:
    """What vllm-ascend's buffers hold. Requests of padding have one token each, or none (`empty`),
    and zeros for the rest. The slots say "write" everywhere, as in the capture of a graph."""
    lengths = torch.tensor(rows.lengths + [0 if empty else 1] * padding)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()

    def table(blocks: list[list[int]]) -> Tensor:
        return torch.tensor(
            [row + [0] * (WIDTH - len(row)) for row in blocks + [[]] * padding], dtype=torch.int32
        )

    start_pos = torch.tensor(rows.starts + [0] * padding, dtype=torch.int32)
    slot_mapping = torch.zeros(sum(rows.lengths) + padding, dtype=torch.int32)
    return Requests(starts, start_pos, table(rows.state_tables), table(rows.k_tables), slot_mapping)


def step_of(*requests: Tensor) -> Step:
    return told.step_of(Requests(*requests), len(requests[-1]), PAGE, K_PAGE)


def assert_is(step: Step, rows: Rows, padding: int = 0) -> None:
    """`padding` tokens follow those of the requests: they have no slots."""
    request, position = map(list, zip(*rows.tokens()))
    state_slots, k_slots = slots(rows, PAGE, K_PAGE)
    tokens = len(request)
    assert step.positions[:tokens].tolist() == position
    assert step.token_to_req[:tokens].tolist() == request
    assert step.inner_state_slot_mapping.tolist() == state_slots + [-1] * padding
    assert step.k_slot_mapping.tolist() == k_slots + [-1] * padding
    assert (step.positions.dtype, step.token_to_req.dtype) == (torch.int64, torch.int32)
    assert (step.inner_state_slot_mapping.dtype, step.k_slot_mapping.dtype) == (
        torch.int64,
        torch.int64,
    )


@pytest.mark.parametrize("seed", range(20))
def test_positions_requests_and_slots_are_those_of_the_tables(seed):
    schedule = Schedule(seed, PAGE, K_PAGE)
    for _ in range(20):
        rows = schedule.step()
        assert_is(step_of(*tensors(rows)), rows)


@pytest.mark.parametrize("empty", [False, True])
def test_padding_has_no_slots_and_stays_inside_the_tables(empty):
    schedule = Schedule(0, PAGE, K_PAGE)
    for _ in range(20):
        rows = schedule.step()
        step = step_of(*tensors(rows, padding=3, empty=empty))
        assert_is(step, rows, padding=3)


def test_a_token_behind_a_request_that_fills_its_tables_stays_inside_them():
    last = WIDTH * PAGE - 1
    requests = tensors(Rows([last], [1], [[1] * WIDTH], [[1] * WIDTH]))
    step = step_of(*requests._replace(slot_mapping=torch.zeros(3)))
    assert step.inner_state_slot_mapping.tolist() == [PAGE + last % PAGE, -1, -1]
    assert step.k_slot_mapping.tolist() == [K_PAGE + last // RATIO % K_PAGE, -1, -1]


def test_a_token_beyond_the_tables_of_its_request_has_no_slots():
    last = WIDTH * PAGE - 1
    step = step_of(*tensors(Rows([last], [2], [[1] * WIDTH], [[1] * WIDTH])))
    assert step.inner_state_slot_mapping.tolist() == [PAGE + last % PAGE, -1]


def test_a_request_that_would_start_before_its_first_token_has_no_slots():
    """A profiling step can have one: its length is set and its tokens are not."""
    rows = Rows([-3], [3], [[1] * WIDTH], [[1] * WIDTH])
    step = step_of(*tensors(rows))
    assert step.inner_state_slot_mapping.tolist() == step.k_slot_mapping.tolist() == [-1, -1, -1]


def test_a_token_that_is_not_to_be_written_has_no_slots():
    rows = Schedule(0, PAGE, K_PAGE).step()
    requests = tensors(rows)
    requests.slot_mapping[::2] = -1
    step = step_of(*requests)
    state_slots, k_slots = slots(rows, PAGE, K_PAGE)
    assert step.inner_state_slot_mapping.tolist() == [
        -1 if i % 2 == 0 else slot for i, slot in enumerate(state_slots)
    ]
    assert step.k_slot_mapping.tolist() == [
        -1 if i % 2 == 0 else slot for i, slot in enumerate(k_slots)
    ]


@pytest.mark.parametrize("blocks", [[0], [-1]])
def test_a_block_that_is_null_gives_no_slots(blocks):
    step = step_of(*tensors(Rows([0], [4], [blocks], [blocks])))
    assert step.inner_state_slot_mapping.tolist() == step.k_slot_mapping.tolist() == [-1] * 4


class OnTheDevice(TorchDispatchMode):
    """Refuses what would wait for the device, or has a shape that its values decide."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "_to_copy",
        "is_nonzero",
        "equal",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        device = (kwargs or {}).get("device")
        assert name not in self.WAITS or (name == "_to_copy" and device is None), function
        return function(*args, **(kwargs or {}))


def test_a_step_is_made_without_a_value_on_the_host():
    rows = Schedule(0, PAGE, K_PAGE).step()
    tokens = sum(rows.lengths)
    with OnTheDevice():
        step_of(*tensors(rows))
    meta = step_of(*(tensor.to("meta") for tensor in tensors(rows)))
    assert [argument.shape for argument in meta] == [
        (tokens,),
        (tokens,),
        (tokens,),
        meta.inner_state_block_table.shape,
        (tokens,),
    ]


@pytest.mark.parametrize("empty", [False, True])
def test_a_graph_captured_once_plans_later_steps_from_the_same_buffers(empty):
    """Captured as vllm-ascend captures a decode step: on null tables. Replayed on what later steps
    leave in the same buffers, with fewer requests than were captured."""
    extents = Extents(
        state_pages=BLOCKS, state_page=PAGE, k_entries=BLOCKS * K_PAGE, max_pos=2 * LONGEST
    )
    buffers = tensors(Rows([0] * 8, [1] * 8, [[]] * 8, [[]] * 8))

    def plan(*buffers):
        requests = Requests(*buffers)
        tokens = tokens_of(requests)
        return ops.plan_requests(requests, tokens, extents, K_PAGE, impl="reference")

    graph = make_fx(plan)(*buffers)
    schedule = Schedule(0, PAGE, K_PAGE)
    schedule._length = lambda: 1
    for _ in range(50):
        rows = schedule.step()
        padding = 8 - len(rows.starts)
        for buffer, now in zip(buffers, tensors(rows, padding, empty)):
            buffer.copy_(now)
        step = step_of(*buffers)
        assert_is(step, rows, padding)
        assert torch.equal(graph(*buffers), ops.plan(*step, **extents._asdict(), impl="reference"))


def part(rows: Rows, slot_mapping: Tensor):
    """vllm-ascend's metadata of state and K cache, where we look."""
    starts, start_pos, state_table, k_table, _ = tensors(rows)
    state = SimpleNamespace(block_table=state_table, slot_mapping=slot_mapping)
    return state, SimpleNamespace(query_start_loc=starts, start_pos=start_pos, block_table=k_table)


@pytest.mark.parametrize("pairs", [False, True], ids=["flat_slots", "block_and_offset"])
def test_the_parts_of_a_step_are_one_batch(pairs):
    """A step of both kinds comes as two metadata, each counting its tokens and its requests from
    0."""
    schedule = Schedule(3, PAGE, K_PAGE)
    for _ in range(20):
        rows = schedule.step()
        slot_mapping = torch.arange(sum(rows.lengths), dtype=torch.int32)
        slot_mapping[::3] = -1
        whole = part(rows, slot_mapping)
        for decodes in range(1, len(rows.starts)):
            tokens = sum(rows.lengths[:decodes])
            both = []
            for requests, of_tokens in (
                (slice(decodes), slice(tokens)),
                (slice(decodes, None), slice(tokens, None)),
            ):
                fields = (
                    getattr(rows, name)[requests]
                    for name in ("starts", "lengths", "state_tables", "k_tables")
                )
                slots_of_part = slot_mapping[of_tokens]
                if pairs:  # of an A2 or A3
                    slots_of_part = torch.stack(
                        [slots_of_part // PAGE, slots_of_part % PAGE], dim=1
                    )
                both.append(part(Rows(*fields), slots_of_part))
            joined, expected = requests_of(*both), requests_of(whole)
            assert all(map(torch.equal, joined[:-1], expected[:-1]))
            assert torch.equal(joined.slot_mapping < 0, expected.slot_mapping < 0)
