"""Cores that write parts of one block of 32 bytes: of the scales (2 or 4 bytes an entry), and of a
plan (8 bytes a token). No document says that this is safe."""

import pytest
from on_device import DEVICE, K_FORMAT, assert_is_the_reference_s, often
from paged import PAGES, paged_batch

from batches import assert_identical
from steps import assert_same_plan

# One entry a core, side by side in one page, if there are 48 cores; parts of a plan that begin
# anywhere in a block.
TOKENS = (189, 190, 191, 192)


@pytest.mark.parametrize("tokens", TOKENS)
def test_scales_side_by_side_are_all_stored_every_time(tokens):
    batch = paged_batch([(0, tokens)], PAGES[0], K_FORMAT)
    device = batch.to(DEVICE)
    plan, first = device.plan("ascend"), device.clone()
    assert_is_the_reference_s(first.run_planned(plan, "ascend").to("cpu"), batch, tokens)
    for case in often(500):
        assert_identical(device.clone().run_planned(plan, "ascend"), first, case)


@pytest.mark.parametrize("tokens", TOKENS)
def test_parts_of_a_plan_side_by_side_are_all_stored_every_time(tokens):
    batch = paged_batch([(0, tokens)], PAGES[0], K_FORMAT)
    device, expected = batch.to(DEVICE), batch.plan("reference")
    for case in often(500):
        assert_same_plan(device.plan("ascend"), expected, case)
