"""The op on the device against the readable definition on the host."""

import random

import pytest
import torch
from on_device import (
    DEVICE,
    K_FORMAT,
    assert_stores_the_reference,
    often,
    stored,
)
from paged import PAGES, paged_batch

from batches import MAIN_4, assert_identical
from steps import K_PAGE, SHARED, assert_same_plan, random_requests
from vllm_dsv4_indexer.ops import ascend, reference
from vllm_dsv4_indexer.ops.requests import step_of

STARTS = (0, 1, 2, 3, 4, 5, 63, 64, 127, 128)
LENGTHS = (*range(1, 10), 127, 128, 129)


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
@pytest.mark.parametrize("seed", range(5))
def test_the_main_compressor_of_the_ratio_4_stores_the_reference(seed, pages):
    requests = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (62, 41)]
    batch = paged_batch(requests, pages, "bf16", geometry=MAIN_4, seed=seed, padding=3)
    assert_stores_the_reference(batch, (seed, pages))


@pytest.mark.parametrize("pages", PAGES)
def test_the_same_call_stores_the_same_bytes_every_time(pages):
    """Cores that wrote each other's bytes, or read what another has yet to write, would show
    here."""
    batch = paged_batch([(0, 129), (63, 128), (5, 1), (128, 127)] * 3, pages, K_FORMAT)
    first = stored(batch)
    for _ in often(50):
        assert_identical(stored(batch), first)


@pytest.mark.parametrize("pages", PAGES)
def test_a_prompt_in_chunks_stores_the_bytes_of_the_whole(pages):
    batch = paged_batch([(0, 130)], pages, K_FORMAT)
    whole, chunked = batch.to(DEVICE), batch.to(DEVICE)
    whole.compress("ascend")
    for chunk in torch.arange(130).split([1, 6, 3, 50, 2, 68]):
        chunked.take(slice(int(chunk[0]), int(chunk[-1]) + 1)).compress("ascend")
    assert_identical(chunked.to("cpu"), whole.to("cpu"))


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("name", SHARED)
def test_a_prefix_that_the_call_fills_is_planned_and_stored_as_by_the_reference(name, pages):
    requests, prefixes = SHARED[name]
    batch = paged_batch(requests, pages, K_FORMAT, prefixes=prefixes, padding=3)
    assert_same_plan(batch.to(DEVICE).plan("ascend"), batch.plan("reference"), name)
    assert_stores_the_reference(batch, (name, pages))


@pytest.mark.parametrize("seed", range(20))
def test_a_step_told_by_its_requests_is_planned_as_by_the_reference(seed):
    requests, tokens, extents = random_requests(seed)
    expected = reference.plan(step_of(requests, tokens, extents.state_page, K_PAGE), extents)
    on_device = requests._replace(
        **{n: t.to(DEVICE) for n, t in requests._asdict().items() if t is not None}
    )
    assert_same_plan(ascend.plan_requests(on_device, tokens, extents, K_PAGE), expected, seed)
