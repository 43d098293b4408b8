"""The op among other work: after what makes its input, before what takes its output."""

import contextlib

import pytest
import torch
from on_device import DEVICE, K_FORMAT, assert_is_the_reference_s, beside, often
from paged import PAGES, paged_batch

SIZE = 4096 if DEVICE == "npu" else 16  # of matrices whose products take longer than a launch


def slow_zero() -> torch.Tensor:
    """A zero that the device has not computed yet."""
    matrix = torch.zeros(SIZE, SIZE, device=DEVICE)
    for _ in range(20):
        matrix = matrix @ matrix
    return matrix[0, 0]


@pytest.mark.parametrize("stream", [contextlib.nullcontext, beside], ids=["one", "two"])
def test_the_op_waits_for_its_input_and_its_output_is_there_for_what_follows(stream):
    batch = paged_batch([(0, 129), (63, 128), (5, 1)], PAGES[0], K_FORMAT)
    device = batch.to(DEVICE)
    plan = device.plan("ascend")
    for case in often(50):
        call = batch.to(DEVICE)
        call.kv_score.fill_(torch.nan)
        call.kv_score.copy_(device.kv_score + slow_zero())
        with stream():
            call.run_planned(plan, "ascend")
        stored = call.clone()  # on the stream, behind the op
        for storage in call.storages:
            storage.zero_()
        assert_is_the_reference_s(stored.to("cpu"), batch, case)
