"""The compressors in vLLM 0.32's CPU engine: one call of our op each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseBackend
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from vllm_dsv4_indexer import BACKEND, ops
from vllm_dsv4_indexer.contract import HEAD_DIM, ContractError, Layer, Plan, Step
from vllm_dsv4_indexer.engines.captures import Captures
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.versions import VLLM_CPU
from vllm_dsv4_indexer.engines.vllm_cpu.checks import Checks
from vllm_dsv4_indexer.engines.vllm_cpu.state import ReadableStateCache
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.settings import Settings

FORMATS = ("fp8_pow2", "fp8_ds_mla")  # of the engine's caches of index keys and of main keys


class Dsv4IndexerBackend(DeepseekV4CPUSparseBackend):
    """The engine's sparse attention over the keys that our compressors wrote."""

    @staticmethod
    def get_name() -> str:
        return BACKEND


class OnePassCompressor(DeepseekV4CPUCompressor):
    """A compressor: one call of our op, which saves the state and writes the entries.

    Never constructed: takes the place of the engine's own by assignment to `__class__`, as the
    engine's CPU layer does with the class of the GPU layer. `settings` and `request_ids` are set at
    the same time, and what watches over the steps.
    """

    settings: Settings
    checks: Checks | None = None
    captures: Captures | None = None
    request_ids: Callable[[], Sequence[str]]  # of the step, by their rows
    bound: ops.BoundLayer | None = None

    def forward(self, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
        """kv_score fp32 [T, row width], positions int64 [T]; everything else comes from the step's
        metadata. Raises ContractError that names the layer and vLLM's request."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a profiling run has no caches
            return
        bound = self._bind(rotary_emb.cos_sin_cache)
        state, entries = metadata[self.state_cache.prefix], metadata[self.k_cache_prefix]
        step = Step(
            positions,
            state.token_to_req_indices,
            state.slot_mapping,
            state.block_table,
            entries.slot_mapping,
        )
        try:
            with self._captured(bound, step, kv_score):
                plan = once_a_step(
                    (state, entries),
                    bound.extents,
                    lambda: self._plan(step, entries, bound),
                )
                if self.checks is not None:
                    self.checks.layer(step, entries, bound, kv_score)
                bound.run(kv_score, plan)
        except ContractError as error:
            raise self._named(error) from error

    def _bind(self, cos_sin_cache: torch.Tensor) -> ops.BoundLayer:
        """The op on this layer's tensors: made in the first step, and again if the engine has
        replaced one of them."""
        k_cache = self._static_forward_context[self.k_cache_prefix].kv_cache
        tensors = Layer(
            self.ape, self._norm_weight_fp32, cos_sin_cache, self.state_cache.kv_cache, k_cache
        )
        if self.bound is None or any(new is not old for new, old in zip(tensors, self.bound.layer)):
            k_format = FORMATS[self.head_dim != HEAD_DIM]
            options = dict(eps=self.rms_norm_eps, k_format=k_format, impl=self.settings.impl)
            self.bound = ops.BoundLayer(tensors, **options)
        return self.bound

    def _plan(self, step: Step, entries: Any, bound: ops.BoundLayer) -> torch.Tensor:
        extents, ratio = bound.extents._asdict(), self.compress_ratio
        plan = ops.plan(*step, **extents, ratio=ratio, impl=self.settings.impl)
        if self.checks is not None:
            step = step._replace(inner_state_slot_mapping=Plan.of(plan, ratio).state_slots)
            self.checks.step(step, entries, bound, all_saved=self.settings.state_save == "full")
        return plan

    def _captured(
        self, bound: ops.BoundLayer, step: Step, kv_score: torch.Tensor
    ) -> AbstractContextManager[None]:
        if self.captures is None:
            return nullcontext()
        return self.captures.around(self.prefix, bound, step, kv_score)

    def _named(self, error: ContractError) -> ContractError:
        message, request, ids = f"{self.prefix}: {error}", error.request, self.request_ids()
        if request is not None and 0 <= request < len(ids):
            message += f"; request {request} is {ids[request]!r}"
        return ContractError(message, request)


def replace_compressors(
    model: torch.nn.Module,
    settings: Settings,
    indexers: int,
    request_ids: Callable[[], Sequence[str]],
    **watching: Any,
) -> list[DeepseekV4CPUAttention]:
    """Put ours in the place of every compressor of `model`, whose indexers must be as many as
    `indexers`. Returns the layers that have one. `request_ids`: of a step's requests by their rows,
    for errors. `watching`: what the compressors have in addition.

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
        layer.backend_cls = Dsv4IndexerBackend
    for layer in attention:
        for compressor in compressors_of(layer):
            if type(compressor) is not DeepseekV4CPUCompressor:
                raise UserError(
                    f"--attention-backend dsv4_indexer: {compressor.prefix} is a "
                    f"{type(compressor).__name__}, where vLLM {VLLM_CPU} has a "
                    "DeepseekV4CPUCompressor. Is another plugin replacing it? Disable that plugin."
                )
            if settings.impl != "stock":
                _replace(compressor, settings, request_ids)
                vars(compressor).update(watching)
    return [layer for layer in attention if any(compressors_of(layer))]


def compressors_of(layer: DeepseekV4CPUAttention) -> Iterator[DeepseekV4CPUCompressor]:
    """The layer's own, if it has one, and its indexer's."""
    for owner in (layer, layer.indexer):
        if (compressor := getattr(owner, "compressor", None)) is not None:
            yield compressor


def _replace(compressor: Any, settings: Settings, request_ids: Callable[[], Sequence[str]]) -> None:
    compressor.__class__ = OnePassCompressor
    compressor.settings = settings
    compressor.request_ids = request_ids
    if settings.state_save == "readable":
        compressor.state_cache.__class__ = ReadableStateCache
        compressor.state_cache.ratio = compressor.compress_ratio
