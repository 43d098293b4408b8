"""The projection in front of the indexer's compressor, in fp32, in vLLM 0.32's CPU engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from vllm_dsv4_indexer.contract import ROW_WIDTH
from vllm_dsv4_indexer.engines.versions import VLLM_CPU
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.ops import projection


class ExactProjection(UnquantizedLinearMethod):
    """How `fused_wkv_wgate` keeps and multiplies its weight: what vLLM's own method does, without
    rounding the result.

    The engine then widens what is fp32 already. The weight is a parameter of the same layer in our
    own layout, so it is the only copy, and vLLM's reload replaces it like any other.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(
            projection.prepare_weight(layer.weight.detach()), requires_grad=False
        )

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
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


def replace_projection(compressor: Any) -> None:
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
            f"and a weight of shape {shape}, where vLLM {VLLM_CPU} has an "
            f"UnquantizedLinearMethod, {ROW_WIDTH} rows and no bias. Is another plugin replacing "
            "it? Disable that plugin, or set dsv4_indexer.projection to 'engine'."
        )
    linear.quant_method = ExactProjection()
