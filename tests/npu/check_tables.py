"""Tables and slots that change in place between two launches, as in an engine's buffers."""

import pytest
import torch
from on_device import DEVICE, K_FORMAT, often
from paged import PAGES, paged_batch

from steps import assert_same_plan
from vllm_dsv4_indexer.contract import Extents
from vllm_dsv4_indexer.ops import ascend


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("by_requests", [False, True], ids=["tokens", "requests"])
def test_a_plan_is_of_the_tables_and_slots_as_they_are_now(by_requests, pages):
    """The third request's pages move on by one, and some tokens of the first cease to write, or
    begin again."""
    batch = paged_batch([(0, 64), (64, 20), (7, 33)], pages, K_FORMAT, prefixes={1: (0, 64)})
    extents = Extents.of(batch.call.layer)
    requests = batch.requests._replace(
        slot_mapping=torch.zeros(len(batch.positions), dtype=torch.int32)
    )
    step, requests = (
        told._make(t.to(DEVICE, copy=True) for t in told) for told in (batch.call.step, requests)
    )

    def planned(step, requests) -> torch.Tensor:
        if by_requests:
            return ascend.plan_requests(requests, len(batch.positions), extents, pages[1])
        return ascend.plan(step, extents)

    slots = step.inner_state_slot_mapping[56:64].clone()
    for case in often(100):
        planned(step, requests)
        for table in (step.inner_state_block_table, *requests[2:4]):
            table[2] = table[2].roll(1)
        step.inner_state_slot_mapping[56:64] = -1 if case % 2 else slots
        requests.slot_mapping[56:64] = -(case % 2)
        elsewhere = (told._make(t.clone() for t in told) for told in (step, requests))
        assert_same_plan(planned(step, requests), planned(*elsewhere), case)
