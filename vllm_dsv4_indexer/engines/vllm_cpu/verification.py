"""The compressors of a loaded model, compared with vLLM's own: see
engines/verification.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.logger import init_logger
from vllm.models.deepseek_v4.compressor import CompressorMetadata
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.batches import Batch
from vllm_dsv4_indexer.contract import INDEXER, Geometry
from vllm_dsv4_indexer.engines.verification import make_batches, require_equal
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor, compressors_of

logger = init_logger("vllm.dsv4_indexer")


def verify(layers: list[Any]) -> None:
    """Compares, in each of these attention layers, our compressors with vLLM's own, which they have
    replaced. Afterwards the layers are as before.

    Raises UserError that names the first value that differs.
    """
    served = replace(ops.work)  # what the account goes on from: it is of what is served
    for layer in layers:
        for compressor in compressors_of(layer):
            geometry = Geometry(compressor.head_dim, compressor.compress_ratio)
            batches = make_batches(geometry, compressor.state_cache.block_size)
            rotary = layer.indexer_rotary_emb if geometry == INDEXER else layer.rotary_emb
            require_equal(
                compressor.prefix,
                [_projected(compressor, batch, seed) for seed, batch in enumerate(batches)],
                partial(_store, compressor, rotary, DeepseekV4CPUCompressor.forward),
                partial(_store, compressor, rotary, OnePassCompressor.forward),
            )
    logger.info(
        "DSV4_INDEXER: verified: vLLM's own compressors store the same in %d layers", len(layers)
    )
    ops.work = served


@torch.inference_mode()
def _projected(compressor: Any, batch: Batch, seed: int) -> Batch:
    """The batch with a kv_score of random hidden states, by the layer's own projection."""
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(len(batch.positions), compressor.hidden_size, generator=numbers)
    return replace(batch, kv_score=compressor.fused_wkv_wgate(x.bfloat16()).float())


@torch.inference_mode()
def _store(compressor: Any, rotary_emb: Any, forward: Callable[..., None], batch: Batch) -> None:
    """A step of `batch`, as far as the compressor is concerned."""
    state = compressor.state_cache
    keys = compressor._static_forward_context[compressor.k_cache_prefix]
    metadata = {
        state.prefix: CompressorMetadata(
            block_table=batch.inner_state_block_table,
            slot_mapping=batch.inner_state_slot_mapping,
            block_size=state.block_size,
            token_to_req_indices=batch.token_to_req,
        ),
        compressor.k_cache_prefix: SimpleNamespace(slot_mapping=batch.k_slot_mapping),
    }
    context = ForwardContext(no_compile_layers={}, attn_metadata=metadata, slot_mapping={})
    with (
        _meanwhile(
            compressor,
            settings=replace(compressor.settings, state_save="full"),
            checks=None,
            captures=None,
        ),
        _meanwhile(state, kv_cache=batch.inner_state_cache),
        _meanwhile(keys, kv_cache=batch.k_cache),
        override_forward_context(context),
    ):
        forward(compressor, batch.kv_score, batch.positions, rotary_emb)


@contextmanager
def _meanwhile(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(before)
