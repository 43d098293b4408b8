"""A step's metadata in plain torch, for vLLM 0.32.0's Triton kernels, which do not run on a CPU.

Every function writes into the tensors that the kernel of its purpose writes into. Parameters have
the names of the kernels' parameters, since vLLM passes them by name. Nothing here imports vLLM.
"""

import torch
from torch import Tensor


def token_request_mapping(
    query_start_loc: Tensor,
    output: Tensor,
    num_reqs: int,
    num_mapped: int,
    num_tokens: int,
    num_warps: int,
) -> None:
    """output[t] = the request of token t; 0 for the padding behind the last request."""
    tokens = torch.arange(num_mapped, dtype=query_start_loc.dtype)
    output[:num_mapped] = torch.searchsorted(query_start_loc[1:], tokens, right=True)
    output[num_mapped:num_tokens] = 0


def _requests_and_positions(query_start_loc: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """The request and the position of each token of a packed batch, int64 [T]."""
    query_lens = torch.diff(query_start_loc)
    request = torch.repeat_interleave(query_lens)
    first_position = seq_lens[: len(query_lens)] - query_lens
    return request, torch.arange(len(request)) + (first_position - query_start_loc[:-1])[request]


def compressed_slot_mapping(
    compressed_slot_mapping_ptr: Tensor,
    slot_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    block_size: int,
    dcp_world_size: int,
    cp_interleave: int,
    COMPRESS_RATIO: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
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
    query_start_loc_ptr: Tensor,
    uncompressed_seq_lens_ptr: Tensor,
    cu_compressed_seq_lens_ptr: Tensor,
    row_start_cu_compressed_seq_lens_ptr: Tensor,
    token_to_seq_ptr: Tensor,
    cu_compressed_seq_len_ks_ptr: Tensor,
    cu_compressed_seq_len_ke_ptr: Tensor,
    query_slice_start: int,
    query_slice_stop: int,
    DCP_RANK: int,
    DCP_WORLD: int,
    DCP_INTERLEAVE: int,
    BLOCK_SIZE: int,
    COMPRESS_RATIO: int,
) -> None:
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
    seq_lens_ptr: Tensor,
    decode_seq_lens_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    expanded_block_table_ptr: Tensor,
    expanded_bt_stride: int,
    decode_lens_ptr: Tensor,
    max_decode_len: int,
    BLOCK_SIZE: int,
) -> None:
    """Each of a request's `max_decode_len` tokens, one and its drafts, becomes a request of one
    token: its own length (0 for the padding behind the last request) and the request's pages."""
    tokens = len(seq_lens_ptr) * max_decode_len
    drafts_to_come = torch.arange(max_decode_len - 1, -1, -1, dtype=seq_lens_ptr.dtype)
    decode_seq_lens_ptr[:tokens] = (seq_lens_ptr[:, None] - drafts_to_come).clamp(min=0).flatten()
    expanded_block_table_ptr[:tokens] = block_table_ptr.repeat_interleave(max_decode_len, dim=0)
    decode_lens_ptr[:tokens] = 1


def not_read_on_cpu(*_: object, **__: object) -> None:
    """Window indices and gather lengths: the CPU attention works its own out from the positions."""
