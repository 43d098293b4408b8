"""The keys of one of vllm-ascend's indexers, by our op.

They replace the stock chain (compressor, Hadamard product, quantisation, two scatters on A2 and A3;
compressor, Hadamard product, one fused store on A5) by two launches: the projection, one matmul of
torch_npu's for `wkv` and `wgate` joined, and the op with the step's plan. Nothing here waits for
the device, so that a graph can be captured.
"""

from collections.abc import Callable
from typing import Any

import torch
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm_ascend import utils
from vllm_ascend.device.device_op import DeviceOperator

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import (
    HEAD_DIM,
    KV_WIDTH,
    RATIO,
    ROPE_DIM,
    ROW_WIDTH,
    Layer,
    Requests,
)
from vllm_dsv4_indexer.engines import refuse
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.vllm_ascend.step import Metadata, tokens_of


class Keys:
    """The keys of one indexer: its weights joined, and the op on its tensors."""

    def __init__(
        self,
        indexer: Any,
        requests_of: Callable[[Metadata], Requests],
        impl: str,
        cos_sin: Tensor,
    ) -> None:
        """indexer: vllm-ascend's, loaded. Its wkv and wgate become views of one joined weight, so
        that weights which are loaded again arrive here, too.
        requests_of: a step's requests, in the order of their tokens, from the metadata of this
        indexer's state and K cache.
        cos_sin: [positions, 64], 32 cosines and 32 sines each.

        Raises UserError for what the op cannot be given."""
        self.compressor, self.requests_of = indexer.compressor, requests_of
        self.impl, self.cos_sin = impl, cos_sin
        self.bound: ops.BoundLayer | None = None
        self.bound_to: tuple[Tensor | None, ...] = ()  # the tensors that `bound` was made of
        refuse_quantised(self.compressor)
        refuse_other_shapes(indexer)
        wkv, wgate = self.compressor.wkv, self.compressor.wgate
        self.wkv_wgate = torch.cat([wkv.weight.data, wgate.weight.data])
        wkv.weight.data, wgate.weight.data = self.wkv_wgate.split(KV_WIDTH)

    def project(self, x: Tensor) -> Tensor:
        """[T, hidden] to kv_score [T, 512] in fp32, not rounded in between."""
        return torch.mm(x, self.wkv_wgate.t(), out_dtype=torch.float32)

    def bind(self, kv_cache: tuple[Tensor, ...]) -> ops.BoundLayer:
        """The op on this layer's tensors: made in the first step, and again if one of them has been
        replaced."""
        caches = DeviceOperator.unpack_dsa_indexer_kv_cache(kv_cache)
        tensors = self.compressor.ape, self.compressor.norm.weight, self.cos_sin, *caches
        if self.bound is None or any(new is not old for new, old in zip(tensors, self.bound_to)):
            layer = Layer(*tensors[:3], *_without_heads(*caches))
            options = dict(eps=self.compressor.norm_eps, k_format=k_format(), impl=self.impl)
            self.bound, self.bound_to = ops.BoundLayer(layer, **options), tensors
        return self.bound

    def plan(self, metadata: Metadata, bound: ops.BoundLayer) -> Tensor:
        """This step's plan, made by the first layer that asks. `metadata`: those of the layer's
        state and K cache."""

        def make() -> Tensor:
            requests, k_page = self.requests_of(metadata), bound.layer.k_cache.shape[1]
            tokens = tokens_of(requests)
            return ops.plan_requests(requests, tokens, bound.extents, k_page, impl=self.impl)

        # What was made before a capture began is not used in it: a graph makes its plan again in
        # every replay.
        capturing = torch.npu.is_current_stream_capturing()  # type: ignore[attr-defined]
        return once_a_step((*metadata, capturing), bound.extents, make)

    def compress(self, x: Tensor, kv_cache: tuple[Tensor, ...], metadata: Metadata) -> None:
        """Save the state rows of these tokens, write their K entries."""
        bound = self.bind(kv_cache)
        plan = self.plan(metadata, bound)
        bound.run(self.project(x), plan)

    def compress_beside(
        self,
        x: Tensor,
        kv_cache: tuple[Tensor, ...],
        metadata: Metadata,
        beside: Any,
        meanwhile: Callable[[], Tensor],
    ) -> Tensor:
        """The same with the op on the stream `beside`, since it needs vector cores only: beside the
        matrix products of `meanwhile`, whose result is returned."""
        bound = self.bind(kv_cache)
        plan = self.plan(metadata, bound)
        kv_score = self.project(x)
        main = torch.npu.current_stream()  # type: ignore[attr-defined]
        projected = main.record_event()
        with utils.npu_stream_switch(beside, enabled=True):
            beside.wait_event(projected)
            bound.run(kv_score, plan)
        result = meanwhile()
        main.wait_stream(beside)
        return result


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


def refuse_quantised(compressor: Any) -> None:
    """The stock compressor takes wkv and wgate as they are loaded, and so do we: quantised ones
    mean nothing to it."""
    for layer in (compressor.wkv, compressor.wgate):
        if not isinstance(layer.quant_method, UnquantizedLinearMethod):
            refuse(
                f"{layer.prefix} is quantised ({type(layer.quant_method).__name__})",
                "bf16 or fp16",
                "use a checkpoint that leaves the indexer's wkv and wgate unquantised",
            )


def refuse_other_shapes(indexer: Any) -> None:
    """Refuse at the start what the op would refuse in the first step, after minutes of loading."""
    compressor, state, keys = indexer.compressor, indexer.compressor.state_cache, indexer.k_cache
    k_dtype = {"int8_hadamard": torch.int8, "fp8_amax": torch.float8_e4m3fn}[k_format()]
    for what, found, supported in (
        ("the dtype of its K cache", keys.dtype, k_dtype),
        ("the width of its K cache", keys.head_dim, HEAD_DIM),
        ("the dtype of its state", state.dtype, torch.float32),
        ("the width of its state", state.state_dim, ROW_WIDTH),
        ("its ratio", compressor.compress_ratio, RATIO),
        ("its number of rotated dimensions", compressor.rope_head_dim, ROPE_DIM),
        ("the shape of its ape", tuple(compressor.ape.shape), (RATIO, KV_WIDTH)),
        ("the dtype of its ape", compressor.ape.dtype, torch.float32),
    ):
        if found != supported:
            refuse(
                f"{keys.prefix}: {what} is {found}",
                f"{supported} on this device",
                "leave the option out, or the setting that changes it",
            )
