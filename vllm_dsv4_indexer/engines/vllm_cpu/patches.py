"""Where vLLM 0.32.0 makes metadata, and our functions in those places for the length of a step.

vLLM makes some of it by Triton kernels, which do not run on a CPU, and some of it wrongly. A
function that stands for a kernel (metadata.py) can go when
CpuPlatform.register_triton_kernel_overrides has its own; the others say what they wait for.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.backends.mla.indexer import (
    DeepseekV32IndexerPrefillChunkMetadata,
    build_prefill_chunk_metadata,
)
from vllm.v1.attention.ops import metadata as kernels

from vllm_dsv4_indexer.engines.vllm_cpu.metadata import (
    compressed_slot_mapping,
    not_read_on_cpu,
    prefill_chunk_metadata,
    token_request_mapping,
    uniform_decode_metadata,
)


@contextmanager
def metadata_on_cpu() -> Iterator[None]:
    """Meanwhile vLLM makes metadata by the functions of this file.

    What was replaced comes back whatever fails, the last first. Two engines of one process are
    never in a step at the same time: vLLM's forward context is a single one.
    """
    with ExitStack() as undo:
        for owner, name, ours in REPLACED:
            undo.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, ours)
        yield


def build_tile_scheduler(self: Any, num_decode_tokens: int) -> dict[str, None]:
    """The CPU has no tile scheduler. This can go when vLLM's own override has the layer types that
    V4.1 brought (c1a, c2a); 0.32.0's has not."""
    layer_types = [name for name in vars(sparse_swa) if name.startswith("_LAYER_TYPE_")]
    return dict.fromkeys(getattr(sparse_swa, name) for name in layer_types)


def prefill_chunk(
    start_idx: int,
    end_idx: int,
    query_start_loc: Tensor,
    query_start_loc_cpu: Tensor,
    *others: Any,
    **options: Any,
) -> DeepseekV32IndexerPrefillChunkMetadata:
    """vLLM's own chunk of prefills; an empty one where vLLM has none, as no request has an entry.

    vLLM 0.32.0's indexer asserts that a step with prefills has a chunk, and then handles an empty
    one (`forward_cpu`). This can go when it accepts that there is none.
    """
    chunk = build_prefill_chunk_metadata(
        start_idx, end_idx, query_start_loc, query_start_loc_cpu, *others, **options
    )
    if chunk is not None:
        return chunk
    nothing = query_start_loc[:0]
    return DeepseekV32IndexerPrefillChunkMetadata(
        block_table=nothing,
        cu_seqlen_ks=nothing,
        cu_seqlen_ke=nothing,
        cu_seq_lens=nothing,
        token_to_seq=nothing,
        total_seq_lens=0,
        token_start=int(query_start_loc_cpu[start_idx]),
        token_end=int(query_start_loc_cpu[end_idx]),
        num_reqs=end_idx - start_idx,
    )


KERNELS = (
    (kernels, "_token_request_mapping_kernel", token_request_mapping),
    (compressor_utils.CompressedSlotMappingKernel, "kernel", compressed_slot_mapping),
    (indexer.BuildPrefillChunkMetadataKernel, "kernel", prefill_chunk_metadata),
    (indexer.PrepareUniformDecodeKernel, "kernel", uniform_decode_metadata),
    (sparse_swa.ComputeSWAIndicesAndLensKernel, "kernel", not_read_on_cpu),
    (sparse_swa.ComputePrefillMetadataKernel, "kernel", not_read_on_cpu),
)
REPLACED = (  # owner, attribute, what takes its place
    *((owner, name, KernelOverride(getattr(owner, name), ours)) for owner, name, ours in KERNELS),
    (DeepseekV4CPUSparseSWAMetadataBuilder, "build_tile_scheduler", build_tile_scheduler),
    (indexer, "build_prefill_chunk_metadata", prefill_chunk),
)
