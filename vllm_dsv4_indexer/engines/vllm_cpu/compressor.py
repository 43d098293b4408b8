"""The indexer's compressor in vLLM 0.32's CPU engine: one call of our op."""

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseBackend
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import Layer
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.versions import VLLM_CPU
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.ops.tail import tail_slots
from vllm_dsv4_indexer.settings import Settings

K_FORMAT = "fp8_pow2"  # of the engine's indexer cache


class Dsv4IndexerBackend(DeepseekV4CPUSparseBackend):
    """The engine's sparse attention over the keys that our compressor wrote."""

    @staticmethod
    def get_name() -> str:
        return "DSV4_INDEXER"


class IndexerCompressor(DeepseekV4CPUCompressor):
    """The indexer's compressor: one call of our op, which saves the state and writes the entries.

    Never constructed: takes the place of the engine's own by assignment to `__class__`, as the
    engine's CPU layer does with the class of the GPU layer. `settings` are set at the same time.
    """

    settings: Settings
    bound: ops.BoundLayer | None = None

    def forward(self, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
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


def replace_compressors(
    model: torch.nn.Module, settings: Settings, indexers: int
) -> list[DeepseekV4CPUAttention]:
    """Put our compressor into the indexers of `model`, which must be as many as `indexers`.
    Returns their layers.

    Raises UserError where the model does not look as vLLM 0.32.0 builds it.
    """
    attention = [layer for layer in model.modules() if isinstance(layer, DeepseekV4CPUAttention)]
    layers = [layer for layer in attention if layer.indexer is not None]
    if len(layers) != indexers:
        raise UserError(
            f"--attention-backend dsv4_indexer: the model has {len(layers)} layers of vLLM "
            f"{VLLM_CPU}'s DeepseekV4CPUAttention with an indexer, where its configuration "
            f"asks for {indexers}. Is another plugin replacing the model class? Disable that "
            "plugin."
        )
    for layer in layers:
        compressor = layer.indexer.compressor
        if type(compressor) is not DeepseekV4CPUCompressor:
            raise UserError(
                f"--attention-backend dsv4_indexer: {compressor.prefix} is a "
                f"{type(compressor).__name__}, where vLLM {VLLM_CPU} has a "
                "DeepseekV4CPUCompressor. Is another plugin replacing it? Disable that plugin."
            )
        layer.backend_cls = Dsv4IndexerBackend
        if settings.impl != "stock":
            compressor.__class__ = IndexerCompressor
            compressor.settings = settings
    return layers
