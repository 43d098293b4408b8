"""vLLM 0.32.0's CPU engine, with our compressor in the place of the indexer's.

`configure` runs where vLLM checks its configuration and names `Worker` as the worker class. Everything else happens
inside that worker, so an engine that uses another backend does not meet any of it: the worker supplies the metadata
that vLLM has only as Triton kernels, loads the model, replaces the compressor of every indexer and the projection in
front of it, and says at shut-down what the op did.
"""

import vllm

SUPPORTED_VLLM = "0.32.0"  # everything below is written against this version's objects
if vllm.__version__.split("+")[0] != SUPPORTED_VLLM:  # "+cpu" if built for it
    raise ImportError(
        f"--attention-backend dsv4_indexer: this is vLLM {vllm.__version__}; on a CPU the backend supports vLLM "
        f"{SUPPORTED_VLLM}. Install that version, or leave the option out."
    )

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from vllm.config import ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.models.deepseek_v4.cpu.cpu_mla import (
    DeepseekV4CPUSparseBackend,
    DeepseekV4CPUSparseSWAMetadataBuilder,
)
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.ops import metadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import ROW_WIDTH, Layer
from vllm_dsv4_indexer.engines import indexers_of_stage, refuse, require_impl, require_indexer
from vllm_dsv4_indexer.engines.account import Accountable
from vllm_dsv4_indexer.ops import projection
from vllm_dsv4_indexer.ops.tail import tail_slots
from vllm_dsv4_indexer.settings import Settings

INDEX_TOPK = 512  # vLLM's CPU top-k kernel is compiled for this one (topk_transform_512_cpu)
K_FORMAT = "fp8_pow2"  # of the engine's indexer cache
DRAFTS = ("ngram", "custom_class")  # the ways of speculative decoding that were tried with us

logger = init_logger("vllm.dsv4_indexer")


# ---- configuration -------------------------------------------------------------------------------------------------


def configure(vllm_config: VllmConfig, check_and_update_config) -> None:
    """Check that the backend can do what is asked, then configure vLLM for it.

    vllm_config: the configuration, complete but for what the platform sets.
    check_and_update_config: the platform's own function, called in between.
    Raises ValueError that says what was found, what is supported and what to do.
    """
    if vllm_config.model_config is None:  # vLLM also makes configurations without a model, for its own tools
        return check_and_update_config(vllm_config)
    _refuse_unsupported(vllm_config)
    settings = Settings.read(vllm_config.additional_config).on("cpu")
    require_impl(settings.impl, "cpu", "reference", "stock")
    if settings.state_save == "tail":
        _refuse_unsafe_tail(vllm_config)

    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    wanted = scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens
    check_and_update_config(vllm_config)
    # Without AMX vLLM 0.32 turns these off for DeepSeek-V4, and says so, though its operators support them.
    scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = wanted
    logger.info_once("DSV4_INDEXER: restored chunked prefill=%s, prefix caching=%s, %d tokens a step", *wanted)
    vllm_config.parallel_config.worker_cls = f"{__name__}.{Worker.__qualname__}"


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    require_indexer(vllm_config)
    topk = getattr(vllm_config.model_config.hf_config, "index_topk", None)
    worker = vllm_config.parallel_config.worker_cls
    if topk != INDEX_TOPK:
        refuse(f"the model's index_topk is {topk}", f"{INDEX_TOPK} on vLLM's CPU engine", "serve Flash instead of Pro")
    if worker not in ("auto", f"{__name__}.{Worker.__qualname__}"):
        refuse(f"worker_cls is {worker!r}", "vLLM's own choice ('auto')", "leave --worker-cls out")
    if vllm_config.speculative_config is not None:
        _refuse_unsupported_drafts(vllm_config.speculative_config)
    _refuse_unsupported_parallelism(vllm_config.parallel_config)


def _refuse_unsupported_parallelism(parallel: ParallelConfig) -> None:
    """What vLLM 0.32's CPU engine does with no mixture of experts: its CpuCommunicator has no all_gatherv, with which
    copies of the model exchange the tokens of their experts, and its CPU experts ignore the expert map."""
    if (copies := parallel.data_parallel_size) > 1:
        refuse(f"data_parallel_size is {copies}", "1 on vLLM's CPU engine", "run a server for each copy of the model")
    if parallel.enable_expert_parallel and parallel.tensor_parallel_size > 1:
        refuse("expert parallelism is on", "tensor parallelism on vLLM's CPU engine", "leave it out")


def _refuse_unsupported_drafts(speculative: SpeculativeConfig) -> None:
    """With a single draft vLLM 0.32's indexer takes a path that its CPU engine does not have."""
    method, tokens = speculative.method, speculative.num_speculative_tokens
    if method not in DRAFTS:
        refuse(f"speculative decoding's method is {method!r}", f"{' and '.join(DRAFTS)} on a CPU", "name one of these")
    if tokens < 2:
        refuse(f"num_speculative_tokens is {tokens}", "2 or more on vLLM's CPU engine", "raise it")


def _refuse_unsafe_tail(vllm_config: VllmConfig) -> None:
    """Tail-only saving is right where only the request itself reads its state, and each of its steps starts where the
    last one ended. Preemption computes a request again from its start; a session with streamed input goes back to the
    end of its last prompt at the furthest."""
    cache = vllm_config.cache_config
    for unsafe, found, remedy in (
        (cache.enable_prefix_caching, "prefix caching is on", "pass --no-enable-prefix-caching"),
        (vllm_config.kv_transfer_config, "a KV connector is configured", "leave --kv-transfer-config out"),
        (cache.kv_offloading_size, "KV offloading is on", "leave --kv-offloading-size out"),
        (vllm_config.kv_events_config, "KV events are configured", "leave --kv-events-config out"),
        (vllm_config.scheduler_config.scheduler_cls, "a scheduler is configured", "leave --scheduler-cls out"),
        (vllm_config.speculative_config, "rejected drafts go back", "leave --speculative-config out"),
    ):
        if unsafe:
            supported = "'tail' where nobody but the request itself can come back to its state"
            refuse(f"dsv4_indexer.state_save is 'tail', but {found}", supported, f"{remedy}, or leave state_save out")


# ---- the worker and the compressor ---------------------------------------------------------------------------------


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
        with ExitStack() as if_it_fails:  # an offline engine leaves the process as it was
            provide_metadata(self)
            if_it_fails.callback(withdraw_metadata, self)
            with exact_projections() if exact else nullcontext():
                super().load_model(**kwargs)
            indexers = indexers_of_stage(self.vllm_config)
            replace_compressors(self.get_model(), settings, indexers)
            make_stage_input(self.model_runner)
            if_it_fails.pop_all()
        who = "vLLM's own compressor" if impl == "stock" else f"impl={impl}"
        what = "exact" if exact else "the engine's own, rounded to bfloat16"
        logger.info("DSV4_INDEXER: %s compresses for the indexers of %d layers; projection: %s", who, indexers, what)

    def shutdown(self) -> None:
        super().shutdown()
        withdraw_metadata(self)


class IndexerCompressor(DeepseekV4CPUCompressor):
    """The indexer's compressor: one call of our op, which saves the state and writes the entries.

    Never constructed: takes the place of the engine's own by assignment to `__class__`, as the engine's CPU layer
    does with the class of the GPU layer. `settings` are set at the same time.
    """

    settings: Settings
    bound: ops.BoundLayer | None = None

    def forward(self, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module) -> None:
        """kv_score fp32 [T, 512], positions int64 [T]; everything else comes from the step's metadata."""
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # a profiling run has no caches
            return
        bound = self._bind(rotary_emb.cos_sin_cache)
        bound.run(kv_score, self._plan(context, positions, bound))

    def _bind(self, cos_sin_cache: torch.Tensor) -> ops.BoundLayer:
        """The op on this layer's tensors: made in the first step, and again if the engine has replaced one of them."""
        k_cache = self._static_forward_context[self.k_cache_prefix].kv_cache
        tensors = Layer(self.ape, self._norm_weight_fp32, cos_sin_cache, self.state_cache.kv_cache, k_cache)
        if self.bound is None or any(new is not old for new, old in zip(tensors, self.bound.layer)):
            options = dict(eps=self.rms_norm_eps, k_format=K_FORMAT, impl=self.settings.impl)
            self.bound = ops.BoundLayer(tensors, **options)
        return self.bound

    def _plan(self, context: ForwardContext, positions: torch.Tensor, bound: ops.BoundLayer) -> torch.Tensor:
        """The step's plan for the layers that share its metadata: made by the first of them. It is kept on the forward
        context, which vLLM makes anew for every pass and which keeps the metadata alive meanwhile."""
        state = context.attn_metadata[self.state_cache.prefix]
        entries = context.attn_metadata[self.k_cache_prefix]
        plans = vars(context).setdefault("dsv4_indexer_plans", {})
        key = id(state), id(entries), bound.extents
        if key not in plans:
            slots = state.slot_mapping
            if self.settings.state_save == "tail":
                slots = tail_slots(positions, state.token_to_req_indices, slots)
            plans[key] = ops.plan(
                positions, state.token_to_req_indices, slots, state.block_table, entries.slot_mapping,
                **bound.extents._asdict(), impl=self.settings.impl,
            )  # fmt: skip
        return plans[key]


def replace_compressors(model: torch.nn.Module, settings: Settings, indexers: int) -> None:
    """Put our compressor into the indexers of `model`, which must be as many as `indexers`.

    Raises RuntimeError where the model does not look as vLLM 0.32.0 builds it.
    """
    attention = [layer for layer in model.modules() if isinstance(layer, DeepseekV4CPUAttention)]
    layers = [layer for layer in attention if layer.indexer is not None]
    if len(layers) != indexers:
        raise RuntimeError(
            f"--attention-backend dsv4_indexer: the model has {len(layers)} layers of vLLM {SUPPORTED_VLLM}'s "
            f"DeepseekV4CPUAttention with an indexer, where its configuration asks for {indexers}. Is another plugin "
            "replacing the model class? Disable that plugin."
        )
    for layer in layers:
        compressor = layer.indexer.compressor
        if type(compressor) is not DeepseekV4CPUCompressor:
            raise RuntimeError(
                f"--attention-backend dsv4_indexer: {compressor.prefix} is a {type(compressor).__name__}, where vLLM "
                f"{SUPPORTED_VLLM} has a DeepseekV4CPUCompressor. Is another plugin replacing it? Disable that plugin."
            )
        layer.backend_cls = Dsv4IndexerBackend
        if settings.impl != "stock":
            compressor.__class__ = IndexerCompressor
            compressor.settings = settings


def make_stage_input(runner: CPUModelRunner) -> None:
    """Make the buffer into which a pipeline stage receives what the stage before it sends.

    vLLM 0.32 makes it in the dummy run that warms a compiled model up, and does not compile DeepSeek-V4 on a CPU.
    """
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            runner.max_num_tokens, runner.dtype, runner.device
        )


# ---- the projection ------------------------------------------------------------------------------------------------


def projects_exactly(settings: Settings) -> bool:
    """Whether our projection takes the place of the engine's: as set, else where the engine's would not be faster.

    A matrix unit (AMX on x86, bfloat16 matrix multiply-adds on Arm) does several times as many products of bfloat16 as
    anything else on its core.
    """
    if settings.projection == "auto":
        has = torch.cpu.get_capabilities()
        return not (has.get("amx_bf16") or has.get("bf16"))
    return settings.projection == "exact"


class ExactProjection(UnquantizedLinearMethod):
    """How `fused_wkv_wgate` keeps and multiplies its weight: what vLLM's own method does, without rounding the result.

    The engine then widens what is fp32 already. The weight is a parameter of the same layer in our own layout, so it is
    the only copy, and vLLM's reload replaces it like any other.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = torch.nn.Parameter(projection.prepare_weight(layer.weight.detach()), requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return projection.project(x, layer.weight)


@contextmanager
def exact_projections() -> Iterator[None]:
    """Models that are built meanwhile get our projection into their indexers' compressors.

    It must be there before weights are loaded: vLLM packs a weight and frees the original as soon as they are, whatever
    loads them, so its own method is replaced where the layer is built.
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
    """Raises RuntimeError where the compressor's projection does not look as vLLM 0.32.0 builds it."""
    linear = compressor.fused_wkv_wgate
    method, shape = type(linear.quant_method).__name__, tuple(linear.weight.shape)
    if type(linear.quant_method) is not UnquantizedLinearMethod or shape[0] != ROW_WIDTH or linear.bias is not None:
        raise RuntimeError(
            f"--attention-backend dsv4_indexer: {compressor.prefix}.fused_wkv_wgate has a {method} and a weight of shape "
            f"{shape}, where vLLM {SUPPORTED_VLLM} has an UnquantizedLinearMethod, {ROW_WIDTH} rows and no bias. Is another "
            "plugin replacing it? Disable that plugin, or set dsv4_indexer.projection to 'engine'."
        )
    linear.quant_method = ExactProjection()


# ---- metadata that vLLM 0.32.0 has only as Triton kernels, which do not run on a CPU ----------------------------------
# A patch can go when vLLM registers its own in CpuPlatform.register_triton_kernel_overrides. The parameters have the
# names of the kernels' parameters, since vLLM passes them by name.


_users: set[Any] = set()  # an offline engine may share its process with others
_originals = ExitStack()


def provide_metadata(user: Any) -> None:
    """Replace the kernels and the builder method below, unless another user in this process has."""
    if not _users:
        _replace_kernels()
    _users.add(user)


def withdraw_metadata(user: Any) -> None:
    """Put vLLM's own back, if `user` is the last one."""
    _users.discard(user)
    if not _users:
        _originals.close()


def _replace_kernels() -> None:
    for owner, name, function in (
        (metadata, "_token_request_mapping_kernel", token_request_mapping),
        (compressor_utils.CompressedSlotMappingKernel, "kernel", compressed_slot_mapping),
        (indexer.BuildPrefillChunkMetadataKernel, "kernel", prefill_chunk_metadata),
        (indexer.PrepareUniformDecodeKernel, "kernel", uniform_decode_metadata),
        (sparse_swa.ComputeSWAIndicesAndLensKernel, "kernel", not_read_on_cpu),
        (sparse_swa.ComputePrefillMetadataKernel, "kernel", not_read_on_cpu),
    ):
        _replace(owner, name, KernelOverride(getattr(owner, name), function))
    _replace(DeepseekV4CPUSparseSWAMetadataBuilder, "build_tile_scheduler", no_tile_schedule)


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def token_request_mapping(query_start_loc, output, num_reqs, num_mapped, num_tokens, num_warps):
    """output[t] = the request that token t belongs to; 0 for the padding behind the last request."""
    tokens = torch.arange(num_mapped, dtype=query_start_loc.dtype)
    output[:num_mapped] = torch.searchsorted(query_start_loc[1:], tokens, right=True)
    output[num_mapped:num_tokens] = 0


def _requests_and_positions(query_start_loc, seq_lens):
    """The request and the position of each token of a packed batch, int64 [T]."""
    query_lens = torch.diff(query_start_loc)
    request = torch.repeat_interleave(query_lens)
    first_position = seq_lens[: len(query_lens)] - query_lens
    return request, torch.arange(len(request)) + (first_position - query_start_loc[:-1])[request]


def compressed_slot_mapping(
    compressed_slot_mapping_ptr,
    slot_mapping_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    block_table_stride,
    block_size,
    dcp_world_size,
    cp_interleave,
    COMPRESS_RATIO,
    PAD_ID,
    TRITON_BLOCK_SIZE,
):
    """The slot of the entry that each token closes, PAD_ID for a token that closes none or has no slot itself."""
    num_reqs = len(block_table_ptr)
    request, position = _requests_and_positions(query_start_loc_ptr[: num_reqs + 1], seq_lens_ptr)
    closes = ((position + 1) % COMPRESS_RATIO == 0) & (slot_mapping_ptr[: len(request)] != PAD_ID)
    request, entry = request[closes], position[closes] // COMPRESS_RATIO
    slots = compressed_slot_mapping_ptr[: len(closes)]
    slots.fill_(PAD_ID)
    slots[closes] = block_table_ptr[request, entry // block_size].long() * block_size + entry % block_size


def prefill_chunk_metadata(
    query_start_loc_ptr,
    uncompressed_seq_lens_ptr,
    cu_compressed_seq_lens_ptr,
    row_start_cu_compressed_seq_lens_ptr,
    token_to_seq_ptr,
    cu_compressed_seq_len_ks_ptr,
    cu_compressed_seq_len_ke_ptr,
    query_slice_start,
    query_slice_stop,
    DCP_RANK,
    DCP_WORLD,
    DCP_INTERLEAVE,
    BLOCK_SIZE,
    COMPRESS_RATIO,
):
    """The range [ks, ke) of entries that each token of the slice may score, and the request of each entry."""
    request, position = _requests_and_positions(query_start_loc_ptr, uncompressed_seq_lens_ptr)
    rows = slice(query_slice_start, query_slice_stop)
    first_entry = row_start_cu_compressed_seq_lens_ptr[request[rows]]
    cu_compressed_seq_len_ks_ptr.copy_(first_entry)
    cu_compressed_seq_len_ke_ptr.copy_(first_entry + (position[rows] + 1) // COMPRESS_RATIO)
    token_to_seq_ptr.copy_(torch.repeat_interleave(torch.diff(cu_compressed_seq_lens_ptr)))


def uniform_decode_metadata(
    seq_lens_ptr,
    decode_seq_lens_ptr,
    block_table_ptr,
    block_table_stride,
    expanded_block_table_ptr,
    expanded_bt_stride,
    decode_lens_ptr,
    max_decode_len,
    BLOCK_SIZE,
):
    """Each of a request's `max_decode_len` tokens, one and its drafts, becomes a request of one token: its own length
    (0 for the padding behind the last request) and the request's pages."""
    tokens = len(seq_lens_ptr) * max_decode_len
    drafts_to_come = torch.arange(max_decode_len - 1, -1, -1, dtype=seq_lens_ptr.dtype)
    decode_seq_lens_ptr[:tokens] = (seq_lens_ptr[:, None] - drafts_to_come).clamp(min=0).flatten()
    expanded_block_table_ptr[:tokens] = block_table_ptr.repeat_interleave(max_decode_len, dim=0)
    decode_lens_ptr[:tokens] = 1


def not_read_on_cpu(*_, **__):
    """Window indices and gather lengths: the CPU attention works its own out from the positions."""


def no_tile_schedule(self, num_decode_tokens):
    """The CPU has no tile scheduler. vLLM 0.32.0's own override lacks the layer types that V4.1 brought (c1a, c2a)."""
    return dict.fromkeys(getattr(sparse_swa, name) for name in vars(sparse_swa) if name.startswith("_LAYER_TYPE_"))
