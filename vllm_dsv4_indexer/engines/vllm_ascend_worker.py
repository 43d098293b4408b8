"""vllm-ascend's worker, with our op in the place of its indexer's compressor.

While the worker loads its model, `AscendDSABackend.get_impl_cls` answers with the subclasses below;
the backend itself stays the stock one, since vllm-ascend compares it by identity. They replace, per
layer, the stock chain (compressor, Hadamard product, quantisation, two scatters on A2 and A3;
compressor, Hadamard product, one fused store on A5) by two launches: the projection, one matmul of
torch_npu's for `wkv` and `wgate` joined, and the op with the step's plan.

Nothing here waits for the device, so that a graph can be captured. What a step's layers share:
vllm_ascend_step.py.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch_npu
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform
from vllm_ascend import utils
from vllm_ascend.attention import dsa_v1
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPImpl
from vllm_ascend.attention.dsa_v1 import AscendDSABackend, AscendDSAImpl
from vllm_ascend.device.device_op import DeviceOperator
from vllm_ascend.ops import rope_dsv4
from vllm_ascend.worker.worker import NPUWorker

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import HEAD_DIM, KV_WIDTH, RATIO, ROPE_DIM, Layer
from vllm_dsv4_indexer.engines import indexers_of_stage, refuse
from vllm_dsv4_indexer.engines.account import Accountable
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.vllm_ascend import FOUND
from vllm_dsv4_indexer.engines.vllm_ascend_step import Metadata, plan_requests, requests_of
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.settings import Settings

# 0.23.0 does it after a dummy run's metadata are built, which so have the slots of the step before.
SLOTS_ARE_VOIDED_LATE = FOUND[0] == "0.23.0"

logger = init_logger("vllm.dsv4_indexer")


class Worker(Accountable, NPUWorker):
    """vllm-ascend's worker; its model's indexers call our op."""

    def load_model(self) -> None:
        impl = Settings.read(self.vllm_config.additional_config).on("ascend").impl
        indexers = indexers_of_stage(self.vllm_config)
        if impl == "stock":
            super().load_model()
            logger.info(
                "DSV4_INDEXER: vllm-ascend's own compressor compresses for the indexers of %d "
                "layers",
                indexers,
            )
            return
        ops.prepare(impl, current_platform.device_type, k_format())
        check_signatures()
        with one_pass_indexers() as made:
            super().load_model()
        finish_loading(
            self.model_runner.get_model(),
            impl,
            indexers,
            self.vllm_config.model_config.max_model_len,
        )
        refuse_drafts(made)
        logger.info(
            "DSV4_INDEXER: impl=%s compresses for the indexers of %d layers", impl, indexers
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        if (
            scheduler_output.total_num_scheduled_tokens == 0
        ):  # the runner may make a dummy run of it
            self._void_slots()
        return super().execute_model(scheduler_output)

    def execute_dummy_batch(self) -> None:
        self._void_slots()
        super().execute_dummy_batch()

    def _void_slots(self) -> None:
        """Have the tokens of a dummy run say "write nothing" before their metadata are built."""
        if not SLOTS_ARE_VOIDED_LATE:
            return
        for table in self.model_runner.input_batch.block_table.block_tables:
            table.slot_mapping.gpu.fill_(-1)


# ---- the attention -------------------------------------------------------------------------------


class OnePassIndexer:
    """Mixed into vllm-ascend's attention implementations: the keys of their indexer come from our
    op."""

    made: ClassVar[list["OnePassIndexer"]]  # those with an indexer, while a model is loaded
    impl: str
    cos_sin: Tensor
    wkv_wgate: Tensor | None = None
    bound: ops.BoundLayer | None = None
    bound_to: tuple[Tensor | None, ...]  # the tensors that `bound` was made of

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (
            self.indexer is not None
        ):  # layers of ratio 128, and those of the sliding window alone, have none
            refuse_quantised(self.indexer.compressor)
            self.made.append(self)

    def finish_loading(self, impl: str, cos_sin: Tensor) -> None:
        """Join the loaded wkv and wgate. They become views, so that weights which are loaded again
        arrive here, too."""
        wkv, wgate = self.indexer.compressor.wkv, self.indexer.compressor.wgate
        self.impl, self.cos_sin = impl, cos_sin
        self.wkv_wgate = torch.cat([wkv.weight.data, wgate.weight.data])
        wkv.weight.data, wgate.weight.data = self.wkv_wgate.split(KV_WIDTH)

    def project(self, x: Tensor) -> Tensor:
        """[T, hidden] to kv_score [T, 512] in fp32, not rounded in between."""
        return torch.mm(x, self.wkv_wgate.t(), out_dtype=torch.float32)

    def bind(self, kv_cache: tuple[Tensor, ...]) -> ops.BoundLayer:
        """The op on this layer's tensors: made in the first step, and again if one of them has been
        replaced."""
        compressor = self.indexer.compressor
        caches = DeviceOperator.unpack_dsa_indexer_kv_cache(kv_cache)
        tensors = compressor.ape, compressor.norm.weight, self.cos_sin, *caches
        if self.bound is None or any(new is not old for new, old in zip(tensors, self.bound_to)):
            layer = Layer(*tensors[:3], *_without_heads(*caches))
            options = dict(eps=compressor.norm_eps, k_format=k_format(), impl=self.impl)
            self.bound, self.bound_to = ops.BoundLayer(layer, **options), tensors
        return self.bound

    def plan(self, metadata: Metadata, bound: ops.BoundLayer) -> Tensor:
        """This step's plan, made by the first layer that asks. `metadata`: those of the layer's
        state and K cache."""

        def make() -> Tensor:
            k_page = bound.layer.k_cache.shape[1]
            return plan_requests(
                requests_of(*self.parts(*metadata)), bound.extents, k_page, self.impl
            )

        # What was made before a capture began is not used in it: a graph makes its plan again in
        # every replay.
        capturing = torch.npu.is_current_stream_capturing()
        return once_a_step((*metadata, capturing), bound.extents, make)

    def compress(self, x: Tensor, kv_cache: tuple[Tensor, ...], metadata: Metadata) -> None:
        """Save the state rows of these tokens, write their K entries."""
        bound = self.bind(kv_cache)
        plan = self.plan(metadata, bound)
        bound.run(self.project(x), plan)


def k_format() -> str:
    """Of vllm-ascend's indexer cache."""
    return (
        "fp8_amax"
        if utils.get_ascend_device_type() is utils.AscendDeviceType.A5
        else "int8_hadamard"
    )


def _without_heads(
    state: Tensor, k_cache: Tensor, scales: Tensor, page: Tensor | None
) -> tuple[Tensor, ...]:
    """vllm-ascend's caches as the op takes them, which has no dimension for the one head."""
    if page is not None:  # an A5's pages hold values and scales, of which the other two are views
        return state.squeeze(2), page.view(torch.uint8).squeeze(2)
    return state.squeeze(2), k_cache.squeeze(2), scales[:, :, 0, 0]


class Attention(OnePassIndexer, AscendDSAImpl):
    """The attention without context parallelism. Prefill requests come in one call, and decode
    requests in another.

    A step that has both is compressed as one, in the first call. A request's prefix may lie in
    pages that another one fills in this step, and either may be of either kind: a last token of a
    prompt is a "decode", and so is a prompt of which the cache holds all but one. (What stock
    stores itself, for the sliding window and in the main compressor, it stores call by call: behind
    such a last token its prefills read those caches too early.)
    """

    mixed: Tensor | None = None  # the hidden states of such a step, while it runs

    def forward(
        self,
        layer_name,
        hidden_states,
        kv_cache,
        attn_metadata,
        need_gather_q_kv=False,
        output=None,
    ):
        if self.indexer is None or not attn_metadata or not _is_mixed(attn_metadata[0]):
            return super().forward(
                layer_name, hidden_states, kv_cache, attn_metadata, need_gather_q_kv, output
            )
        x = torch.ops.vllm.maybe_all_gather_and_maybe_unpad(hidden_states, need_gather_q_kv)
        self.mixed = x[: attn_metadata[0].num_actual_tokens]
        try:  # gathered once
            return super().forward(layer_name, x, kv_cache, attn_metadata, False, output)
        finally:
            self.mixed = None

    @staticmethod
    def parts(state: Any, keys: Any) -> list[Metadata]:
        """The metadata of the decode and of the prefill requests, if there are any, in the order of
        their tokens."""
        return [
            part
            for part in ((state.decode, keys.decode), (state.prefill, keys.prefill))
            if part[1] is not None
        ]

    def to_compress(self, x: Tensor, with_prefill: bool) -> Tensor | None:
        """The hidden states that this call compresses: its own, or a mixed step's in the first
        call; then None."""
        if self.mixed is None:
            return x
        return self.mixed if with_prefill else None

    def _indexer_qkv_prepare(
        self,
        x,
        qr,
        kv_cache,
        attn_metadata,
        cos,
        sin,
        actual_seq_lengths_query,
        with_prefill=False,
        qr_pertoken_scale=None,
    ):
        """The indexer on one stream. The None in the place of `kv` makes the caller store
        nothing."""
        state, keys = attn_metadata[2:4]
        if (tokens := self.to_compress(x, with_prefill)) is not None:
            self.compress(tokens, kv_cache, (state, keys))
        q = self.query(qr, qr_pertoken_scale, cos, sin, keys.hadamard, x.dtype)
        _, *caches = DeviceOperator.unpack_dsa_indexer_kv_cache(kv_cache)
        return q, None, *caches, state, keys, None, with_prefill

    def cv_indexer_select_qli(
        self,
        x,
        qr,
        kv_cache,
        attn_metadata,
        cos,
        sin,
        actual_seq_lengths_query,
        with_prefill=False,
        qr_pertoken_scale=None,
    ):
        """The indexer on two streams, vllm-ascend's default: our op, which needs vector cores only,
        beside the query's matrix products."""
        state, keys = attn_metadata[2:4]
        if (tokens := self.to_compress(x, with_prefill)) is None:
            return self.query(qr, qr_pertoken_scale, cos, sin, keys.hadamard, x.dtype)
        bound = self.bind(kv_cache)
        plan = self.plan((state, keys), bound)
        kv_score = self.project(tokens)
        main, beside = torch.npu.current_stream(), dsa_v1.dsv4_dsa_overlap_stream()
        projected = main.record_event()
        with utils.npu_stream_switch(beside, enabled=True):
            beside.wait_event(projected)
            bound.run(kv_score, plan)
        q = self.query(qr, qr_pertoken_scale, cos, sin, keys.hadamard, x.dtype)
        main.wait_stream(beside)
        return q

    def query(
        self,
        qr: Tensor,
        scale: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        hadamard: Tensor,
        dtype: torch.dtype,
    ):
        """The indexer's query [T, heads, 128], as vllm-ascend makes it; `scale` comes with a `qr`
        that is quantised."""
        wq_b = self.inderxer_wq_b
        if scale is not None and dsa_v1._is_w8a8_dynamic(wq_b):
            q = torch_npu.npu_quant_matmul(
                qr,
                wq_b.weight,
                wq_b.weight_scale,
                pertoken_scale=scale,
                bias=wq_b.bias,
                output_dtype=dtype,
            )
        else:
            q = wq_b(qr)
        q = q.view(-1, self.indexer_heads, HEAD_DIM)
        torch.ops._C_ascend.inplace_partial_rotary_mul(
            q.unsqueeze(1),
            cos,
            sin,
            rotary_mode="interleave",
            partial_slice=[HEAD_DIM - ROPE_DIM, HEAD_DIM],
        )
        return dsa_v1.rotate_activation(q, hadamard)


def _is_mixed(metadata: Any) -> bool:
    return metadata.num_prefills > 0 and metadata.num_decodes > 0


class ContextParallelAttention(OnePassIndexer, AscendDSACPImpl):
    """The attention with vllm-ascend's `enable_dsa_cp`: every rank keeps all keys, and scores its
    own tokens."""

    @staticmethod
    def parts(state: Any, keys: Any) -> list[Metadata]:
        """All requests are one part."""
        return [(state.req_metadata, keys.req_metadata)]

    def _update_indexer_cache(self, x, kv_cache, attn_metadata, actual_seq_lengths_query):
        state, keys = attn_metadata[2:4]
        self.compress(x, kv_cache, (state, keys))


# ---- installation --------------------------------------------------------------------------------


OURS = {AscendDSAImpl: Attention, AscendDSACPImpl: ContextParallelAttention}
OVERRIDDEN = {
    Attention.forward: AscendDSAImpl,
    Attention._indexer_qkv_prepare: AscendDSAImpl,
    Attention.cv_indexer_select_qli: AscendDSAImpl,
    ContextParallelAttention._update_indexer_cache: AscendDSACPImpl,
}


def check_signatures() -> None:
    """Raise UserError that names what vllm-ascend has with other parameters than those we were
    written against."""
    expected = {
        (AscendDSABackend, "get_impl_cls"): (),
        (DeviceOperator, "unpack_dsa_indexer_kv_cache"): ("kv_cache",),
        (dsa_v1, "dsv4_dsa_overlap_stream"): (),
        (dsa_v1, "rotate_activation"): ("x", "hadamard"),
        (dsa_v1, "_is_w8a8_dynamic"): ("linear",),
        (rope_dsv4, "get_full_cos_and_sin_dsa"): ("group_name",),
        (utils, "npu_stream_switch"): ("target_stream", "enabled"),
    }
    for method, stock in OVERRIDDEN.items():
        expected[stock, method.__name__] = tuple(inspect.signature(method).parameters)
    for (owner, name), parameters in expected.items():
        function = getattr(owner, name, None)
        found = function and tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise UserError(
                f"--attention-backend dsv4_indexer: {owner.__name__}.{name} of vllm-ascend takes "
                f"{found}, where the supported versions take {parameters}. Has another plugin "
                "replaced it? Disable that plugin, or leave the option out."
            )


@contextmanager
def one_pass_indexers() -> Iterator[list[OnePassIndexer]]:
    """Attention layers that are made inside get our implementations, which are listed."""
    stock = vars(AscendDSABackend)["get_impl_cls"]
    AscendDSABackend.get_impl_cls = staticmethod(lambda: OURS[stock()])
    OnePassIndexer.made = []
    try:
        yield OnePassIndexer.made
    finally:
        AscendDSABackend.get_impl_cls = stock
        del OnePassIndexer.made


def finish_loading(model: torch.nn.Module, impl: str, indexers: int, max_positions: int) -> None:
    """Give the indexers of a loaded model, which must be as many as `indexers`, what they share:
    the op's name and one table of 32 cosines and 32 sines for each of `max_positions`, where
    vllm-ascend has two with each value twice."""
    found = [
        layer.impl
        for layer in model.modules()
        if isinstance(getattr(layer, "impl", None), OnePassIndexer)
    ]
    found = [attention for attention in found if attention.indexer is not None]
    if len(found) != indexers:
        raise UserError(
            f"--attention-backend dsv4_indexer: the model has {len(found)} indexers in layers of "
            f"ours, where its configuration asks for {indexers}. Is another plugin replacing the "
            "model class? Disable that plugin."
        )
    if not found:  # a pipeline stage without one
        return
    halves = [
        table[:max_positions, 0, 0, ::2]
        for table in rope_dsv4.get_full_cos_and_sin_dsa(f"c{RATIO}")
    ]
    cos_sin = torch.cat(halves, dim=1)
    for attention in found:
        attention.finish_loading(impl, cos_sin)


def refuse_drafts(made: list[OnePassIndexer]) -> None:
    """Refuse an indexer that was made while the model was loaded, and does not belong to it."""
    for attention in made:
        if attention.wkv_wgate is None:
            refuse(
                f"{attention.indexer.compressor.wkv.prefix} is in an indexer of a draft model",
                "draft models whose layers have none, as the published ones",
                "take another draft model, or leave the speculative configuration out",
            )


def refuse_quantised(compressor: torch.nn.Module) -> None:
    """The stock compressor takes wkv and wgate as they are loaded, and so do we: quantised ones
    mean nothing to it."""
    for layer in (compressor.wkv, compressor.wgate):
        if not isinstance(layer.quant_method, UnquantizedLinearMethod):
            refuse(
                f"{layer.prefix} is quantised ({type(layer.quant_method).__name__})",
                "bf16 or fp16",
                "use a checkpoint that leaves the indexer's wkv and wgate unquantised",
            )
