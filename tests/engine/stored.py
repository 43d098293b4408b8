"""What the indexers' K caches hold for each request of a running engine, read as the engine reads
it.

The functions run in the workers: `llm.collective_rpc(watch)` before, `take` after.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dsv4_indexer.contract import FP8_PAGE_ENTRIES, FP8_SCALE_OFFSET, RATIO


@dataclass(frozen=True)
class Stored:
    """A request as its last step left it.

    lengths: by step, how many tokens counted as computed before it, and behind it. tokens: all that
    the model took, drafts too. entries: of these, uint8 [layers, tokens // 4, 132].
    """

    lengths: dict[int, tuple[int, int]]
    tokens: list[int]
    entries: np.ndarray


def watch(worker: Any) -> None:
    """From now on read each request's entries, through its block table, behind every step it is
    in."""
    runner = worker.model_runner
    runner.stored, runner.step = {}, 0
    execute = runner.execute_model

    def execute_and_read(scheduled: Any, *arguments: Any) -> Any:
        result = execute(scheduled, *arguments)
        if scheduled.num_scheduled_tokens:
            _read_all(runner, scheduled.num_scheduled_tokens)
            runner.step += 1
        return result

    runner.execute_model = execute_and_read


def forget(worker: Any) -> None:
    """Zero the states of a worker that runs nothing."""
    for name, layer in worker.model_runner.compilation_config.static_forward_context.items():
        if name.endswith("indexer.compressor.state_cache"):
            layer.kv_cache.zero_()


def take(worker: Any) -> dict[str, Stored]:
    """By vLLM's name, the requests since the last time."""
    runner = worker.model_runner
    stored, runner.stored, runner.step = runner.stored, {}, 0
    return stored


def _read_all(runner: Any, scheduled: dict[str, int]) -> None:
    batch = runner.input_batch
    for row, name in enumerate(batch.req_ids):
        computed = int(batch.num_computed_tokens_cpu[row])
        length = computed + scheduled[name]
        lengths = runner.stored[name].lengths if name in runner.stored else {}
        lengths[runner.step] = computed, length
        tokens = batch.token_ids_cpu[row, :length].tolist()
        runner.stored[name] = Stored(lengths, tokens, _entries(runner, row, length // RATIO))


def _entries(runner: Any, row: int, count: int) -> np.ndarray:
    """The first `count` entries of the request in that row of the batch."""
    page, entry = np.divmod(np.arange(count), FP8_PAGE_ENTRIES)
    layers = []
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        table = runner.input_batch.block_table[number].block_table.np[row]
        for name in group.layer_names:
            if name.endswith("indexer.k_cache"):
                cache = runner.compilation_config.static_forward_context[name].kv_cache
                layers.append(_read(cache.flatten(1).numpy(), table[page], entry))
    return np.stack(layers)


def _read(cache: np.ndarray, page: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """[len(entry), 132]: the values and the scale of each; cache: [pages, 64 * 132]."""
    parts = cache[:, :FP8_SCALE_OFFSET], cache[:, FP8_SCALE_OFFSET:]
    parts = [part.reshape(len(cache), FP8_PAGE_ENTRIES, -1)[page, entry] for part in parts]
    return np.concatenate(parts, axis=1)
