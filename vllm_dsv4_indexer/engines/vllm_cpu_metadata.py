"""The metadata of vLLM 0.32.0's DeepSeek-V4 on a CPU.

vLLM makes some of it by Triton kernels, which do not run on a CPU, and some of it wrongly.
`metadata_on_cpu` puts the functions of this file in their places, for the length of a step: other
engines of the process never meet them.

A function that stands for a kernel can go when CpuPlatform.register_triton_kernel_overrides has its
own; the others say what they wait for. Parameters have the names of the kernels' parameters, since
vLLM passes them by name.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.backends.mla.indexer import (
    DeepseekV32IndexerPrefillChunkMetadata,
    build_prefill_chunk_metadata,
)
from vllm.v1.attention.ops import metadata


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


def token_request_mapping(query_start_loc, output, num_reqs, num_mapped, num_tokens, num_warps):
    """output[t] = the request of token t; 0 for the padding behind the last request."""
    tokens = torch.arange(num_mapped, dtype=query_start_loc.dtype)
    output[:num_mapped] = torch.searchsorted(query_start_loc[1:], tokens, right=True)
    output[num_mapped:num_tokens] = 0


def _requests_and_positions(query_start_loc, seq_lens):
    """The request and the position of each token of a packed batch, int64 [T]."""
    query_lens = torch.diff(query_start_loc)
    request = torch.repeat_interleave(query_lens)
    first_position = seq_lens[: len(query_lens)] - query_lens
    return request, torch.arange(len(request)) + (first_position - query_start_loc[:-1])[request]


def compressed_slot_mapping(
    compressed_slot_mapping_ptr,
    slot_mapping_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    block_table_stride,
    block_size,
    dcp_world_size,
    cp_interleave,
    COMPRESS_RATIO,
    PAD_ID,
    TRITON_BLOCK_SIZE,
):
    """The slot of the entry that each token closes; PAD_ID for a token that closes none or has no
    slot itself."""
    num_reqs = len(block_table_ptr)
    request, position = _requests_and_positions(query_start_loc_ptr[: num_reqs + 1], seq_lens_ptr)
    closes = ((position + 1) % COMPRESS_RATIO == 0) & (slot_mapping_ptr[: len(request)] != PAD_ID)
    request, entry = request[closes], position[closes] // COMPRESS_RATIO
    slots = compressed_slot_mapping_ptr[: len(closes)]
    slots.fill_(PAD_ID)
    page = block_table_ptr[request, entry // block_size].long()
    slots[closes] = page * block_size + entry % block_size


def prefill_chunk_metadata(
    query_start_loc_ptr,
    uncompressed_seq_lens_ptr,
    cu_compressed_seq_lens_ptr,
    row_start_cu_compressed_seq_lens_ptr,
    token_to_seq_ptr,
    cu_compressed_seq_len_ks_ptr,
    cu_compressed_seq_len_ke_ptr,
    query_slice_start,
    query_slice_stop,
    DCP_RANK,
    DCP_WORLD,
    DCP_INTERLEAVE,
    BLOCK_SIZE,
    COMPRESS_RATIO,
):
    """The range [ks, ke) of entries that each token of the slice may score, and the request of each
    entry.

    vLLM 0.32.0's indexer looks a token's request up by its ks (`forward_cpu`). If the last requests
    have no entry yet, their ks would lie behind all entries, where it finds a request that does not
    exist. So ks ends at the last entry, and the range stays empty. This can go when that look-up
    stays within the requests.
    """
    request, position = _requests_and_positions(query_start_loc_ptr, uncompressed_seq_lens_ptr)
    rows = slice(query_slice_start, query_slice_stop)
    last_entry = len(token_to_seq_ptr) - 1
    first_entry = row_start_cu_compressed_seq_lens_ptr[request[rows]].clamp(max=last_entry)
    cu_compressed_seq_len_ks_ptr.copy_(first_entry)
    cu_compressed_seq_len_ke_ptr.copy_(first_entry + (position[rows] + 1) // COMPRESS_RATIO)
    token_to_seq_ptr.copy_(torch.repeat_interleave(torch.diff(cu_compressed_seq_lens_ptr)))


def uniform_decode_metadata(
    seq_lens_ptr,
    decode_seq_lens_ptr,
    block_table_ptr,
    block_table_stride,
    expanded_block_table_ptr,
    expanded_bt_stride,
    decode_lens_ptr,
    max_decode_len,
    BLOCK_SIZE,
):
    """Each of a request's `max_decode_len` tokens, one and its drafts, becomes a request of one
    token: its own length (0 for the padding behind the last request) and the request's pages."""
    tokens = len(seq_lens_ptr) * max_decode_len
    drafts_to_come = torch.arange(max_decode_len - 1, -1, -1, dtype=seq_lens_ptr.dtype)
    decode_seq_lens_ptr[:tokens] = (seq_lens_ptr[:, None] - drafts_to_come).clamp(min=0).flatten()
    expanded_block_table_ptr[:tokens] = block_table_ptr.repeat_interleave(max_decode_len, dim=0)
    decode_lens_ptr[:tokens] = 1


def not_read_on_cpu(*_, **__):
    """Window indices and gather lengths: the CPU attention works its own out from the positions."""


def no_tile_schedule(self, num_decode_tokens):
    """The CPU has no tile scheduler. This can go when vLLM's own override has the layer types that
    V4.1 brought (c1a, c2a); 0.32.0's has not."""
    layer_types = [name for name in vars(sparse_swa) if name.startswith("_LAYER_TYPE_")]
    return dict.fromkeys(getattr(sparse_swa, name) for name in layer_types)


def prefill_chunk(start_idx, end_idx, query_start_loc, query_start_loc_cpu, *others, **options):
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
    (metadata, "_token_request_mapping_kernel", token_request_mapping),
    (compressor_utils.CompressedSlotMappingKernel, "kernel", compressed_slot_mapping),
    (indexer.BuildPrefillChunkMetadataKernel, "kernel", prefill_chunk_metadata),
    (indexer.PrepareUniformDecodeKernel, "kernel", uniform_decode_metadata),
    (sparse_swa.ComputeSWAIndicesAndLensKernel, "kernel", not_read_on_cpu),
    (sparse_swa.ComputePrefillMetadataKernel, "kernel", not_read_on_cpu),
)
REPLACED = (  # owner, attribute, what takes its place
    *((owner, name, KernelOverride(getattr(owner, name), ours)) for owner, name, ours in KERNELS),
    (DeepseekV4CPUSparseSWAMetadataBuilder, "build_tile_scheduler", no_tile_schedule),
    (indexer, "build_prefill_chunk_metadata", prefill_chunk),
)
