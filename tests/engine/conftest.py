"""The engines of this folder. Starting one takes half a minute, so each runs once, with all that is asked of it."""

import os

import pytest
from engine import ALONE, BATCHED, FEW, GREEDY, PREEMPTED, PREFIXES, Result, run_engine

SPAWNED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # engine core and workers in processes of their own, as served
STOCK = {"dsv4_indexer": {"impl": "stock"}}


@pytest.fixture(scope="session")
def engine(checkpoint, tmp_path_factory):
    """Runs one engine on the demo checkpoint: `engine(name, rounds, **options)`."""

    def run(name: str, rounds: list[dict], **options) -> Result:
        return run_engine(tmp_path_factory.mktemp(name), checkpoint, rounds, **options)

    return run


@pytest.fixture(scope="session")
def stock(engine) -> Result:
    """The engine's own compressor, under our metadata: what everything is compared with."""
    return engine(
        "stock", [*ALONE, BATCHED], caches=True, enable_prefix_caching=False, additional_config=STOCK
    )


@pytest.fixture(scope="session")
def ours(engine) -> Result:
    """The same engine with our compressor."""
    return engine("ours", [*ALONE, BATCHED], caches=True, enable_prefix_caching=False)


@pytest.fixture(scope="session")
def preempted(engine) -> Result:
    """Six prompts past the indexer's top-k in a KV cache that is too small for them together; then each alone."""
    alone = [dict(prompts=[one], sampling=GREEDY) for one in PREEMPTED]
    options = dict(max_model_len=4096, max_num_batched_tokens=509, kv_cache_memory_bytes=30 << 20)
    options |= dict(enable_prefix_caching=False)
    return engine("preempted", [dict(prompts=PREEMPTED, sampling=GREEDY), *alone], **options)


@pytest.fixture(scope="session")
def chunked(engine) -> Result:
    """A step takes 509 tokens, a prime, so that chunks start anywhere in a window; prefixes are cached.

    Rounds: each prompt alone; each of the PREFIXES twice.
    """
    twice = [dict(prompts=[one], sampling=GREEDY) for one in PREFIXES for _ in range(2)]
    return engine("chunked", [*ALONE, *twice], environment=SPAWNED, max_num_batched_tokens=509)


@pytest.fixture(scope="session")
def two_workers(engine) -> Result:
    """Tensor parallelism over two workers, in chunks, compiled as vLLM chooses to (no --enforce-eager)."""
    return engine("two_workers", FEW, **two_worker_options())


@pytest.fixture(scope="session")
def two_stock_workers(engine) -> Result:
    return engine("two_stock_workers", FEW, additional_config=STOCK, **two_worker_options())


def two_worker_options() -> dict:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    environment = SPAWNED | {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    return dict(
        environment=environment, tensor_parallel_size=2, enforce_eager=False, max_num_batched_tokens=1024
    )


@pytest.fixture(scope="session")
def reference(engine) -> Result:
    """The readable implementation of the op inside the engine."""
    options = {"dsv4_indexer": {"impl": "reference"}}
    return engine("reference", FEW, additional_config=options, enable_prefix_caching=False)
