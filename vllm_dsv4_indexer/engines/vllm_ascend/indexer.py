"""The keys of vllm-ascend's indexer, by our op.

They replace, per layer, the stock chain (compressor, Hadamard product, quantisation, two scatters
on A2 and A3; compressor, Hadamard product, one fused store on A5) by two launches: the projection,
one matmul of torch_npu's for `wkv` and `wgate` joined, and the op with the step's plan. Nothing
here waits for the device, so that a graph can be captured.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm_ascend import utils
from vllm_ascend.device.device_op import DeviceOperator

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import KV_WIDTH, Layer
from vllm_dsv4_indexer.engines import refuse
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.vllm_ascend.step import Metadata, plan_requests, requests_of


class OnePassIndexer:
    """Mixed into vllm-ascend's attention implementations: the keys of their indexer come from our
    op."""

    indexer: Any  # vllm-ascend's, None in layers that have none
    parts: Callable[..., list[Metadata]]  # of a step's metadata, in the order of their tokens
    made: ClassVar[list["OnePassIndexer"]]  # those with an indexer, while a model is loaded
    impl: str
    cos_sin: Tensor
    wkv_wgate: Tensor | None = None
    bound: ops.BoundLayer | None = None
    bound_to: tuple[Tensor | None, ...]  # the tensors that `bound` was made of

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.indexer is not None:  # layers of ratio 128 and of the sliding window have none
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
        assert self.wkv_wgate is not None, "finish_loading has run"
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
        capturing = torch.npu.is_current_stream_capturing()  # type: ignore[attr-defined]
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
