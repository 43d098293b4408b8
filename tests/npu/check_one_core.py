"""Calls that one core does alone: up to four tokens."""

import pytest
from on_device import DEVICE, K_FORMAT, assert_stores_the_reference
from paged import PAGES, paged_batch

from steps import assert_same_plan

ONE_CORE = [[(0, 4)], [(0, 1)], [(3, 1)], [(7, 1)], [(4, 4)], [(126, 3)], [(63, 1), (3, 1), (8, 2)]]


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("requests", ONE_CORE, ids=str)
def test_up_to_four_tokens_are_planned_as_by_the_reference(requests, pages):
    batch = paged_batch(requests, pages, K_FORMAT)
    assert_same_plan(batch.to(DEVICE).plan("ascend"), batch.plan("reference"), (requests, pages))


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("requests", ONE_CORE, ids=str)
def test_up_to_four_tokens_store_the_reference(requests, pages):
    assert_stores_the_reference(paged_batch(requests, pages, K_FORMAT), (requests, pages))
