"""Requests that share a prefix: whoever fills a block, and when, each entry is what its tokens give
alone.

vLLM caches the blocks of a request when it schedules it. So a request that is scheduled later in
the same step gets, as computed, blocks that the first one fills only in that step. Other random
schedules, or one again: SCHEDULE_SEEDS=7,8 pytest tests/engine/test_shared_prefix.py
"""

import os
import pickle
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engine import CHECKED, complete, launch, two_processes
from schedules import MIXED, burst, forks, random_schedule, written
from stored import Stored

from vllm_dsv4_indexer.contract import DS_MLA_CODES, DS_MLA_DATA_BYTES, HEAD_DIM, RATIO

SEEDS = [int(seed) for seed in os.environ.get("SCHEDULE_SEEDS", "0,1").split(",")]
RANDOM = [random_schedule(f"seed {seed}", random.Random(seed)) for seed in SEEDS]
AGAIN = [schedule | dict(name=f"{schedule['name']} again") for schedule in RANDOM]
WRITTEN = [
    burst(256, 0, 0, 1, 3, 4, 60, 60, 130),
    burst(512, 0, 0, 4, 130),
    burst(512, 0, 0, 4, 130, budget=MIXED),
    burst(1280, 0, 130, 130),
    burst(1280, 0, 130, 130, budget=MIXED),
    burst(4096, 5, 5, 5),
    forks(),
]
ONE_WORKER = [*WRITTEN, *RANDOM]
TWO_WORKERS = [WRITTEN[0], WRITTEN[-1], *RANDOM, *AGAIN]
CACHE = 128 << 20  # bytes: enough, and most of it is poisoned before each step
CLOSE = 0.99  # cosine of two keys; of a wrong and a right one it is below 0.9


@dataclass
class Ran:
    """What an engine stored. Of a request each worker stores its own."""

    schedules: dict[str, list[list[Stored]]]  # by schedule and request
    alone: list[list[Stored]]  # by sequence of tokens
    metrics: dict[str, int]

    def expected(self, one: Stored, worker: int) -> Stored:
        """What the same tokens store alone; perhaps with others behind them."""
        alone = (workers[worker] for workers in self.alone)
        return next(other for other in alone if other.tokens[: len(one.tokens)] == one.tokens)


@pytest.fixture(scope="session")
def run_schedules(checkpoint, tmp_path_factory):
    """Runs schedules in one engine: `run_schedules(name, schedules, **options)`."""

    def run(name: str, schedules: list[dict], environment=None, **options) -> Ran:
        folder = tmp_path_factory.mktemp(name)
        options |= dict(kv_cache_memory_bytes=CACHE)
        job = dict(options=complete(checkpoint, options), schedules=schedules)
        launch("run_schedules.py", folder, job, folder / "result.pickle", environment)
        result = pickle.loads((folder / "result.pickle").read_bytes())
        result["schedules"] = dict(zip(names(schedules), result["schedules"], strict=True))
        return Ran(**result)

    return run


@pytest.fixture(scope="session")
def one_worker(run_schedules) -> Ran:
    return run_schedules("one_worker", ONE_WORKER, additional_config=CHECKED)


@pytest.fixture(scope="session")
def stock_worker(run_schedules) -> Ran:
    """vLLM's own compressors, which need every row."""
    stock = dict(additional_config={"dsv4_indexer": {"impl": "stock"}}, max_model_len=1024)
    return run_schedules("stock_worker", [WRITTEN[1]], **stock)


@pytest.fixture(scope="session")
def two_drafting_workers(run_schedules) -> Ran:
    """What was answered once is drafted when it is asked again, and some of the drafts are
    wrong."""
    drafts = dict(method="custom_class", model="drafts.FromMemory", num_speculative_tokens=3)
    options = dict(tensor_parallel_size=2, speculative_config=drafts, additional_config=CHECKED)
    return run_schedules("two_drafting_workers", TWO_WORKERS, two_processes(), **options)


def names(schedules: list[dict]) -> list[str]:
    return [one["name"] for one in schedules]


@pytest.mark.parametrize("schedule", ONE_WORKER, ids=names(ONE_WORKER))
def test_every_entry_is_the_one_that_its_tokens_give_alone(one_worker, schedule):
    assert_as_alone(one_worker, schedule)


def test_the_first_layer_s_entries_are_those_of_vllms_own_compressors(one_worker, stock_worker):
    """Whose sums have another order. Behind that layer the hidden states differ by as much."""
    schedule = WRITTEN[1]
    pairs = zip(*(ran.schedules[schedule["name"]] for ran in (one_worker, stock_worker)))
    for number, ((ours,), (stock,)) in enumerate(pairs):
        exact = slice(written(schedule["requests"], number) // RATIO)
        for mine, theirs, codes in (
            (ours.entries[0], stock.entries[0], HEAD_DIM),
            (ours.main[0][1], stock.main[0][1], DS_MLA_CODES),
        ):
            differ = mine[exact].astype(int) - theirs[exact]
            assert not differ[:, DS_MLA_DATA_BYTES:].any()  # the exponents
            assert np.count_nonzero(differ) <= max(1, 1e-4 * differ.size)
            assert abs(differ[:, :codes]).max() <= 1


@pytest.mark.parametrize("schedule", TWO_WORKERS, ids=names(TWO_WORKERS))
def test_so_it_is_in_each_of_two_workers_and_with_rejected_drafts(two_drafting_workers, schedule):
    assert_as_alone(two_drafting_workers, schedule)


def assert_as_alone(ran: Ran, schedule: dict) -> None:
    """Bit for bit, as far as the tokens were written. Of those that the model said the engine's own
    layers, which take them one by one, round a little differently, and so may the entries."""
    for number, workers in enumerate(ran.schedules[schedule["name"]]):
        tokens = written(schedule["requests"], number)
        for worker, one in enumerate(workers):
            alone = ran.expected(one, worker)
            positions = wrong_index_keys(one.entries, alone.entries, tokens // RATIO)
            for (ratio, ours), (_, theirs) in zip(one.main, alone.main, strict=True):
                exact = slice(tokens // ratio)
                wrong = (ours[exact] != theirs[exact]).any(axis=1)
                positions += [ratio * (entry + 1) - 1 for entry in np.flatnonzero(wrong).tolist()]
            who = f"{schedule['name']}, request {number}, worker {worker}"
            assert not positions, f"{who}: wrong entries at the positions {positions}"


def wrong_index_keys(ours: np.ndarray, alone: np.ndarray, exact: int) -> list[int]:
    """The positions whose entries differ in some layer; behind the first `exact` ones, by much."""
    alone = alone[:, : ours.shape[1]]
    wrong = (ours != alone).any(axis=2)
    wrong[:, exact:] = similarity(ours[:, exact:], alone[:, exact:]) < CLOSE
    return [RATIO * (entry + 1) - 1 for entry in np.flatnonzero(wrong.any(axis=0)).tolist()]


def similarity(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosines of their keys."""
    keys = (torch.from_numpy(one[..., :HEAD_DIM].copy()) for one in (some, others))
    keys = [one.view(torch.float8_e4m3fn).float() for one in keys]
    return torch.cosine_similarity(*keys, dim=-1).numpy()


@pytest.mark.parametrize("name", names(WRITTEN))
def test_blocks_are_shared_in_the_step_that_fills_them(one_worker, name):
    """Else the tests above would show nothing."""
    requests = [workers[0] for workers in one_worker.schedules[name]]
    shared = [any(filled_in_the_same_step(one, other) for other in requests) for one in requests]
    assert sum(shared) >= 2


def filled_in_the_same_step(one: Stored, other: Stored) -> bool:
    """Whether `one` came with blocks, as computed, of which `other` computed the last in that
    step."""
    step, (cached, _) = next(iter(one.lengths.items()))
    before, behind = other.lengths.get(step, (0, 0))
    return before < cached <= behind and one.tokens[:cached] == other.tokens[:cached]


def test_drafts_are_rejected_and_requests_preempted(two_drafting_workers):
    metrics = two_drafting_workers.metrics
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    assert metrics["vllm:spec_decode_num_draft_tokens"] > accepted > 0
    assert metrics["vllm:num_preemptions"] > 0
