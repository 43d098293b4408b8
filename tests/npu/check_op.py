"""The op on the device against the readable definition on the host.

TEST_DEVICE, TEST_IMPL and TEST_K_FORMAT say what is tested; the rehearsal on a machine without an
NPU sets them.
"""

import os
import random

import pytest
import torch
from paged import PAGES, paged_batch

from batches import Batch, assert_close, assert_identical
from steps import K_PAGE, SHARED, random_requests
from vllm_dsv4_indexer.contract import EARLY, Plan
from vllm_dsv4_indexer.ops import reference
from vllm_dsv4_indexer.ops.requests import step_of

DEVICE, IMPL = os.environ.get("TEST_DEVICE", "npu"), os.environ.get("TEST_IMPL", "ascend")
if DEVICE == "npu":
    import machine
    import torch_npu  # noqa: F401

    K_FORMAT = "fp8_amax" if machine.product() == "A5" else "int8_hadamard"
else:
    K_FORMAT = os.environ["TEST_K_FORMAT"]

STARTS = (0, 1, 2, 3, 4, 5, 63, 64, 127, 128)
LENGTHS = (*range(1, 10), 127, 128, 129)
REPEATS = 50  # of a call that is expected to store the same bytes every time


def stored(batch: Batch) -> Batch:
    """The batch after the op has run on the device."""
    return batch.to(DEVICE).compress(IMPL).to("cpu")


def assert_stores_the_reference(batch: Batch, case: object) -> None:
    """State rows bitwise; codes at most one apart, in at most 1 % of them; scales within a rounding
    of their type."""
    actual, expected = stored(batch), batch.clone().compress("reference")
    differ, values = assert_close(actual, expected, case, scale_rtol=2**-10)
    assert differ <= 0.01 * values, f"{differ} of {values} codes differ: {case}"


@pytest.mark.parametrize("layout", ["ascend", "padded"])
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("start", STARTS)
def test_every_start_and_length_stores_the_reference(start, pages, layout):
    for length in LENGTHS:
        batch = paged_batch([(start, length)], pages, K_FORMAT, layout=layout)
        assert_stores_the_reference(batch, (start, length, pages, layout))


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("seed", range(20))
def test_mixed_batches_with_padding_store_the_reference(seed, pages):
    numbers = random.Random(seed)
    lengths = numbers.choices((1, 1, 1, 2, 3, 30, 120), k=numbers.randint(1, 12))
    requests = [(numbers.randint(0, 300), length) for length in lengths]
    batch = paged_batch(requests, pages, K_FORMAT, seed=seed, padding=numbers.randint(0, 9))
    assert_stores_the_reference(
        batch, f"paged_batch({requests}, {pages}, {K_FORMAT!r}, seed={seed})"
    )


@pytest.mark.parametrize("pages", PAGES)
def test_the_same_call_stores_the_same_bytes_every_time(pages):
    """Cores that wrote each other's bytes, or read what another has yet to write, would show
    here."""
    batch = paged_batch([(0, 129), (63, 128), (5, 1), (128, 127)] * 3, pages, K_FORMAT)
    first = stored(batch)
    for _ in range(REPEATS if DEVICE == "npu" else 2):
        assert_identical(stored(batch), first)


@pytest.mark.parametrize("pages", PAGES)
def test_a_prompt_in_chunks_stores_the_bytes_of_the_whole(pages):
    batch = paged_batch([(0, 130)], pages, K_FORMAT)
    whole, chunked = batch.to(DEVICE), batch.to(DEVICE)
    whole.compress(IMPL)
    for chunk in torch.arange(130).split([1, 6, 3, 50, 2, 68]):
        chunked.take(slice(int(chunk[0]), int(chunk[-1]) + 1)).compress(IMPL)
    assert_identical(chunked.to("cpu"), whole.to("cpu"))


def assert_same_plan(actual: torch.Tensor, expected: torch.Tensor, case: object) -> None:
    """But for the header: how many windows there are a device does not know."""
    ours, theirs = Plan.of(actual.cpu()), Plan.of(expected)
    for name in ("positions", "requests", "state_slots", "k_slots", "windows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, case)
    early = theirs.windows == EARLY
    assert torch.equal(ours.sources[early], theirs.sources[early]), case


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("name", SHARED)
def test_a_prefix_that_the_call_fills_is_planned_and_stored_as_by_the_reference(name, pages):
    requests, prefixes = SHARED[name]
    batch = paged_batch(requests, pages, K_FORMAT, prefixes=prefixes, padding=3)
    assert_same_plan(batch.to(DEVICE).plan(IMPL), batch.plan("reference"), name)
    assert_stores_the_reference(batch, (name, pages))


@pytest.mark.skipif(
    DEVICE != "npu", reason="the kernel is for NPUs; tests/ascend_emulation runs it elsewhere"
)
@pytest.mark.parametrize("seed", range(20))
def test_a_step_told_by_its_requests_is_planned_as_by_the_reference(seed):
    from vllm_dsv4_indexer.ops import ascend

    requests, tokens, extents = random_requests(seed)
    expected = reference.plan(step_of(requests, tokens, extents.state_page, K_PAGE), extents)
    on_device = requests._replace(
        **{n: t.to(DEVICE) for n, t in requests._asdict().items() if t is not None}
    )
    assert_same_plan(ascend.plan_requests(on_device, tokens, extents, K_PAGE), expected, seed)
