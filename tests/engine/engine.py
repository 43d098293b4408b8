"""Engines for the tests: what to ask of one, and how far two may differ."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEXERS = 2  # layers of the demo checkpoint that have one
VOCABULARY = 120_000  # ordinary tokens; the special ones come after
LENGTHS = (*range(1, 10), 127, 128, 129, 511, 512, 513, 2047, 2048, 2049, 2050, 4097)
# Engine core and workers in processes of their own.
SPAWNED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# Of log-probabilities. Another batch shape goes through another kernel of the engine's last matrix
# product, whose bfloat16 logits have steps of 1/16 here: 0.12 is the largest difference seen.
SHAPE_TOLERANCE = 0.25
GREEDY = dict(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True)
CHECKED = {"dsv4_indexer": {"check": "on"}}  # an engine that refuses a step dies


def prompt(length: int, seed: int = 0) -> list[int]:
    """A prompt of `length` random tokens; no two prompts share a prefix."""
    return random.Random(f"{length} {seed}").choices(range(VOCABULARY), k=length)


PROMPTS = [prompt(length) for length in LENGTHS]
ALONE = [dict(prompts=[one], sampling=GREEDY) for one in PROMPTS]
BATCHED = dict(prompts=PROMPTS, sampling=GREEDY)
FEW_LENGTHS = (1, 4, 7, 129, 512, 2050, 4097)
FEW = [ALONE[LENGTHS.index(length)] for length in FEW_LENGTHS]
PREFIXES = [prompt(2049, seed=1), prompt(4097, seed=1)]
MIXED_LENGTHS = (1, 6, 129, 700)
MIXED = dict(prompts=[prompt(length, seed=3) for length in MIXED_LENGTHS], sampling=GREEDY)
STAGED = [*(dict(prompts=[one], sampling=GREEDY) for one in MIXED["prompts"]), MIXED]
REPEATED = dict(prompts=[prompt(600, seed=3)], sampling=GREEDY)
PREEMPTED = [prompt(2201 + length, seed=2) for length in range(3)]

# Short prompts beside long ones, by length. With steps of 2100 tokens, what is behind a prompt of
# 2100 starts while that one decodes, and what is behind another long one starts with its last
# chunk. So there are steps whose prefills have no entry, and steps whose last prefill has none.
SHORT_STEP = 2100
SHORT_MIXTURES = ((2100, 3, 2, 1), (2100, 4, 3), (1, 2100, 4, 2))
SHORT_LENGTHS = (1, 2, 3, 4, 2100)  # of these mixtures
MORE_MIXTURES = (*SHORT_MIXTURES, (5000, 4, 3, 2, 1), (3, 2, 2040, 1, 2100, 3))
MORE_LENGTHS = (*SHORT_LENGTHS, 2040, 5000)


def alone_and_mixed(lengths: tuple[int, ...], mixtures: tuple[tuple[int, ...], ...]) -> list[dict]:
    """Rounds: a prompt of each of the lengths alone; each of the mixtures."""
    sampling = GREEDY | dict(max_tokens=4)
    rounds = (*zip(lengths), *mixtures)
    return [dict(prompts=list(map(prompt, one)), sampling=sampling) for one in rounds]


DRAFTED_LENGTHS, DRAFTED_TOKENS = (1, 6, 129, 2010), 37
DRAFTED = dict(
    prompts=[prompt(length, seed=4) for length in DRAFTED_LENGTHS],
    sampling=GREEDY | dict(max_tokens=DRAFTED_TOKENS),
)


@dataclass
class Result:
    rounds: list[list[dict]]
    metrics: dict[str, int]  # vLLM's own counters
    # whether the process loaded our native library; its workers, if it has any, are not asked
    native: bool
    saved: dict[str, np.ndarray]  # caches, entries and projections, if asked for
    accounts: list[dict]
    log: str

    @property
    def caches(self) -> dict[str, np.ndarray]:
        return {
            name: array for name, array in self.saved.items() if not name.startswith("entries ")
        }

    def entries(self, number: int) -> list[np.ndarray]:
        """By indexer layer, what a round stored: [entries, 132], in the order of the steps and
        their tokens."""
        prefix = f"entries {number % len(self.rounds)} "
        calls = [array for name, array in self.saved.items() if name.startswith(prefix)]
        return [np.concatenate(calls[layer::INDEXERS]) for layer in range(INDEXERS)]

    def alone(self, lengths: tuple[int, ...] = LENGTHS) -> dict[int, dict]:
        """The answers of the first rounds, one prompt each, by prompt length."""
        return {length: answers[0] for length, answers in zip(lengths, self.rounds)}

    def work(self, rank: int = 0) -> tuple[int, ...]:
        """Calls, tokens, entries and plans, as the worker of that rank counted them in its last
        account."""
        account = next(one for one in reversed(self.accounts) if one["rank"] == rank)
        return tuple(account[what] for what in ("calls", "tokens", "entries", "plans"))


def run_engine(
    folder: Path,
    model: Path,
    rounds: list[dict],
    caches=False,
    entries=False,
    projections=False,
    without=(),
    environment=None,
    **options,
) -> Result:
    """Run one engine with our backend in a process of its own, and return what it answered and
    logged.

    caches, entries, without: see run_engine.py; the first two want the worker in that process.

    In one process vLLM schedules all requests of a round at once, so that two engines see the same
    batches.
    """
    account = folder / "account.jsonl"
    ours = options.pop("additional_config", {}).get("dsv4_indexer", {})
    options["additional_config"] = {"dsv4_indexer": ours | {"account": str(account)}}
    job = dict(options=complete(model, options), rounds=rounds)
    job |= dict(caches=caches, entries=entries, projections=projections, without=without)
    result_file = folder / "result.json"
    lines = launch("run_engine.py", folder, job, result_file, environment)
    saved = dict(np.load(result_file.with_suffix(".npz")))
    accounts = [json.loads(line) for line in account.read_text().splitlines()]
    result = json.loads(result_file.read_text())
    return Result(**result, saved=saved, accounts=accounts, log=lines)


def complete(model: Path, options: dict) -> dict:
    """The arguments of LLM: our backend and what all engines here have in common, unless `options`
    say otherwise."""
    defaults = dict(
        attention_backend="dsv4_indexer", max_model_len=8192, max_num_batched_tokens=8192
    )
    defaults |= dict(kv_cache_memory_bytes=1 << 30, enforce_eager=True, disable_log_stats=False)
    defaults |= dict(skip_tokenizer_init=True)  # prompts are of tokens
    return dict(model=str(model)) | defaults | options


def launch(
    script: str, folder: Path, job: dict, result: Path, environment: dict[str, str] | None
) -> str:
    """Run a script of this folder on a job, in a process of its own; returns what it logged."""
    from forked import python  # pytest alone has it on its path

    (folder / "job.json").write_text(json.dumps(job))
    arguments = (Path(__file__).with_name(script), folder / "job.json", result)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (environment or {})
    done = python(*map(str, arguments), environment=environment, log=folder / "log")
    assert done.returncode == 0, f"{folder}/log: {done.stdout[-4000:]}"
    return done.stdout


def two_processes() -> dict[str, str]:
    """An environment in which each of two workers has a core of its own."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}


def largest_difference(one: dict, other: dict) -> float:
    """How far two answers' log-probabilities differ, as far as the two answers have the same
    tokens.

    Asserts that the first token in which they differ was a toss-up: that its margin over the second
    is no larger than twice the difference seen up to it.
    """
    largest = 0.0
    for position, (a, b) in enumerate(zip(one["logprobs"], other["logprobs"], strict=True)):
        common = a.keys() & b.keys()
        assert common, (
            f"no token among the most likely ones of both at position {position}: {a} {b}"
        )
        largest = max(largest, *(abs(a[token] - b[token]) for token in common))
        if one["tokens"][position] != other["tokens"][position]:
            first, second = sorted(a.values(), reverse=True)[:2]
            assert first - second <= 2 * largest, f"position {position}: {a} against {b}"
            break
    return largest
