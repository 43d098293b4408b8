"""What the backend accepts on vLLM 0.32's CPU engine, and the worker that it names."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dsv4_indexer.engines import (
    compress_ratios,
    refuse,
    require_impl,
    require_indexer,
    require_model_runner_v1,
)
from vllm_dsv4_indexer.settings import Settings

INDEX_TOPK = 512  # vLLM's CPU top-k kernel is compiled for this one (topk_transform_512_cpu)
DRAFTS = ("ngram", "custom_class")  # the ways of speculative decoding that were tried with us
WORKER = "vllm_dsv4_indexer.engines.vllm_cpu.worker.Worker"

logger = init_logger("vllm.dsv4_indexer")


def configure(
    vllm_config: VllmConfig, check_and_update_config: Callable[[VllmConfig], None]
) -> None:
    """Check that the backend can do what is asked, then configure vLLM for it.

    vllm_config: the configuration, complete but for what the platform sets.
    check_and_update_config: the platform's own function, called in between.
    Raises UserError that says what was found, what is supported and what to do.
    """
    if vllm_config.model_config is None:  # as vLLM's own tools have it
        return check_and_update_config(vllm_config)
    _refuse_unsupported(vllm_config)
    settings = Settings.read(vllm_config.additional_config).on("cpu")
    require_impl(settings.impl, "cpu", "reference", "stock")

    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    chunked, caching = scheduler.enable_chunked_prefill, cache.enable_prefix_caching
    tokens = scheduler.max_num_batched_tokens
    check_and_update_config(vllm_config)
    # Without AMX vLLM 0.32 turns these off for DeepSeek-V4, and says so, though its operators
    # support them.
    scheduler.enable_chunked_prefill, cache.enable_prefix_caching = chunked, caching
    scheduler.max_num_batched_tokens = tokens
    message = "DSV4_INDEXER: restored chunked prefill=%s, prefix caching=%s, %d tokens a step"
    logger.info_once(message, chunked, caching, tokens)
    resolve_state_save(settings, vllm_config)
    vllm_config.parallel_config.worker_cls = WORKER


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    require_indexer(vllm_config)
    topk = getattr(vllm_config.model_config.hf_config, "index_topk", None)
    worker = vllm_config.parallel_config.worker_cls
    _refuse_unsupported_model(vllm_config.model_config)
    require_model_runner_v1(vllm_config)
    if current_platform.is_zen_cpu():
        refuse("zentorch is installed", "vLLM's CpuPlatform", "uninstall zentorch")
    if topk != INDEX_TOPK:
        refuse(
            f"the model's index_topk is {topk}",
            f"{INDEX_TOPK} on vLLM's CPU engine",
            "serve Flash instead of Pro",
        )
    if worker not in ("auto", WORKER):
        refuse(f"worker_cls is {worker!r}", "vLLM's own choice ('auto')", "leave --worker-cls out")
    if vllm_config.speculative_config is not None:
        _refuse_unsupported_drafts(vllm_config.speculative_config)
    _refuse_unsupported_parallelism(vllm_config.parallel_config)
    _refuse_unsupported_memory(vllm_config)


def _refuse_unsupported_model(model: ModelConfig) -> None:
    """What vLLM 0.32's CPU engine dies of later: it computes in bfloat16 alone, DeepSeek-V4's first
    layers choose their experts by the token, and its loader of transformers' models fails."""
    if model.dtype is not torch.bfloat16:
        name = str(model.dtype).removeprefix("torch.")
        refuse(f"dtype is {name!r}", "'bfloat16' on vLLM's CPU engine", "pass --dtype bfloat16")
    if model.enable_prompt_embeds:
        remedy = "leave --enable-prompt-embeds out"
        refuse("prompt embeddings are on", "prompts of tokens for this model", remedy)
    if model.model_impl not in ("auto", "vllm"):
        found = f"model_impl is {model.model_impl!r}"
        refuse(found, "vLLM's own model, whose compressors we replace", "leave --model-impl out")
    ratios, layers = len(compress_ratios(model.hf_config)), model.hf_config.num_hidden_layers
    if ratios < layers:
        found = f"the model has {layers} layers, and compress_ratios for {ratios}"
        refuse(found, "one for each layer", "mend the model's config.json")


def _refuse_unsupported_parallelism(parallel: ParallelConfig) -> None:
    """What vLLM 0.32's CPU engine does with no mixture of experts: its CpuCommunicator has no
    all_gatherv, with which copies of the model exchange the tokens of their experts, and its CPU
    experts ignore the expert map."""
    if (copies := parallel.data_parallel_size) > 1:
        refuse(
            f"data_parallel_size is {copies}",
            "1 on vLLM's CPU engine",
            "run a server for each copy of the model",
        )
    if parallel.enable_expert_parallel and parallel.tensor_parallel_size > 1:
        refuse(
            "expert parallelism is on", "tensor parallelism on vLLM's CPU engine", "leave it out"
        )


def _refuse_unsupported_memory(vllm_config: VllmConfig) -> None:
    """What vLLM 0.32's CPU engine dies of, at the start or in its first step: its ExampleConnector
    asks for a single kind of cache, and its two that offload ask for CUDA (no other was tried); of
    this model's caches it cannot make one group; prefetched weights must not lie in a CPU's memory;
    and what Mamba caches align is looked for in layers that this model does not have."""
    cache = vllm_config.cache_config
    one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    prefetched = vllm_config.offload_config.prefetch.offload_group_size
    mamba, here = cache.mamba_cache_mode, "caches in the memory of vLLM's CPU engine"
    for asked, found, supported, option in (
        (cache.kv_offloading_size, "KV offloading is on", here, "kv-offloading-size"),
        (
            vllm_config.kv_transfer_config,
            "a KV connector is configured",
            here,
            "kv-transfer-config",
        ),
        (
            one_group,
            "all caches are to be one group",
            "a group for each kind of cache",
            "disable-hybrid-kv-cache-manager",
        ),
        (
            prefetched,
            "weights are to be prefetched",
            "all weights in memory on vLLM's CPU engine",
            "offload-group-size",
        ),
        (mamba != "none", f"mamba_cache_mode is {mamba!r}", "'none'", "mamba-cache-mode"),
    ):
        if asked:
            refuse(found, supported, f"leave --{option} out")


def _refuse_unsupported_drafts(speculative: SpeculativeConfig) -> None:
    """With a single draft vLLM 0.32's indexer takes a path that its CPU engine does not have."""
    method, tokens = speculative.method, speculative.num_speculative_tokens
    if method not in DRAFTS:
        refuse(
            f"speculative decoding's method is {method!r}",
            f"{' and '.join(DRAFTS)} on a CPU",
            "name one of these",
        )
    if tokens < 2:
        refuse(f"num_speculative_tokens is {tokens}", "2 or more on vLLM's CPU engine", "raise it")


def resolve_state_save(settings: Settings, vllm_config: VllmConfig) -> Settings:
    """The settings with `readable` or `full` in the place of state_save `auto`.

    Raises UserError if `readable` is asked for where the pages that it wants are not given.
    """
    if settings.state_save == "full":
        return settings
    for found, remedy in _reasons_for_full(settings, vllm_config):
        if settings.state_save == "readable":
            found = f"dsv4_indexer.state_save is 'readable', but {found}"
            refuse(found, "vLLM's own scheduler and KV cache manager", remedy)
        logger.info_once("DSV4_INDEXER: state_save=full, since %s", found)
        return replace(settings, state_save="full")
    logger.info_once("DSV4_INDEXER: state_save=readable: pages for rows that are read later")
    return replace(settings, state_save="readable")


def _reasons_for_full(settings: Settings, vllm_config: VllmConfig) -> Iterator[tuple[str, str]]:
    if settings.impl == "stock":
        yield "impl is 'stock', which reads every row back from the state", "leave one of them out"
    if vllm_config.scheduler_config.scheduler_cls is not None:
        yield "a scheduler is configured", "leave --scheduler-cls out"
