"""vLLM's engine core without a model.

Its scheduler, KV cache manager, worker, batches, metadata and sampler are its own, and the
compressor with its plan is ours. In the place of the model stand caches of symbols (symbols.py),
each with the rule which of its rows a token reads.
"""

import json
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from schedules import due, random_schedule
from symbols import Batch, Cache, Memory, SymbolicLayer, entries, histories, last
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.compressor import CompressorStateCache
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import Request

from vllm_dsv4_indexer.checkpoint.config import make_config
from vllm_dsv4_indexer.contract import Extents, Geometry
from vllm_dsv4_indexer.engines.vllm_cpu.checks import Checks
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor
from vllm_dsv4_indexer.engines.vllm_cpu.worker import Worker
from vllm_dsv4_indexer.settings import Settings

VOCABULARY = 997
MOST_TOKENS, MOST_REQUESTS = 8192, 16  # of a step


def answer(history: np.ndarray) -> np.ndarray:
    """The token that the model says behind each history."""
    return history % VOCABULARY


class Drafts:
    """Drafts what the model will say, and is wrong now and then, and silent now and then."""

    def __init__(self, vllm_config: VllmConfig):
        self.count = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, model: Any) -> None:
        """Needs none."""

    def propose(self, sampled, lengths, tokens, slot_mappings=None) -> list[list[int]]:
        rows = zip(sampled, lengths, tokens, strict=False)
        return [self._draft(row[:length]) if said else [] for said, length, row in rows]

    def _draft(self, tokens: np.ndarray) -> list[int]:
        known = len(tokens)
        for _ in range(self.count):
            history = histories(tokens)[-1:]
            wrong = history % 7 == 3
            tokens = np.append(tokens, (answer(history) + wrong) % VOCABULARY)
        return [] if history % 5 == 1 else tokens[known:].tolist()


class Compressor(OnePassCompressor):
    """Our compressor, whose op runs on symbols: `symbolic` stands for the bound layer."""

    symbolic: SymbolicLayer

    def _bind(self, cos_sin_cache: Any) -> Any:
        return self.symbolic


def make_cache(layer: Any, name: str, group: int, spec: Any, blocks: int) -> Cache:
    """The cache of one of DeepSeek-V4's layers. Of a compressor's state the plan says what is
    read."""
    if isinstance(layer, DeepseekV4SWACache):
        ratio, reads = 1, last(spec.sliding_window)
    elif isinstance(layer, CompressorStateCache):
        ratio, reads = 1, last(0)
    else:
        ratio, reads = layer.compress_ratio, entries(layer.compress_ratio)
    return Cache.empty(name, group, ratio, reads, (blocks, spec.block_size // ratio))


class Model(torch.nn.Module):
    """Takes the model's place: writes and reads symbols, layer by layer as DeepSeek-V4 does, and
    says tokens that depend on all tokens before them."""

    def __init__(self, runner: Any):
        super().__init__()
        self.runner = runner
        self.layers = runner.compilation_config.static_forward_context
        self.starts: dict[str, int] = {}  # by request, where its first step began
        self.compressors = {
            module.state_cache.prefix: module
            for module in runner.model.modules()
            if isinstance(module, OnePassCompressor)
        }

    def begin(self, groups: list[Any], blocks: int, settings: Settings) -> list[SymbolicLayer]:
        """No requests, and empty caches of so many blocks. Returns the compressors' layers."""
        for name in list(self.runner.requests):
            del self.runner.requests[name]
            self.runner.input_batch.remove_request(name)
        groups_of = {name: i for i, group in enumerate(groups) for name in group.layer_names}
        made = [
            make_cache(layer, name, groups_of[name], groups[groups_of[name]].kv_cache_spec, blocks)
            for name, layer in self.layers.items()
            if name in groups_of
        ]
        self.memory, self.starts = Memory(made), {}
        checks = Checks() if settings.check == "on" else None
        for name, compressor in self.compressors.items():
            state, keys = (self.memory.caches[n] for n in (name, compressor.k_cache_prefix))
            extents = Extents(*state.rows.shape, keys.rows.size, self.runner.max_model_len)
            compressor.__class__ = Compressor
            compressor.settings = replace(settings, state_save=compressor.settings.state_save)
            geometry = Geometry(compressor.head_dim, compressor.compress_ratio)
            compressor.symbolic = SymbolicLayer(self.memory, state, keys, extents, geometry)
            compressor.checks = checks
        return [compressor.symbolic for compressor in self.compressors.values()]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, **_: Any) -> torch.Tensor:
        batch, metadata = Batch(self.runner), get_forward_context().attn_metadata
        symbols = torch.from_numpy(batch.symbols)
        for name, start in zip(batch.names, batch.starts.tolist()):
            self.starts.setdefault(name, start)
        for name, cache in self.memory.caches.items():
            if name in self.compressors:
                self.compressors[name].symbolic.batch = batch
                self.compressors[name](symbols, positions, SimpleNamespace(cos_sin_cache=None))
            elif cache.ratio == 1:
                self.memory.write(cache, metadata[name].slot_mapping.numpy(), batch.symbols)
                batch.check(cache)
        for compressor in self.compressors.values():
            batch.check(compressor.symbolic.keys)
        return torch.from_numpy(answer(batch.symbols))[:, None]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden_states[:, 0], VOCABULARY).float()


class SymbolicWorker(Worker):
    """Our worker, with the symbols' model in the place of the one that it has loaded."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self.model_runner.model = Model(self.model_runner)


@contextmanager
def symbolic_core(folder: Path, **options: Any) -> Iterator[EngineCore]:
    """vLLM's engine core in this process, for a DeepSeek-V4 of the demo checkpoint's layers."""
    config = make_config(layers=4, hidden=64) | {"vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = EngineArgs(
        model=str(folder),
        attention_backend="dsv4_indexer",
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=MOST_TOKENS,
        max_num_seqs=MOST_REQUESTS,
        kv_cache_memory_bytes=1 << 30,
        **options,
    )
    vllm_config = arguments.create_engine_config()
    vllm_config.parallel_config.worker_cls = f"{__name__}.SymbolicWorker"
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    core = EngineCore(vllm_config, UniProcExecutor, log_stats=False)
    try:
        yield core
    finally:  # what vLLM changes in its process
        core.shutdown()
        envs.disable_envs_cache()
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


# ---- a case --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    schedule: dict[str, Any]  # see schedules.py
    blocks: int  # of the KV cache
    running: int  # the most requests of a step
    chunk: int  # the most tokens of one of several requests in a step, 0 for any
    aborted: dict[int, int]  # by number of the request, the step before which it is
    lookahead: int  # slots behind the tokens of a step, as some ways to draft need them
    in_flight: int  # steps that are scheduled before the first is answered, as for pipeline stages
    caching: bool  # of prefixes


def random_case(core: EngineCore, draw: random.Random) -> Case:
    schedule = random_schedule("random", draw, requests=draw.randint(3, 12))
    forked = {one.get("of") for one in schedule["requests"]}
    free = [number for number in range(len(schedule["requests"])) if number not in forked]
    drafts = core.use_spec_decode
    in_flight = 1 if drafts else draw.choice([1, 1, 2])
    blocks = blocks_for_one(core, in_flight * schedule["budget"]) * draw.choice(
        [0.7, 0.8, 1, 1.3, 8]
    )
    return Case(
        schedule=schedule,
        blocks=int(blocks),
        running=draw.choice([2, 5, MOST_REQUESTS]),
        chunk=draw.choice([0, 0, 37, 200]),
        aborted={number: draw.randint(1, 20) for number in draw.sample(free, len(free) // 4)},
        lookahead=draw.choice([0, 6]) if drafts else 0,
        in_flight=in_flight,
        caching=draw.random() < 0.8,
    )


def blocks_for_one(core: EngineCore, step: int, length: int = 1100) -> int:
    """As many as a request of that length can hold at once, in steps of that many tokens."""
    specs = [group.kv_cache_spec for group in core.scheduler.kv_cache_config.kv_cache_groups]
    most = [getattr(spec, "max_admission_blocks_per_request", None) for spec in specs]
    return 1 + sum(
        blocks(step, length) if blocks else cdiv(length, spec.block_size) + 1
        for blocks, spec in zip(most, specs)
    )


def begin(core: EngineCore, case: Case, settings: Settings) -> list[SymbolicLayer]:
    """Makes it an engine that has served nothing, of the case's sizes. Returns its
    compressors' layers."""
    old, config = core.scheduler, core.vllm_config
    config.cache_config.enable_prefix_caching = case.caching
    config.scheduler_config.long_prefill_token_threshold = case.chunk
    kv_cache_config = replace(old.kv_cache_config, num_blocks=case.blocks)
    core.scheduler = type(old)(
        config,
        kv_cache_config,
        core.structured_output_manager,
        block_size=old.block_size,
        hash_block_size=old.hash_block_size,
    )
    core.scheduler.max_num_scheduled_tokens = case.schedule["budget"]
    core.scheduler.max_num_running_reqs = core.scheduler.max_num_active_reqs = case.running
    core.scheduler.scheduler_reserve_full_isl = False  # else hardly anything is preempted
    core.scheduler.num_lookahead_tokens = case.lookahead
    core.batch_queue_size = case.in_flight
    core.batch_queue = deque(maxlen=case.in_flight) if case.in_flight > 1 else None
    core.step_fn = core.step_with_batch_queue if case.in_flight > 1 else core.step
    return model_of(core).begin(kv_cache_config.kv_cache_groups, case.blocks, settings)


def model_of(core: EngineCore) -> Model:
    return core.model_executor.driver_worker.worker.model_runner.model


def run(core: EngineCore, case: Case, settings: Settings) -> Counter:
    """Serves a case. Returns how often there was what can go wrong. Raises AssertionError for a row
    or an entry that is not right."""
    layers = begin(core, case, settings)
    coming, sequences = dict(enumerate(case.schedule["requests"])), {}
    requests, counts, step = [], Counter(), 0
    while coming or core.scheduler.has_requests() or core.batch_queue:
        if step == case.schedule["restart"] and not core.batch_queue:
            counts["preemptions"] -= len(core.scheduler.running)
            core.scheduler.reset_prefix_cache(reset_running_requests=True)
        for number, tokens in due(coming, sequences, step).items():
            sequences[number] = [token % VOCABULARY for token in tokens]
            requests.append(request(core, number, sequences[number], coming.pop(number)))
            core.add_request(requests[-1])
        core.abort_requests([str(n) for n, when in case.aborted.items() if when == step])
        for output in step_of(core):
            sequences[int(output.request_id)] += output.new_token_ids
            counts["accepted drafts"] += max(len(output.new_token_ids) - 1, 0)
        counts["drafts"] += sum(len(one.spec_token_ids) for one in core.scheduler.running)
        step += 1
        assert step < 5000, "the case does not come to an end"
    counts["preemptions"] += sum(one.num_preemptions for one in requests)
    counts["cached tokens"] = sum(model_of(core).starts.values())
    counts["rows of other requests"] = sum(layer.of_other_requests for layer in layers)
    return counts


def request(core: EngineCore, number: int, tokens: list[int], one: dict[str, Any]) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=one["max_tokens"], ignore_eos=True)
    hasher = core.request_block_hasher
    return Request(str(number), list(tokens), sampling, None, block_hasher=hasher)


def step_of(core: EngineCore) -> list[EngineCoreOutput]:
    outputs, executed = core.step_fn()
    core.post_step(executed)
    return [output for client in (outputs or {}).values() for output in client.outputs]
