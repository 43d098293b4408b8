"""A launch that does nothing: its plan does not fit, so each core reads the header and ends."""

import torch
from on_device import DEVICE, K_FORMAT
from paged import PAGES, paged_batch

from batches import assert_identical
from vllm_dsv4_indexer.contract import plan_size


def test_a_plan_that_does_not_fit_changes_nothing():
    batch = paged_batch([(0, 4)], PAGES[0], K_FORMAT)
    plan = torch.full((plan_size(4),), 7, dtype=torch.int64, device=DEVICE)
    assert_identical(batch.to(DEVICE).run_planned(plan, "ascend").to("cpu"), batch)
