"""The operators of vllm-ascend's stock indexer chain as their documents describe them, to compare
with what it stores.

`compressor` and `compressor_metadata`: csrc/attention/ of the vllm-ascend repository. Both are
written for one step of requests, in loops over requests and entries.
"""

import npu
import torch
from torch import Tensor

WINDOW = 8
FLAT = 1  # the format of slots on an A5: block * block_size + offset


def compressor_metadata(
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    start_pos: Tensor,
    table: Tensor,
    block_size: int,
    slot_format: int,
    ratio: int,
    rows: int,
    requests: int,
):
    """Cosines, sines and (block, offset) of each entry that the step closes, compact, then rows of
    padding."""
    entries = [
        (r, e)
        for r, first, length in _spans(starts, start_pos)[:requests]
        for e in range(first // ratio, (first + length) // ratio)
    ]
    out_cos, out_sin = torch.ones(rows, cos.shape[1]), torch.zeros(rows, sin.shape[1])
    slots = torch.tensor([[-1, block_size - 1]], dtype=torch.int32).repeat(rows, 1)  # of padding
    for row, (request, entry) in enumerate(entries):
        out_cos[row], out_sin[row] = cos[entry * ratio], sin[entry * ratio]
        slots[row] = torch.tensor([table[request, entry // block_size], entry % block_size])
    if slot_format == FLAT:
        slots = slots[:, 0] * block_size + slots[:, 1]  # -1 of padding
    return out_cos, out_sin, slots


def compressor(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    state: Tensor,
    ape: Tensor,
    norm: Tensor,
    sin: Tensor,
    cos: Tensor,
    *,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    cmp_ratio: int,
    norm_eps: float,
    **modes,
):
    """bf16 entries, compact. A state row whose block is 0 is not written, but read like any
    other."""
    width = wkv.shape[0] // 2
    if cmp_ratio != 4 or width != 128:
        return npu.compressor(x, wkv)  # the main compressor's
    page = state.shape[1]
    kv, gate = x.float() @ wkv.float().t(), x.float() @ wgate.float().t()
    entries = torch.zeros(len(cos), width)
    row = 0
    for request, first, length in _spans(cu_seqlens, start_pos):
        rows = {}
        for position in range(max(first - WINDOW, 0), first):
            rows[position] = state[
                state_block_table[request, position // page], position % page
            ].clone()
        for position in range(first, first + length):
            token = int(cu_seqlens[request]) + position - first
            rows[position] = torch.cat([kv[token], gate[token] + ape[position % cmp_ratio]])
            if block := int(state_block_table[request, position // page]):
                state[block, position % page] = rows[position]
        for position in range(first, first + length):
            if position % cmp_ratio == cmp_ratio - 1:
                entries[row] = _rope(
                    _normalised(_pooled(rows, position, width), norm, norm_eps), cos[row], sin[row]
                )
                row += 1
    return entries.bfloat16()


def indexer_compress_epilog_v2(
    *, indexer_compress_cache: Tensor, x: Tensor, slot_mapping: Tensor, layout: int
) -> None:
    """An A5's store: fp8 values and behind them, in the page, fp32 scales: the largest magnitude
    times 1 / 448."""
    pages, per_page, _, entry = indexer_compress_cache.shape
    width = x.shape[-1]
    scale = x.float().abs().amax(dim=-1, keepdim=True) * torch.tensor(1 / 448, dtype=torch.float32)
    codes = (x.float() / scale).nan_to_num(0).to(torch.float8_e4m3fn).view(torch.uint8)
    page = indexer_compress_cache.view(pages, per_page * entry)
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            offset = slot % per_page
            page[slot // per_page, offset * width : (offset + 1) * width] = codes[row]
            behind = per_page * width + 4 * offset
            page[slot // per_page, behind : behind + 4] = scale[row].view(torch.uint8)


def _spans(starts: Tensor, start_pos: Tensor) -> list[tuple[int, int, int]]:
    """(request, first position, number of tokens) of each request."""
    lengths = starts.diff().tolist()
    return [
        (request, first, length)
        for request, (first, length) in enumerate(zip(start_pos.tolist(), lengths))
    ]


def _pooled(rows: dict[int, Tensor], position: int, width: int) -> Tensor:
    values, scores = [], []
    for back in range(WINDOW - 1, -1, -1):
        half = slice(0, width) if back > 3 else slice(width, 2 * width)
        if position - back >= 0:
            values.append(rows[position - back][: 2 * width][half])
            scores.append(rows[position - back][2 * width :][half])
    return (torch.stack(scores).softmax(dim=0) * torch.stack(values)).sum(dim=0)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight.float()


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    plain, pairs = x[:64], x[64:].view(-1, 2)
    turned = torch.stack([-pairs[:, 1], pairs[:, 0]], dim=1)
    return torch.cat([plain, (pairs * cos.view(-1, 2) + turned * sin.view(-1, 2)).flatten()])
