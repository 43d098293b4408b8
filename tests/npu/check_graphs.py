"""The op in a captured graph."""

import pytest
from on_device import DEVICE, K_FORMAT, assert_is_the_reference_s, captured, often
from paged import PAGES, paged_batch

from vllm_dsv4_indexer.batches import PER_TOKEN

REQUESTS = [(0, 40), (62, 9), (7, 1), (128, 1)]


@pytest.mark.parametrize("pages", PAGES)
def test_a_captured_step_follows_what_changes_in_its_buffers(pages):
    device = paged_batch(REQUESTS, pages, K_FORMAT).to(DEVICE)
    replay = captured(lambda: device.run_planned(device.plan("ascend"), "ascend"))
    for seed in often(20):
        batch = paged_batch(REQUESTS, pages, K_FORMAT, seed=seed)
        for name in (*PER_TOKEN, "inner_state_block_table", "ape", "norm_weight"):
            getattr(device, name).copy_(getattr(batch, name))
        for ours, theirs in zip(device.storages, batch.storages, strict=True):
            ours.copy_(theirs)
        replay()
        assert_is_the_reference_s(device.to("cpu"), batch, seed)
