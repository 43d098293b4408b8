"""vllm-ascend's attention implementations, with keys from our op."""

from typing import Any

import torch
import torch_npu
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm_ascend import utils
from vllm_ascend.attention import dsa_v1
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPImpl
from vllm_ascend.attention.dsa_v1 import AscendDSAImpl
from vllm_ascend.device.device_op import DeviceOperator

from vllm_dsv4_indexer.contract import HEAD_DIM, ROPE_DIM
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import OnePassIndexer
from vllm_dsv4_indexer.engines.vllm_ascend.step import Metadata


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
        main = torch.npu.current_stream()  # type: ignore[attr-defined]
        beside = dsa_v1.dsv4_dsa_overlap_stream()
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
    ) -> Tensor:
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
