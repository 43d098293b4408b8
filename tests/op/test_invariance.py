"""The native results are bitwise the same, however the work is cut up and whatever the CPU."""

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from batches import assert_identical, make_batch
from vllm_dsv4_indexer.contract import KV_WIDTH, RATIO
from vllm_dsv4_indexer.ops.cpu import ISAS

REQUESTS = [(5, 150), (0, 130), (67, 1), (128, 30), (0, 3), (62, 141)]
OPTIONS = [
    {},
    {"kv_dtype": torch.bfloat16, "layout": "engine"},
    {"k_format": "int8_hadamard", "layout": "padded"},
    {"k_format": "int8_hadamard", "scale_dtype": torch.float16, "page": 8},
]


# A last bit of the fp32 arithmetic shows in one entry of some hundred, where it turns a bfloat16
# rounding; the fp32 scale of a rotated entry then differs. Hence thousands of them.
MANY_ENTRIES = [{"requests": [(0, 500)] * 32, "k_format": "int8_hadamard"}]


def digest() -> str:
    """A fingerprint of everything that the native kernel stores for OPTIONS and MANY_ENTRIES."""
    fingerprint = hashlib.sha256()
    for options in [{"requests": REQUESTS, **o} for o in OPTIONS] + MANY_ENTRIES:
        batch = make_batch(**options)
        batch.kv_score[20:24, KV_WIDTH:] *= 300  # weights that underflow
        batch.kv_score[31, :] = torch.nan
        for storage in batch.compress("cpu").storages:
            fingerprint.update(storage.numpy().tobytes())
    return fingerprint.hexdigest()


def interleavings(requests: list[tuple[int, int]], pick: random.Random) -> list[list[int]]:
    """Cuts the packed tokens into calls: each request in chunks, the requests of a call in any
    order."""
    begin, waiting = 0, []
    for _, length in requests:
        waiting.append(list(range(begin, begin + length)))
        begin += length
    calls = []
    while any(waiting):
        pick.shuffle(waiting)
        call = []
        for tokens in waiting:
            n = pick.choice((0, 1, 1, 2, 3, 5, 8, 40, 150))
            call += tokens[:n]
            del tokens[:n]
        calls.append(call)
    return calls


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_cutting_the_tokens_into_any_calls_changes_no_byte(options, seed):
    whole = make_batch(REQUESTS, **options)
    cut = whole.clone()
    for call in interleavings(REQUESTS, random.Random(seed)):
        cut.take(call).compress("cpu")
    assert_identical(cut, whole.compress("cpu"), f"seed {seed}, {options}")


def test_cutting_the_tokens_into_any_calls_changes_no_byte_of_the_reference():
    whole = make_batch(REQUESTS)
    cut = whole.clone()
    for call in interleavings(REQUESTS, random.Random(0)):
        cut.take(call).compress("reference")
    assert_identical(cut, whole.compress("reference"))


@pytest.mark.parametrize("kv_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("start", (1, 8, 11, 66))
def test_a_batch_goes_on_from_its_history_as_from_an_earlier_call(start, kv_dtype):
    whole = make_batch([(0, 90)], kv_dtype=kv_dtype).compress("cpu")
    rest = make_batch([(start, 90 - start)], kv_dtype=kv_dtype).compress("cpu")
    assert rest.entries() == whole.entries()[start // RATIO :]


@pytest.mark.parametrize("threads", (1, 2, 3, 8))
def test_the_number_of_threads_changes_no_byte(threads, set_threads):
    requests = [*REQUESTS, *((s, 1) for s in range(100, 400, 3))]
    expected = make_batch(requests).compress("reference")
    batch = make_batch(requests)
    one = batch.clone()
    set_threads(1)
    one.compress("cpu")
    set_threads(threads)
    batch.compress("cpu")
    assert_identical(batch, one)
    assert torch.equal(
        batch.inner_state_cache.view(torch.int32), expected.inner_state_cache.view(torch.int32)
    )


@pytest.mark.parametrize("page_seed", range(3))
def test_the_places_of_the_pages_change_no_entry(page_seed):
    batch, other = (
        make_batch(REQUESTS),
        make_batch(REQUESTS, page_seed=100 + page_seed, layout="engine"),
    )
    assert batch.compress("cpu").entries() == other.compress("cpu").entries()


def test_strides_of_the_inputs_change_no_byte():
    batch = make_batch(REQUESTS)
    wide = torch.full((len(batch.positions), 700), torch.nan)
    wide[:, 100 : 100 + batch.kv_score.shape[1]] = batch.kv_score
    table = torch.full((len(REQUESTS), 300), -9, dtype=torch.int32)
    table[:, : batch.inner_state_block_table.shape[1]] = batch.inner_state_block_table
    strided = replace(
        batch.clone(),
        kv_score=wide[:, 100 : 100 + batch.kv_score.shape[1]],
        inner_state_block_table=table[:, : batch.inner_state_block_table.shape[1]],
    )
    assert_identical(strided.compress("cpu"), batch.compress("cpu"))


def test_a_window_from_the_state_equals_the_same_window_from_the_call():
    """Bit for bit also where every value is a zero of either sign."""
    batch = make_batch([(0, 64)])
    batch.kv_score[8:16] = -0.0
    batch.ape[:2] = -0.0
    decoded = batch.clone()
    for token in range(64):
        decoded.take([token]).compress("cpu")
    assert_identical(decoded, batch.compress("cpu"))
    assert (batch.positions % RATIO == RATIO - 1).sum() == 16


def test_every_instruction_set_stores_the_same_bytes():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    here = digest()
    ran = []
    for isa in ISAS:
        process = subprocess.run(
            [sys.executable, "-c", "import test_invariance; print(test_invariance.digest())"],
            env={**environment, "DSV4_INDEXER_ISA": isa},
            capture_output=True,
            text=True,
        )
        if "which this CPU or build lacks" in process.stderr:
            continue
        assert process.stdout.strip() == here, f"{isa}: {process.stderr}"
        ran.append(isa)
    assert "generic" in ran
