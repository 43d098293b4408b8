"""The engines of this folder. Starting one takes half a minute, so each runs once, with all that is asked of it."""

import pytest
from engine import ALONE, BATCHED, GREEDY, LENGTHS, PROMPTS, Result, prompt, run_engine

SPAWNED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # engine core and workers in processes of their own, as served
PREFIXES = [prompt(2049, seed=1), prompt(4097, seed=1)]
PREEMPTED = [prompt(230, seed) for seed in range(32)]


@pytest.fixture(scope="session")
def stock(checkpoint, tmp_path_factory) -> Result:
    """The engine's own compressor, under our metadata: what everything is compared with."""
    options = dict(enable_prefix_caching=False, additional_config={"dsv4_indexer": {"impl": "stock"}})
    return run_engine(tmp_path_factory.mktemp("stock"), checkpoint, [*ALONE, BATCHED], caches=True, **options)


@pytest.fixture(scope="session")
def ours(checkpoint, tmp_path_factory) -> Result:
    """The same engine with our compressor."""
    folder = tmp_path_factory.mktemp("ours")
    return run_engine(folder, checkpoint, [*ALONE, BATCHED], caches=True, enable_prefix_caching=False)


@pytest.fixture(scope="session")
def chunked(checkpoint, tmp_path_factory) -> Result:
    """A step takes 509 tokens (a prime, so that chunks start anywhere in a window); prefixes are cached; little room.

    Rounds: each prompt alone; each of the PREFIXES twice; the PREEMPTED together, which grow out of the KV cache; then
    eight at a time, which do not.
    """
    twice = [dict(prompts=[one], sampling=GREEDY) for one in PREFIXES for _ in range(2)]
    long = GREEDY | dict(max_tokens=48)
    in_eights = [dict(prompts=PREEMPTED[i : i + 8], sampling=long) for i in range(0, len(PREEMPTED), 8)]
    options = dict(max_num_batched_tokens=509, max_num_seqs=32, kv_cache_memory_bytes=42 << 20)
    rounds = [*ALONE, *twice, dict(prompts=PREEMPTED, sampling=long), *in_eights]
    return run_engine(tmp_path_factory.mktemp("chunked"), checkpoint, rounds, environment=SPAWNED, **options)


@pytest.fixture(scope="session")
def two_workers(checkpoint, tmp_path_factory) -> Result:
    """Tensor parallelism over two workers, compiled as vLLM chooses to (no --enforce-eager)."""
    environment = SPAWNED | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = dict(tensor_parallel_size=2, enforce_eager=False)
    folder = tmp_path_factory.mktemp("two_workers")
    return run_engine(folder, checkpoint, [*ALONE, BATCHED], environment=environment, **options)


@pytest.fixture(scope="session")
def reference(checkpoint, tmp_path_factory) -> Result:
    """The readable implementation of the op inside the engine."""
    folder, options = tmp_path_factory.mktemp("reference"), {"dsv4_indexer": {"impl": "reference"}}
    return run_engine(folder, checkpoint, ALONE[:12], additional_config=options, enable_prefix_caching=False)


def alone(result: Result) -> dict[int, dict]:
    """The answers of the first rounds, by prompt length."""
    return {length: answers[0] for length, answers in zip(LENGTHS, result.rounds)}
