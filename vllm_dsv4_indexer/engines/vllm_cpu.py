"""vLLM 0.32.0's CPU engine, with our compressor in the place of the indexer's.

`configure` runs where vLLM checks its configuration and names `Worker` as the worker class.
Everything else happens inside that worker, so an engine that uses another backend meets none of it.
The worker loads the model, replaces the compressor of every indexer and the projection in front of
it, supplies each step with metadata (vllm_cpu_metadata.py), and says at shut-down what the op did.
"""

import vllm

from vllm_dsv4_indexer.errors import NotInstalled, UserError

SUPPORTED_VLLM = "0.32.0"  # everything below is written against this version's objects
if vllm.__version__.split("+")[0] != SUPPORTED_VLLM:  # "+cpu" if built for it
    raise NotInstalled(
        f"--attention-backend dsv4_indexer: this is vLLM {vllm.__version__}; on a CPU the backend "
        f"supports vLLM {SUPPORTED_VLLM}. Install that version, or leave the option out."
    )

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseBackend
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import ROW_WIDTH, Layer
from vllm_dsv4_indexer.engines import indexers_of_stage, refuse, require_impl, require_indexer
from vllm_dsv4_indexer.engines.account import Accountable
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.vllm_cpu_metadata import metadata_on_cpu
from vllm_dsv4_indexer.ops import projection
from vllm_dsv4_indexer.ops.tail import tail_slots
from vllm_dsv4_indexer.settings import Settings

INDEX_TOPK = 512  # vLLM's CPU top-k kernel is compiled for this one (topk_transform_512_cpu)
K_FORMAT = "fp8_pow2"  # of the engine's indexer cache
DRAFTS = ("ngram", "custom_class")  # the ways of speculative decoding that were tried with us

logger = init_logger("vllm.dsv4_indexer")


# ---- configuration -------------------------------------------------------------------------------


def configure(vllm_config: VllmConfig, check_and_update_config) -> None:
    """Check that the backend can do what is asked, then configure vLLM for it.

    vllm_config: the configuration, complete but for what the platform sets.
    check_and_update_config: the platform's own function, called in between.
    Raises ValueError that says what was found, what is supported and what to do.
    """
    if (
        vllm_config.model_config is None
    ):  # vLLM also makes configurations without a model, for its own tools
        return check_and_update_config(vllm_config)
    _refuse_unsupported(vllm_config)
    settings = Settings.read(vllm_config.additional_config).on("cpu")
    require_impl(settings.impl, "cpu", "reference", "stock")
    if settings.state_save == "tail":
        _refuse_unsafe_tail(vllm_config)

    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    wanted = (
        scheduler.enable_chunked_prefill,
        cache.enable_prefix_caching,
        scheduler.max_num_batched_tokens,
    )
    check_and_update_config(vllm_config)
    # Without AMX vLLM 0.32 turns these off for DeepSeek-V4, and says so, though its operators
    # support them.
    (
        scheduler.enable_chunked_prefill,
        cache.enable_prefix_caching,
        scheduler.max_num_batched_tokens,
    ) = wanted
    logger.info_once(
        "DSV4_INDEXER: restored chunked prefill=%s, prefix caching=%s, %d tokens a step", *wanted
    )
    vllm_config.parallel_config.worker_cls = f"{__name__}.{Worker.__qualname__}"


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    require_indexer(vllm_config)
    topk = getattr(vllm_config.model_config.hf_config, "index_topk", None)
    worker = vllm_config.parallel_config.worker_cls
    _refuse_unsupported_model(vllm_config.model_config)
    if topk != INDEX_TOPK:
        refuse(
            f"the model's index_topk is {topk}",
            f"{INDEX_TOPK} on vLLM's CPU engine",
            "serve Flash instead of Pro",
        )
    if worker not in ("auto", f"{__name__}.{Worker.__qualname__}"):
        refuse(f"worker_cls is {worker!r}", "vLLM's own choice ('auto')", "leave --worker-cls out")
    if vllm_config.speculative_config is not None:
        _refuse_unsupported_drafts(vllm_config.speculative_config)
    _refuse_unsupported_parallelism(vllm_config.parallel_config)


def _refuse_unsupported_model(model: ModelConfig) -> None:
    """What vLLM 0.32's CPU engine dies of later: it computes in bfloat16 alone, and DeepSeek-V4's
    first layers choose their experts by the token."""
    if model.dtype is not torch.bfloat16:
        name = str(model.dtype).removeprefix("torch.")
        refuse(f"dtype is {name!r}", "'bfloat16' on vLLM's CPU engine", "pass --dtype bfloat16")
    if model.enable_prompt_embeds:
        remedy = "leave --enable-prompt-embeds out"
        refuse("prompt embeddings are on", "prompts of tokens for this model", remedy)
    ratios, layers = len(model.hf_config.compress_ratios), model.hf_config.num_hidden_layers
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


def _refuse_unsafe_tail(vllm_config: VllmConfig) -> None:
    """Tail-only saving is right where only the request itself reads its state, and each of its
    steps starts where the last one ended. Preemption computes a request again from its start; a
    session with streamed input goes back to the end of its last prompt at the furthest."""
    cache = vllm_config.cache_config
    for unsafe, found, remedy in (
        (cache.enable_prefix_caching, "prefix caching is on", "pass --no-enable-prefix-caching"),
        (
            vllm_config.kv_transfer_config,
            "a KV connector is configured",
            "leave --kv-transfer-config out",
        ),
        (cache.kv_offloading_size, "KV offloading is on", "leave --kv-offloading-size out"),
        (vllm_config.kv_events_config, "KV events are configured", "leave --kv-events-config out"),
        (
            vllm_config.scheduler_config.scheduler_cls,
            "a scheduler is configured",
            "leave --scheduler-cls out",
        ),
        (
            vllm_config.speculative_config,
            "rejected drafts go back",
            "leave --speculative-config out",
        ),
    ):
        if unsafe:
            supported = "'tail' where nobody but the request itself can come back to its state"
            refuse(
                f"dsv4_indexer.state_save is 'tail', but {found}",
                supported,
                f"{remedy}, or leave state_save out",
            )


# ---- the worker and the compressor ---------------------------------------------------------------


class Dsv4IndexerBackend(DeepseekV4CPUSparseBackend):
    """The engine's sparse attention over the keys that our compressor wrote."""

    @staticmethod
    def get_name() -> str:
        return "DSV4_INDEXER"


class Worker(Accountable, CPUWorker):
    """vLLM's CPU worker with our compressor in the model and our metadata under it."""

    def load_model(self, **kwargs: Any) -> None:
        settings = Settings.read(self.vllm_config.additional_config).on("cpu")
        exact = projects_exactly(settings)
        impl = settings.impl
        if impl != "stock":
            ops.prepare(impl, "cpu", K_FORMAT)
        with exact_projections() if exact else nullcontext():
            super().load_model(**kwargs)
        indexers = indexers_of_stage(self.vllm_config)
        replace_compressors(self.get_model(), settings, indexers)
        make_stage_input(self.model_runner)
        who = "vLLM's own compressor" if impl == "stock" else f"impl={impl}"
        what = "exact" if exact else "the engine's own, rounded to bfloat16"
        message = "DSV4_INDEXER: %s compresses for the indexers of %d layers; projection: %s"
        logger.info(message, who, indexers, what)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        with metadata_on_cpu():
            return super().execute_model(*args, **kwargs)


class IndexerCompressor(DeepseekV4CPUCompressor):
    """The indexer's compressor: one call of our op, which saves the state and writes the entries.

    Never constructed: takes the place of the engine's own by assignment to `__class__`, as the
    engine's CPU layer does with the class of the GPU layer. `settings` are set at the same time.
    """

    settings: Settings
    bound: ops.BoundLayer | None = None

    def forward(
        self, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module
    ) -> None:
        """kv_score fp32 [T, 512], positions int64 [T]; everything else comes from the step's
        metadata."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a profiling run has no caches
            return
        bound = self._bind(rotary_emb.cos_sin_cache)
        state, entries = metadata[self.state_cache.prefix], metadata[self.k_cache_prefix]
        plan = once_a_step(
            (state, entries), bound.extents, lambda: self._plan(state, entries, positions, bound)
        )
        bound.run(kv_score, plan)

    def _bind(self, cos_sin_cache: torch.Tensor) -> ops.BoundLayer:
        """The op on this layer's tensors: made in the first step, and again if the engine has
        replaced one of them."""
        k_cache = self._static_forward_context[self.k_cache_prefix].kv_cache
        tensors = Layer(
            self.ape, self._norm_weight_fp32, cos_sin_cache, self.state_cache.kv_cache, k_cache
        )
        if self.bound is None or any(new is not old for new, old in zip(tensors, self.bound.layer)):
            options = dict(eps=self.rms_norm_eps, k_format=K_FORMAT, impl=self.settings.impl)
            self.bound = ops.BoundLayer(tensors, **options)
        return self.bound

    def _plan(
        self, state: Any, entries: Any, positions: torch.Tensor, bound: ops.BoundLayer
    ) -> torch.Tensor:
        slots = state.slot_mapping
        if self.settings.state_save == "tail":
            slots = tail_slots(positions, state.token_to_req_indices, slots)
        return ops.plan(
            positions,
            state.token_to_req_indices,
            slots,
            state.block_table,
            entries.slot_mapping,
            **bound.extents._asdict(),
            impl=self.settings.impl,
        )


def replace_compressors(model: torch.nn.Module, settings: Settings, indexers: int) -> None:
    """Put our compressor into the indexers of `model`, which must be as many as `indexers`.

    Raises UserError where the model does not look as vLLM 0.32.0 builds it.
    """
    attention = [layer for layer in model.modules() if isinstance(layer, DeepseekV4CPUAttention)]
    layers = [layer for layer in attention if layer.indexer is not None]
    if len(layers) != indexers:
        raise UserError(
            f"--attention-backend dsv4_indexer: the model has {len(layers)} layers of vLLM "
            f"{SUPPORTED_VLLM}'s DeepseekV4CPUAttention with an indexer, where its configuration "
            f"asks for {indexers}. Is another plugin replacing the model class? Disable that "
            "plugin."
        )
    for layer in layers:
        compressor = layer.indexer.compressor
        if type(compressor) is not DeepseekV4CPUCompressor:
            raise UserError(
                f"--attention-backend dsv4_indexer: {compressor.prefix} is a "
                f"{type(compressor).__name__}, where vLLM {SUPPORTED_VLLM} has a "
                "DeepseekV4CPUCompressor. Is another plugin replacing it? Disable that plugin."
            )
        layer.backend_cls = Dsv4IndexerBackend
        if settings.impl != "stock":
            compressor.__class__ = IndexerCompressor
            compressor.settings = settings


def make_stage_input(runner: CPUModelRunner) -> None:
    """Make the buffer into which a pipeline stage receives what the stage before it sends.

    vLLM 0.32 makes it in the dummy run that warms a compiled model up, and does not compile
    DeepSeek-V4 on a CPU.
    """
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            runner.max_num_tokens, runner.dtype, runner.device
        )


# ---- the projection ------------------------------------------------------------------------------


def projects_exactly(settings: Settings) -> bool:
    """Whether our projection takes the place of the engine's: as set, else where the engine's would
    not be faster.

    A matrix unit (AMX on x86, bfloat16 matrix multiply-adds on Arm) does several times as many
    products of bfloat16 as anything else on its core.
    """
    if settings.projection == "auto":
        has = torch.cpu.get_capabilities()
        return not (has.get("amx_bf16") or has.get("bf16"))
    return settings.projection == "exact"


class ExactProjection(UnquantizedLinearMethod):
    """How `fused_wkv_wgate` keeps and multiplies its weight: what vLLM's own method does, without
    rounding the result.

    The engine then widens what is fp32 already. The weight is a parameter of the same layer in our
    own layout, so it is the only copy, and vLLM's reload replaces it like any other.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = torch.nn.Parameter(
            projection.prepare_weight(layer.weight.detach()), requires_grad=False
        )

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return projection.project(x, layer.weight)


@contextmanager
def exact_projections() -> Iterator[None]:
    """Models that are built meanwhile get our projection into their indexers' compressors.

    It must be there before weights are loaded: vLLM packs a weight and frees the original as soon
    as they are, whatever loads them, so its own method is replaced where the layer is built.
    """
    build = DeepseekV4CPUAttention.__init__

    def build_with_ours(layer: DeepseekV4CPUAttention, *args: Any, **kwargs: Any) -> None:
        build(layer, *args, **kwargs)
        if layer.indexer is not None:
            replace_projection(layer.indexer.compressor)

    DeepseekV4CPUAttention.__init__ = build_with_ours
    try:
        yield
    finally:
        DeepseekV4CPUAttention.__init__ = build


def replace_projection(compressor: torch.nn.Module) -> None:
    """Raises UserError where the compressor's projection does not look as vLLM 0.32.0 builds it."""
    linear = compressor.fused_wkv_wgate
    method, shape = type(linear.quant_method).__name__, tuple(linear.weight.shape)
    if (
        type(linear.quant_method) is not UnquantizedLinearMethod
        or shape[0] != ROW_WIDTH
        or linear.bias is not None
    ):
        raise UserError(
            f"--attention-backend dsv4_indexer: {compressor.prefix}.fused_wkv_wgate has a {method} "
            f"and a weight of shape {shape}, where vLLM {SUPPORTED_VLLM} has an "
            f"UnquantizedLinearMethod, {ROW_WIDTH} rows and no bias. Is another plugin replacing "
            "it? Disable that plugin, or set dsv4_indexer.projection to 'engine'."
        )
    linear.quant_method = ExactProjection()
