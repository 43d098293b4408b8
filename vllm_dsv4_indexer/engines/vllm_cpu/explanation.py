"""What a model's caches take in vLLM 0.32's CPU engine, in vLLM's own numbers: the specs of its
layers, and the functions by which its engine core sizes the cache."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.worker.cpu import shm  # noqa: F401  # makes torch.cuda.Event one that a CPU has
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_dsv4_indexer.engines import compress_ratios, indexers_of_stage
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import FORMATS, replace_compressors
from vllm_dsv4_indexer.engines.vllm_cpu.configuration import resolve_state_save
from vllm_dsv4_indexer.engines.vllm_cpu.state import ReadableStateSpec
from vllm_dsv4_indexer.settings import Settings

STEPS = (512, 2048, 8192)  # tokens, beside those that were asked for


class Group(NamedTuple):
    """Caches that have the same blocks."""

    caches: str
    tokens: int  # of a block
    window: int | None  # tokens behind a request's end that are kept; None: all
    page_bytes: int  # of all its caches
    most_blocks: int  # of one request, as long as the model allows, while steps compute it
    state: ReadableStateSpec | None  # of which rows are kept that somebody reads later

    @property
    def keeps(self) -> str:
        if self.state:
            return "rows that are read later"
        return f"the last {self.window} tokens" if self.window else "all"

    def blocks(self, tokens: int, hits: int) -> int:
        """That a step of these tokens fills; prefixes hit in multiples of `hits`."""
        if self.state:
            return len(self.state.read_later(0, tokens, hits))
        return -(-tokens // self.tokens)

    def kept(self, tokens: int) -> int:
        """Of a request of that length, when its last step is behind it."""
        return self.blocks(tokens if self.state else min(tokens, self.window or tokens), hits=0)


class Explanation(NamedTuple):
    groups: list[Group]
    block_bytes: int  # a block has room for a page of any group
    context: int  # tokens: max_model_len
    step: int  # tokens: max_num_batched_tokens
    least_bytes: int  # of the KV cache: one request of that context, and the null block
    hits: int  # prefixes hit in multiples of so many tokens; 0: never
    fingerprint: str  # equal where caches can be exchanged

    @staticmethod
    def of(config: VllmConfig, groups: list[KVCacheGroupSpec]) -> "Explanation":
        """config: with the layout of its KV cache resolved."""
        block_bytes = kv_cache_utils._pool_bytes_per_block(config, groups)
        needed = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        worker = KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups)
        cache = kv_cache_utils.generate_scheduler_kv_cache_config([worker])
        sizes = kv_cache_utils.resolve_kv_cache_block_sizes(cache, config)
        hits = kv_cache_utils.resolve_cache_hit_alignment_tokens(cache, config, *sizes)
        return Explanation(
            [_group(config, group) for group in groups],
            block_bytes,
            config.model_config.max_model_len,
            config.scheduler_config.max_num_batched_tokens,
            needed + block_bytes,
            hits if config.cache_config.enable_prefix_caching else 0,
            _fingerprint(config, groups),
        )

    def __str__(self) -> str:
        """As a line of the log."""
        hits = (
            f"prefixes hit in multiples of {self.hits} tokens" if self.hits else "no prefixes hit"
        )
        return (
            f"blocks of {self.block_bytes} bytes; a step of {self.step} tokens fills "
            f"{self.blocks(self.step)}; a request of {self.context} needs {self.least_bytes} bytes "
            f"of KV cache; {hits}; fingerprint {self.fingerprint}"
        )

    def too_little(self, available: int) -> str:
        """What to do with so few bytes."""
        return (
            f"{available} bytes are too few for the KV cache: a request of {self.context} tokens "
            f"needs {self.least_bytes} in steps of {self.step}. Pass --kv-cache-memory-bytes "
            f"{self.least_bytes}, or fewer --max-num-batched-tokens: smaller steps need less"
        )

    def blocks(self, tokens: int) -> int:
        """That a step of these tokens fills."""
        return sum(group.blocks(tokens, self.hits) for group in self.groups)

    def kept(self, tokens: int) -> int:
        """Blocks of a request of that length, when its last step is behind it."""
        return sum(group.kept(tokens) for group in self.groups)


def _group(config: VllmConfig, group: KVCacheGroupSpec) -> Group:
    spec = group.kv_cache_spec
    first = getattr(spec, "first_spec", spec)
    return Group(
        _caches(group.layer_names),
        spec.block_size,
        getattr(first, "sliding_window", None),
        sum(one.page_size_bytes for one in _specs(group)),
        -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes),
        first if isinstance(first, ReadableStateSpec) else None,
    )


def _specs(group: KVCacheGroupSpec) -> list[KVCacheSpec]:
    return [kv_cache_utils._get_per_layer_spec(group, name) for name in group.layer_names]


def _caches(names: list[str]) -> str:
    """How many caches of which name the layers of a group have."""
    kinds = Counter(re.sub(r".*layers\.\d+\.", "", name) for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _fingerprint(config: VllmConfig, groups: list[KVCacheGroupSpec]) -> str:
    """Of the model's layers and of the pages of their caches; the same in all pipeline stages that
    have a layer of every kind."""
    pages = {
        (type(spec).__name__, spec.block_size, spec.page_size_bytes, str(spec.dtype))
        for group in groups
        for spec in _specs(group)
    }
    ratios = compress_ratios(config.model_config.hf_config)
    said = repr((ratios, config.cache_config.cache_dtype, FORMATS, sorted(pages)))
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def explain(config: VllmConfig) -> Iterator[tuple[str, str]]:
    """What there is to say of a configuration that is accepted."""
    specs = specs_of(config)
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    told = Explanation.of(config, groups)
    hf = config.model_config.hf_config
    ratios = Counter(compress_ratios(hf)[: hf.num_hidden_layers])
    kinds = ", ".join(f"ratio {ratio} in {count}" for ratio, count in sorted(ratios.items()))
    yield "layers", f"{hf.num_hidden_layers}: {kinds} (4: with an indexer)"
    yield "block", f"{told.block_bytes} bytes: a page of any group, for all caches of the group"
    for group in told.groups:
        yield (
            "group",
            f"{group.tokens} tokens a block, keeps {group.keeps}, {group.page_bytes} bytes a page: "
            f"{group.caches}",
        )
    yield "step", _taken(told, told.step, told.blocks(told.step))
    yield "context", f"{_taken(told, told.context, told.kept(told.context))} behind its last step"
    for step in sorted({told.step, *(s for s in STEPS if s < told.step)}):
        config.scheduler_config.max_num_batched_tokens = step
        least = Explanation.of(config, groups).least_bytes
        yield (
            "KV cache",
            f"at least {least} bytes for a request of {told.context} tokens in steps of {step}: "
            f"--kv-cache-memory-bytes {least} --max-num-batched-tokens {step}",
        )
    hits = "are off"
    if told.hits:
        hits = f"hit in multiples of {told.hits} tokens: in prompts of {told.hits + 1} or more"
    yield "prefixes", hits
    yield "fingerprint", f"{told.fingerprint}: the same where caches can be exchanged"


def _taken(told: Explanation, tokens: int, blocks: int) -> str:
    return f"of {tokens} tokens: {blocks} blocks, {blocks * told.block_bytes} bytes"


def specs_of(config: VllmConfig) -> dict[str, KVCacheSpec]:
    """Of a model whose weights are not loaded. Resolves the layout of its caches in `config`, as
    the engine core does, and gives the model to one worker: it holds the caches of all stages."""
    parallel = config.parallel_config
    parallel.tensor_parallel_size = parallel.pipeline_parallel_size = parallel.world_size = 1
    dtype = config.model_config.dtype
    with _one_worker(config), set_default_torch_dtype(dtype), torch.device("meta"):
        model = initialize_model(config)
    settings = resolve_state_save(Settings.read(config.additional_config).on("cpu"), config)
    replace_compressors(model, settings, indexers_of_stage(config), request_ids=list)
    specs = GPUModelRunner.get_kv_cache_spec(
        SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
    )
    register_all_kvcache_specs(config)
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    backends = {layers[name].get_attn_backend() for name in specs}
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(config, [layouts], specs.values())
    return specs


@contextmanager
def _one_worker(config: VllmConfig) -> Iterator[None]:
    """The process groups that a model asks for when it is made."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()
