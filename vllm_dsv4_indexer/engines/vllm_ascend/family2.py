"""vllm-ascend from 0.27 on: an indexer and its compressor are modules.

When the model is loaded, the classes of its indexers and of their compressors become ours. The
compressor returns no entries, for which the stock indexer quantises and stores none; all else of
the stock indexer stays.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPImpl
from vllm_ascend.attention.dsa_attn_kv_plan import is_a5_bf16_kv_enabled
from vllm_ascend.attention.dsa_v1 import AscendDSAImpl
from vllm_ascend.models.deepseek_v4.compressor import Compressor
from vllm_ascend.models.deepseek_v4.indexer import DeepseekV4Indexer
from vllm_ascend.worker import device_metadata
from vllm_ascend.worker.device_metadata import DeviceMetadataStage

from vllm_dsv4_indexer.contract import Requests
from vllm_dsv4_indexer.engines import refuse
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import Keys
from vllm_dsv4_indexer.engines.vllm_ascend.step import Metadata, requests_of


class Indexer(DeepseekV4Indexer):
    """vllm-ascend's indexer, with keys from our op."""

    keys: Keys

    def update_cache(self, hidden_states, kv_cache, metadata):
        """The keys alone."""
        self.keys.compress(hidden_states, kv_cache, _metadata_of(metadata))

    def _indexer_qkv_prepare(
        self, x, qr, kv_cache, metadata, cos, sin, qr_pertoken_scale=None, write_cache=True
    ):
        """The indexer on one stream."""
        if write_cache:
            self.update_cache(x, kv_cache, metadata)
        return super()._indexer_qkv_prepare(
            x, qr, kv_cache, metadata, cos, sin, qr_pertoken_scale, write_cache
        )

    def _cv_compute_query_and_update_cache_multistream(
        self,
        hidden_states,
        qr,
        kv_cache,
        metadata,
        cos,
        sin,
        aux_stream,
        qr_pertoken_scale=None,
    ):
        """The indexer on two streams, vllm-ascend's default."""
        stock = super()._cv_compute_query_and_update_cache_multistream

        def query() -> Tensor:
            return stock(
                hidden_states, qr, kv_cache, metadata, cos, sin, aux_stream, qr_pertoken_scale
            )

        return self.keys.compress_beside(
            hidden_states, kv_cache, _metadata_of(metadata), aux_stream, query
        )


def _metadata_of(metadata: Any) -> Metadata:
    return metadata.compressor.state, metadata.compressor.cache


class NoEntries(Compressor):
    """An indexer's compressor, whose work is done by our op."""

    def forward(self, hidden_states, state_cache, metadata):
        return hidden_states.new_empty(0, self.head_dim), None


class ContextParallelAttention(AscendDSACPImpl):
    """The attention with vllm-ascend's `enable_dsa_cp`: every rank keeps all keys, and scores its
    own tokens."""

    def _update_indexer_cache(self, x, kv_cache, metadata, actual_seq_lengths_query):
        self.indexer.keys.compress(x, kv_cache, (metadata.indexer_state, metadata.indexer_cache))


def requests_when_made(metadata: Metadata) -> Requests:
    """The requests of a step, of which another stream may still make the positions: the current
    one waits for it, as the stock compressor does."""
    state, keys = (part.req_metadata for part in metadata)
    group = keys.compressor_metadata_group_id
    if group is None:  # of context parallelism alone
        group = getattr(keys, "device_local_metadata_group_id", None)
    if group is not None:
        device_metadata.wait_for_device_metadata(DeviceMetadataStage.COMPRESSOR, group)
    return requests_of((state, keys))


# ---- loading -------------------------------------------------------------------------------------

OVERRIDDEN: dict[Callable[..., Any], type] = {
    Indexer.update_cache: DeepseekV4Indexer,
    Indexer._indexer_qkv_prepare: DeepseekV4Indexer,
    Indexer._cv_compute_query_and_update_cache_multistream: DeepseekV4Indexer,
    NoEntries.forward: Compressor,
    ContextParallelAttention._update_indexer_cache: AscendDSACPImpl,
}
CALLED = {(device_metadata, "wait_for_device_metadata"): ("stage", "group_id")}
ATTENTION = AscendDSAImpl, AscendDSACPImpl  # the implementations that a loaded model has
while_loading = nullcontext  # what is made needs no change before it is loaded


def install(found: Iterable[Any], keys_of: Callable[..., Keys]) -> None:
    """Give each indexer its keys and our classes. Draft models have no indexers here: vllm-ascend
    asserts so."""
    for attention in found:
        indexer = attention.indexer
        if is_a5_bf16_kv_enabled(indexer.vllm_config):
            refuse("the KV cache is bf16", "fp8 on this device", "leave --kv-cache-dtype out")
        indexer.keys = keys_of(indexer, requests_when_made)
        indexer.__class__, indexer.compressor.__class__ = Indexer, NoEntries
        if type(attention) is AscendDSACPImpl:
            attention.__class__ = ContextParallelAttention
