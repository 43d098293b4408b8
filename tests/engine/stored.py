"""What the K caches hold for each request of a running engine, read as the engine reads it.

The functions run in the workers: `llm.collective_rpc(watch)` before, `take` after.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dsv4_indexer.contract import DS_MLA_DATA_BYTES, FP8_PAGE_ENTRIES, HEAD_DIM, RATIO

BLOCK = 256  # tokens of a page of keys


@dataclass(frozen=True)
class Stored:
    """A request as its last step left it.

    lengths: by step, how many tokens counted as computed before it, and behind it. tokens: all that
    the model took, drafts too. entries: of these, the indexers' keys, uint8 [layers, tokens // 4,
    132]. main: the others, by layer: its ratio, and uint8 [tokens // ratio, 584].
    """

    lengths: dict[int, tuple[int, int]]
    tokens: list[int]
    entries: np.ndarray
    main: list[tuple[int, np.ndarray]]


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
    for state in _states(worker):
        state.zero_()


def poison(worker: Any, pages: list[int]) -> None:
    """Fill pages of the states with NaN."""
    for state in _states(worker):
        state[pages] = float("nan")


def _states(worker: Any) -> list[Any]:
    layers = worker.model_runner.compilation_config.static_forward_context
    return [layer.kv_cache for name, layer in layers.items() if name.endswith("state_cache")]


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
        runner.stored[name] = Stored(lengths, tokens, *_entries(runner, row, length))


def _entries(runner: Any, row: int, length: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Of the first `length` tokens of the request in that row of the batch."""
    indexer, main = [], []
    layers = runner.compilation_config.static_forward_context
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        table = runner.input_batch.block_table[number].block_table.np[row]
        for name in group.layer_names:
            if name.endswith("indexer.k_cache"):
                cache = layers[name].kv_cache.flatten(1)
                indexer.append(_read(cache, table, length // RATIO, FP8_PAGE_ENTRIES, HEAD_DIM))
            elif (ratio := getattr(layers[name], "compress_ratio", 0)) > 1:
                cache, per_page = layers[name].kv_cache.flatten(1), BLOCK // ratio
                entries = _read(cache, table, length // ratio, per_page, DS_MLA_DATA_BYTES)
                main.append((ratio, entries))
    return np.stack(indexer), main


def _read(cache: Any, table: np.ndarray, count: int, per_page: int, width: int) -> np.ndarray:
    """The first `count` entries of a request, with their scales. A page has so many entries of
    `width` bytes, then their scales; cache: [pages, bytes]."""
    page, entry = np.divmod(np.arange(count), per_page)
    pages = cache.numpy()
    parts = pages[:, : per_page * width], pages[:, per_page * width :]
    parts = [part.reshape(len(pages), per_page, -1)[table[page], entry] for part in parts]
    return np.concatenate(parts, axis=1)
