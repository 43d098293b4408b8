"""What the checks run on, and how they compare: an NPU, or with TEST_DEVICE=cpu its emulation."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from batches import Batch, assert_close

DEVICE = os.environ.get("TEST_DEVICE", "npu")
ON_NPU = DEVICE == "npu"
if ON_NPU:
    import machine
    import torch_npu  # noqa: F401
K_FORMAT = "fp8_amax" if ON_NPU and machine.product() == "A5" else "int8_hadamard"


def often(times: int) -> range:
    """As often on an NPU, where what is rare shows; a program that is emulated does the same every
    time."""
    return range(times if ON_NPU else 2)


def stored(batch: Batch) -> Batch:
    """The batch after the op has run on the device."""
    return batch.to(DEVICE).compress("ascend").to("cpu")


def assert_stores_the_reference(batch: Batch, case: object) -> None:
    assert_is_the_reference_s(stored(batch), batch, case)


def assert_is_the_reference_s(actual: Batch, before: Batch, case: object) -> None:
    """State rows bitwise; codes at most one apart, in at most 1 % of them; scales within a rounding
    of their type."""
    expected = before.clone().compress("reference")
    differ, values = assert_close(actual, expected, case, scale_rtol=2**-10)
    assert differ <= 0.01 * values, f"{differ} of {values} codes differ: {case}"


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """On a stream that begins after what this one was given, and that this one then waits for."""
    if not ON_NPU:
        yield
        return
    here, other = torch.npu.current_stream(), torch.npu.Stream()
    other.wait_stream(here)
    with torch.npu.stream(other):
        yield
    here.wait_stream(other)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A graph of what `step` launches, to be called again and again."""
    if not ON_NPU:
        return step
    step()  # allocates what it needs
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        step()
    return graph.replay
