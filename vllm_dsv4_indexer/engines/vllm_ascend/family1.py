"""vllm-ascend before 0.27: the indexer's code is in the attention implementations.

While the worker loads its model, `AscendDSABackend.get_impl_cls` answers with our subclasses; the
backend itself stays the stock one, since vllm-ascend compares it by identity.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch_npu
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm_ascend.attention import dsa_v1
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPImpl
from vllm_ascend.attention.dsa_v1 import AscendDSABackend, AscendDSAImpl
from vllm_ascend.device.device_op import DeviceOperator

from vllm_dsv4_indexer.contract import HEAD_DIM, ROPE_DIM, Requests
from vllm_dsv4_indexer.engines import refuse
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import Keys, refuse_quantised
from vllm_dsv4_indexer.engines.vllm_ascend.step import Metadata, requests_of


class OnePassIndexer:
    """Mixed into vllm-ascend's attention implementations: the keys of their indexer come from our
    op."""

    indexer: Any  # vllm-ascend's, None in layers that have none
    requests_of: Callable[[Metadata], Requests]
    made: ClassVar[list["OnePassIndexer"]] = []  # those with an indexer, since loading began
    keys: Keys  # when the model is loaded

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.indexer is not None:  # layers of ratio 128 and of the sliding window have none
            refuse_quantised(self.indexer.compressor)
            self.made.append(self)


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
    def requests_of(metadata: Metadata) -> Requests:
        """Of the decode and of the prefill requests, if there are any."""
        state, keys = metadata
        parts = (state.decode, keys.decode), (state.prefill, keys.prefill)
        return requests_of(*(part for part in parts if part[1] is not None))

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
            self.keys.compress(tokens, kv_cache, (state, keys))
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
        """The indexer on two streams, vllm-ascend's default."""
        state, keys = attn_metadata[2:4]

        def query() -> Tensor:
            return self.query(qr, qr_pertoken_scale, cos, sin, keys.hadamard, x.dtype)

        if (tokens := self.to_compress(x, with_prefill)) is None:
            return query()
        beside = dsa_v1.dsv4_dsa_overlap_stream()
        return self.keys.compress_beside(tokens, kv_cache, (state, keys), beside, query)

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
    def requests_of(metadata: Metadata) -> Requests:
        """Decode and prefill requests are one part."""
        state, keys = metadata
        return requests_of((state.req_metadata, keys.req_metadata))

    def _update_indexer_cache(self, x, kv_cache, attn_metadata, actual_seq_lengths_query):
        state, keys = attn_metadata[2:4]
        self.keys.compress(x, kv_cache, (state, keys))


# ---- loading -------------------------------------------------------------------------------------

OURS = {AscendDSAImpl: Attention, AscendDSACPImpl: ContextParallelAttention}
ATTENTION = tuple(OURS.values())  # the implementations that a loaded model has
OVERRIDDEN: dict[Callable[..., Any], type] = {
    Attention.forward: AscendDSAImpl,
    Attention._indexer_qkv_prepare: AscendDSAImpl,
    Attention.cv_indexer_select_qli: AscendDSAImpl,
    ContextParallelAttention._update_indexer_cache: AscendDSACPImpl,
}
CALLED = {
    (AscendDSABackend, "get_impl_cls"): (),
    (dsa_v1, "dsv4_dsa_overlap_stream"): (),
    (dsa_v1, "rotate_activation"): ("x", "hadamard"),
    (dsa_v1, "_is_w8a8_dynamic"): ("linear",),
}


@contextmanager
def while_loading() -> Iterator[None]:
    """Attention layers that are made inside get our implementations."""
    stock = vars(AscendDSABackend)["get_impl_cls"]
    AscendDSABackend.get_impl_cls = staticmethod(lambda: OURS[stock()])
    OnePassIndexer.made.clear()
    try:
        yield
    finally:
        AscendDSABackend.get_impl_cls = stock


def install(found: Iterable[OnePassIndexer], keys_of: Callable[..., Keys]) -> None:
    """Give each its keys. Refuses an indexer that was made while the model was loaded, and does not
    belong to it."""
    for attention in found:
        attention.keys = keys_of(attention.indexer, attention.requests_of)
    for attention in OnePassIndexer.made:
        if not hasattr(attention, "keys"):
            refuse(
                f"{attention.indexer.compressor.wkv.prefix} is in an indexer of a draft model",
                "draft models whose layers have none, as the published ones",
                "take another draft model, or leave the speculative configuration out",
            )
