"""A real attention layer of vllm-ascend's on CPU tensors: its caches, its metadata from the real
builder, its calls."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import family
import torch
from npu import PRODUCT
from torch import Tensor
from vllm import forward_context
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform
from vllm_ascend.attention.attention_v1 import AscendAttentionState
from vllm_ascend.attention.dsa_v1 import AscendDSABackend
from vllm_ascend.attention.utils import AscendCommonAttentionMetadata

from vllm_dsv4_indexer.contract import FP8_ENTRY_BYTES, HEAD_DIM, ROW_WIDTH
from vllm_dsv4_indexer.engines.vllm_ascend import loading
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import Keys

INDEXER = 1  # the demo checkpoint's compress_ratios are 0, 4, 128, 4
POSITIONS = 128  # of the model; YaRN's factor makes sixteen times as many rows of its cos and sin
EPS = 0.01  # of RMSNorm; no default of ours
BLOCKS = 160  # physical, of the state and of the K cache
_models = itertools.count()


@dataclass
class Rows:
    """One step's requests: decodes first, then prefills. All on the host; the tables are those of a
    block manager."""

    starts: list[int]
    lengths: list[int]
    state_tables: list[list[int]]
    k_tables: list[list[int]]

    def tokens(self) -> Iterator[tuple[int, int]]:
        """The request and the position of each token."""
        for request, (start, length) in enumerate(zip(self.starts, self.lengths)):
            for position in range(start, start + length):
                yield request, position


def make_attention(
    config: VllmConfig, ours: bool, quant_config: QuantizationConfig | None = None
) -> torch.nn.Module:
    """vllm-ascend's attention with an indexer, on the CPU. `ours`: made where our worker lets its
    model be made."""
    prefix = f"model{next(_models)}.layers.{INDEXER}.self_attn"  # vLLM wants every name once
    classes = loading.family().while_loading() if ours else contextlib.nullcontext()
    on_cpu = mock.patch.object(type(current_platform), "device_type", "cpu")
    with set_current_vllm_config(config), classes, on_cpu:
        return family.DeepseekV4Attention(
            config,
            config.model_config.hf_config,
            POSITIONS,
            config.cache_config,
            quant_config,
            prefix,
        )


class Layer:
    """One attention layer with an indexer, and its caches. `ours`: as our worker makes it, with the
    readable op."""

    def __init__(
        self, config: VllmConfig, ours: bool = True, multistream: bool = False, seed: int = 0
    ):
        self.config, self.module = config, make_attention(config, ours)
        self.prefix = self.module.dsa_attn.prefix
        self.attention = self.module.dsa_attn.dsa_attn.impl
        self.attention.multistream_dsv4_dsa_overlap = multistream
        self.numbers = torch.Generator().manual_seed(seed)
        self._draw_weights()
        compressor = self.module.indexer.compressor
        self.projection = torch.cat([compressor.wkv.weight, compressor.wgate.weight])
        # Its weights are nobody's concern here.
        self.attention._forward_o_proj = lambda o_proj_input, output: None
        if ours:
            loading.finish_loading(self.module, "reference", 1, config.model_config.max_model_len)
        cache = config.cache_config
        with mock.patch.object(
            cache, "cache_dtype", cache.cache_dtype
        ):  # an A5's specs change it for layers to come
            self._read_specs()
            with set_current_vllm_config(config):
                self._make_builders()
        self.allocate()

    @property
    def keys(self) -> Keys:
        return family.keys(self.attention)

    def _draw_weights(self) -> None:
        """Random, but for the projection's: multiples of 1/32 that make every sum of products exact
        in fp32."""
        for parameter in self.module.parameters():
            parameter.data.normal_(std=0.05, generator=self.numbers)
        compressor = self.module.indexer.compressor
        for weight in (compressor.wkv.weight, compressor.wgate.weight):
            weight.data.copy_(torch.randint(-3, 4, weight.shape, generator=self.numbers) / 32)
        compressor.ape.data.normal_(std=0.15, generator=self.numbers)
        compressor.norm.weight.data.normal_(0.7, 0.26, generator=self.numbers)
        compressor.norm_eps = EPS

    def _read_specs(self) -> None:
        indexer = self.module.indexer
        self.state_spec = indexer.compressor.state_cache.get_kv_cache_spec(self.config)
        self.k_spec = indexer.k_cache.get_kv_cache_spec(self.config)
        self.page = self.state_spec.block_size
        self.k_page = family.entries_of_page(self.k_spec)

    def allocate(self) -> None:
        """Random bytes, and among them numbers in the state, since padding may ask for rows of page
        0."""
        self.storages = [
            torch.randint(
                -(2**7),
                2**7,
                (BLOCKS * spec.page_size_bytes,),
                dtype=torch.int8,
                generator=self.numbers,
            )
            for spec in (self.state_spec, self.k_spec)
        ]
        state, *keys = self.views(self.storages)
        state.normal_(generator=self.numbers)
        nothing = torch.zeros(1, 1, 1, 1)  # the main compressor's caches and the sliding window's
        self.kv_cache = (nothing, nothing, nothing, state, *keys)

    def views(self, storages: list[Tensor]) -> tuple[Tensor, ...]:
        """State, K values and K scales, as vllm-ascend's runner lays them out: pages as long as the
        specs say, and in a page of the K cache the scales behind the values. For an A5 also the K
        pages whole."""
        state, keys = self.state_spec, self.k_spec

        def paged(storage: Tensor, spec, width: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
            stride = spec.page_size_bytes // dtype.itemsize
            shape = (BLOCKS, self.page if spec is state else self.k_page, 1, width)
            return storage.view(dtype).as_strided(
                shape, (stride, width, width, 1), offset // dtype.itemsize
            )

        parts = (
            paged(storages[0], state, ROW_WIDTH, state.dtype),
            paged(storages[1], keys, HEAD_DIM, keys.dtype),
            paged(storages[1], keys, 1, keys.scale_dtype, self.k_page * HEAD_DIM),
        )
        return (
            parts
            if PRODUCT == "A2"
            else (*parts, paged(storages[1], keys, FP8_ENTRY_BYTES, keys.dtype))
        )

    def _make_builders(self) -> None:
        """One for each of the layer's caches, in the order in which the layer gets their
        metadata."""
        module, attention = self.module, self.module.dsa_attn.dsa_attn
        caches = (
            attention,
            module.compressor.state_cache,
            module.indexer.compressor.state_cache,
            module.indexer.k_cache,
            module.dsa_attn.swa_cache_layer,
        )
        self.specs = [cache.get_kv_cache_spec(self.config) for cache in caches]
        builder, device = AscendDSABackend.get_builder_cls(), torch.device("cpu")
        self.builders = [
            builder(spec, [f"{self.prefix}.{name}"], self.config, device)
            for name, spec in zip(family.CACHES, self.specs)
        ]

    def metadata(self, rows: Rows, padding: int = 0, dummy: bool = False) -> list:
        """What the real builders make of a step; `padding`: decode requests of one token that a
        graph adds; `dummy`: a run of no requests, which comes with the tables of live ones and with
        slots that say "write nothing"."""
        lengths = torch.tensor(rows.lengths + [1] * padding, dtype=torch.int32)
        seq_lens = torch.tensor(rows.starts + [0] * padding, dtype=torch.int32) + lengths
        seq_lens[len(rows.lengths) :] = 0
        query_start_loc = torch.cat(
            [torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]
        )
        tokens = int(query_start_loc[-1])
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(rows.starts, rows.lengths)])
        positions = torch.cat([positions, torch.zeros(padding, dtype=torch.int64)])
        shared = {"prefill": {}, "decode": {}, "common": {}}
        result = []
        for builder, spec, table in zip(self.builders, self.specs, self._tables(rows, padding)):
            common = AscendCommonAttentionMetadata(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                _seq_lens_cpu=seq_lens,
                num_reqs=len(lengths),
                num_actual_tokens=tokens,
                num_input_tokens=tokens,
                max_query_len=int(lengths.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=table,
                slot_mapping=slot_mapping(rows, table, spec.block_size, tokens, dummy),
                positions=positions,
                positions_cpu=positions,
                is_prefilling=lengths > builder.decode_threshold,
                attn_state=AscendAttentionState.ChunkedPrefill,
            )
            result.append(family.build(builder, common, len(rows.lengths), spec.block_size, shared))
        return result

    def _tables(self, rows: Rows, padding: int) -> list[Tensor]:
        """One for each builder. Those of other caches are never read here."""

        def table(blocks: list[list[int]]) -> Tensor:
            width = self.config.model_config.max_model_len // self.page
            return torch.tensor(
                [row + [0] * (width - len(row)) for row in blocks + [[]] * padding],
                dtype=torch.int32,
            )

        none = table([[]] * len(rows.lengths))
        return [none, none, table(rows.state_tables), table(rows.k_tables), none]

    def hidden_states(self, tokens: int) -> Tensor:
        """Small integers, so that the projection is exact."""
        shape = (tokens, self.config.model_config.hf_config.hidden_size)
        return torch.randint(-2, 3, shape, generator=self.numbers).bfloat16()

    def run(self, x: Tensor, metadata: list, executor: Any = None) -> None:
        """One forward call of the model, as far as this layer is concerned. `executor`: of what the
        builders leave to another stream."""
        metadata = family.as_the_attention_gets_them(self.prefix, metadata)
        with forward_call(metadata, len(x), executor):
            self.attention.forward(
                f"{self.prefix}.attn", x, self.kv_cache, metadata, output=torch.empty_like(x)
            )

    def run_context_parallel(self, x: Tensor, metadata: list, executor: Any = None) -> None:
        """One forward call with context parallelism, as far as the keys are concerned."""
        metadata = family.as_the_attention_gets_them(self.prefix, metadata)
        with forward_call(metadata, len(x), executor):
            family.update_context_parallel(self.attention, self.prefix, x, self.kv_cache, metadata)


@contextlib.contextmanager
def forward_call(metadata: list, tokens: int, executor: Any = None) -> Iterator[None]:
    """What vllm-ascend's runner has around the model's forward call."""
    context = forward_context.ForwardContext(
        no_compile_layers={}, attn_metadata=metadata, slot_mapping={}
    )
    context.num_tokens, context.device_metadata_executor = tokens, executor
    with torch.inference_mode(), forward_context.override_forward_context(context):
        yield


def slot_mapping(rows: Rows, table: Tensor, block: int, tokens: int, dummy: bool) -> Tensor:
    """As vllm-ascend's block tables make it of a group's table, for each token of the requests,
    then -1 for the padding of a graph; -1 everywhere in a dummy run."""
    slots = torch.full((tokens,), -1, dtype=torch.int32)
    if not dummy:
        request, position = torch.tensor(list(rows.tokens())).t()
        slots[: len(request)] = (table[request, position // block] * block + position % block).int()
    return slots
