"""The engines of this folder. Starting one takes half a minute, so each runs once, with all that is
asked of it."""

from pathlib import Path

import pytest
from engine import (
    ALONE,
    BATCHED,
    CHECKED,
    DRAFTED,
    FEW,
    GREEDY,
    MIXED,
    MORE_LENGTHS,
    MORE_MIXTURES,
    PREEMPTED,
    PREFIXES,
    REPEATED,
    SHORT_LENGTHS,
    SHORT_MIXTURES,
    SHORT_STEP,
    SPAWNED,
    STAGED,
    Result,
    alone_and_mixed,
    run_engine,
    two_processes,
)

STOCK = {"dsv4_indexer": {"impl": "stock"}}
FULL_CHECKED = {"dsv4_indexer": {"state_save": "full", "check": "on"}}


@pytest.fixture(scope="session")
def engine(checkpoint, tmp_path_factory):
    """Runs one engine, on the demo checkpoint unless told: `engine(name, rounds, model=...,
    **options)`."""

    def run(name: str, rounds: list[dict], model: Path = checkpoint, **options) -> Result:
        return run_engine(tmp_path_factory.mktemp(name), model, rounds, **options)

    return run


@pytest.fixture(scope="session")
def stock(engine) -> Result:
    """The engine's own compressor, under our metadata: what everything is compared with."""
    return engine(
        "stock",
        [*ALONE, BATCHED],
        enable_prefix_caching=False,
        additional_config=STOCK,
    )


@pytest.fixture(scope="session")
def ours(engine) -> Result:
    """The same engine with our compressors."""
    return engine("ours", [*ALONE, BATCHED], enable_prefix_caching=False)


@pytest.fixture(scope="session")
def preempted(engine) -> Result:
    """Prompts past the indexer's top-k, first together in a KV cache that holds one of them and a
    bit, then each alone.

    Small steps, since a step's own pages would be the slack; and vLLM must start what it cannot be
    sure to finish.
    """
    rounds = [
        dict(prompts=some, sampling=GREEDY | dict(max_tokens=40))
        for some in (PREEMPTED, *zip(PREEMPTED))
    ]
    options = dict(
        max_model_len=3072,
        max_num_batched_tokens=127,
        max_num_seqs=8,
        kv_cache_memory_bytes=6 << 20,
    )
    options |= dict(scheduler_reserve_full_isl=False, enable_prefix_caching=False)
    return engine("preempted", rounds, additional_config=CHECKED, **options)


@pytest.fixture(scope="session")
def chunked(engine) -> Result:
    """A step takes 509 tokens, a prime, so that chunks start anywhere in a window; prefixes are
    cached.

    Rounds: each prompt alone; each of the PREFIXES twice.
    """
    twice = [dict(prompts=[one], sampling=GREEDY) for one in PREFIXES for _ in range(2)]
    return engine("chunked", [*ALONE, *twice], max_num_batched_tokens=509)


@pytest.fixture(scope="session")
def short_prompts(engine) -> Result:
    """Rounds: a prompt of each of the MORE_LENGTHS alone; each of the MORE_MIXTURES."""
    rounds = alone_and_mixed(MORE_LENGTHS, MORE_MIXTURES)
    options = dict(max_num_batched_tokens=SHORT_STEP, enable_prefix_caching=False)
    return engine("short_prompts", rounds, **options)


@pytest.fixture(scope="session")
def short_prompts_stock(engine) -> Result:
    """Fewer of them, with nothing of ours but the metadata."""
    rounds = alone_and_mixed(SHORT_LENGTHS, SHORT_MIXTURES)
    options = dict(max_num_batched_tokens=SHORT_STEP, enable_prefix_caching=False)
    settings = {"dsv4_indexer": {"impl": "stock", "projection": "engine"}}
    return engine("short_prompts_stock", rounds, additional_config=settings, **options)


@pytest.fixture(scope="session")
def two_workers(engine) -> Result:
    """Tensor parallelism over two workers, in chunks, compiled as vLLM chooses to (no
    --enforce-eager); the engine core has a process of its own, too."""
    return engine("two_workers", FEW, environment=two_processes() | SPAWNED, **two_worker_options())


@pytest.fixture(scope="session")
def two_stock_workers(engine) -> Result:
    options = two_worker_options() | dict(additional_config=STOCK)
    return engine("two_stock_workers", FEW, environment=two_processes(), **options)


def two_worker_options() -> dict:
    return dict(tensor_parallel_size=2, enforce_eager=False, max_num_batched_tokens=1024)


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory):
    """A checkpoint of which each half has a layer of every kind, as vLLM wants it of a pipeline
    stage."""
    from vllm_dsv4_indexer.checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("models") / "six-layers", layers=6)


@pytest.fixture(scope="session")
def two_stages(engine, six_layers) -> Result:
    """Pipeline parallelism over two workers, in chunks. Rounds: some prompts, each alone; all of
    them together."""
    options = dict(pipeline_parallel_size=2, environment=two_processes() | SPAWNED)
    options |= dict(additional_config=CHECKED)
    return engine("two_stages", STAGED, six_layers, **options, **staged_options())


@pytest.fixture(scope="session")
def one_stage(engine, six_layers) -> Result:
    """The same in one worker of one thread, as each of the stages has."""
    return engine(
        "one_stage", STAGED, six_layers, environment={"OMP_NUM_THREADS": "1"}, **staged_options()
    )


def staged_options() -> dict:
    return dict(max_num_batched_tokens=509, enable_prefix_caching=False)


@pytest.fixture(scope="session")
def reference(engine) -> Result:
    """The readable implementation of the op inside the engine."""
    options = {"dsv4_indexer": {"impl": "reference"}}
    return engine("reference", FEW, additional_config=options, enable_prefix_caching=False)


@pytest.fixture(scope="session")
def readable(engine) -> Result:
    """In chunks, with prefix caching. Rounds: MIXED; REPEATED twice."""
    return engine("readable", [MIXED, REPEATED, REPEATED], **recorded_chunks())


@pytest.fixture(scope="session")
def full(engine) -> Result:
    """The same, where every state row is saved, and every step is checked."""
    options = recorded_chunks() | dict(additional_config=FULL_CHECKED)
    return engine("full", [MIXED, REPEATED, REPEATED], **options)


@pytest.fixture(scope="session")
def drafted(engine) -> Result:
    """Rounds: DRAFTED, and again with drafts, of which some are wrong. Prompts of unlike lengths
    decode together."""
    return engine("drafted", [DRAFTED, DRAFTED], additional_config=CHECKED, **with_drafts())


@pytest.fixture(scope="session")
def drafted_stock(engine) -> Result:
    return engine("drafted_stock", [DRAFTED, DRAFTED], additional_config=STOCK, **with_drafts())


def with_drafts() -> dict:
    drafts = dict(method="custom_class", model="drafts.FromMemory", num_speculative_tokens=3)
    return dict(speculative_config=drafts, enable_prefix_caching=False)


def recorded_chunks() -> dict:
    return dict(max_num_batched_tokens=509, entries=True)
