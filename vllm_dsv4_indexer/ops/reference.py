"""The definition of `compress`, in eager torch: short and slow. Equations: section 2 of DeepSeek-V4's indexer
compressor as vLLM 0.32, transformers 5.19 and DeepSeek's own model file agree on it.

Runs on any device by name. It checks values and selects rows on the host's word, so it waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import (
    AMAX_FLOOR, FP8_MAX, HEAD_DIM, INT8_MAX, KV_WIDTH, RATIO, ROPE_DIM, WINDOW, Violation, violation_error,
)  # fmt: skip


def compress(
    kv_score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    token_to_req: Tensor,
    inner_state_slot_mapping: Tensor,
    inner_state_block_table: Tensor,
    inner_state_cache: Tensor,
    k_slot_mapping: Tensor,
    k_cache: Tensor,
    k_scale_cache: Tensor | None,
    *,
    eps: float,
    k_format: str,
) -> int:
    """See `vllm_dsv4_indexer.ops.compress`; returns the number of entries written."""
    page = inner_state_cache.shape[1]
    k_entries = k_cache.shape[0] * k_cache.shape[1]
    valid = _check_tokens(
        positions, token_to_req, inner_state_slot_mapping, k_slot_mapping, inner_state_cache.shape[0] * page,
        k_entries, cos_sin_cache.shape[0], inner_state_block_table.shape[0],
    )  # fmt: skip
    closes = (k_slot_mapping >= 0) & (positions % RATIO == RATIO - 1)
    windows = _windows(closes[: valid.tokens].nonzero()[:, 0], positions, token_to_req)
    _check_windows(windows, positions, token_to_req, inner_state_block_table, inner_state_cache.shape[0], page)
    if valid.error is not None:
        raise valid.error

    # One row per token, as the state holds it: [kv | gate + ape].
    rows = kv_score.float()
    rows = torch.cat([rows[:, :KV_WIDTH], rows[:, KV_WIDTH:] + ape[positions % RATIO]], dim=1)

    # Every window is pooled from the state as it was, then the state is written: the pre-image rule.
    pooled = _pool(_window_rows(windows, rows, token_to_req, inner_state_block_table, inner_state_cache))
    entries = _rope(_rms_norm(pooled, norm_weight.float(), eps), cos_sin_cache[positions[windows.token] - RATIO + 1])
    entries = entries.bfloat16().float()

    last = _last_of_each_slot(inner_state_slot_mapping)
    slots = inner_state_slot_mapping[last]
    inner_state_cache[slots // page, slots % page] = rows[last]

    last = _last_of_each_slot(k_slot_mapping[windows.token])
    slots = k_slot_mapping[windows.token][last]
    if k_format == "fp8_pow2":
        _store_fp8_pow2(entries[last], slots, k_cache)
    elif k_format == "fp8_amax":
        _store_fp8_amax(entries[last], slots, k_cache)
    else:
        _store_int8_hadamard(entries[last], slots, k_cache, k_scale_cache)
    return len(windows.token)


class _Windows(NamedTuple):
    """The windows closed by `token` [E]: their positions `q` [E, 8], and the tokens `u` [E, 8] that hold them if
    `in_call`."""

    token: Tensor
    q: Tensor
    u: Tensor
    in_call: Tensor


def _windows(token: Tensor, positions: Tensor, token_to_req: Tensor) -> _Windows:
    back = torch.arange(WINDOW - 1, -1, -1, device=token.device)
    q = positions[token, None] - back
    u = token[:, None] - back
    held = u.clamp(min=0)
    in_call = (u >= 0) & (token_to_req[held] == token_to_req[token, None]) & (positions[held] == q)
    return _Windows(token, q, held, in_call)


def _window_rows(windows: _Windows, rows: Tensor, token_to_req: Tensor, table: Tensor, state: Tensor) -> Tensor:
    """[E, 8, 512]: a row of this call, else of the state, else (before position 0) kv 0 and gate -inf."""
    page = state.shape[1]
    history = ~windows.in_call & (windows.q >= 0)
    gathered = rows.new_zeros(*windows.q.shape, 2 * KV_WIDTH)
    gathered[..., KV_WIDTH:] = -torch.inf
    gathered[windows.in_call] = rows[windows.u[windows.in_call]]
    request = token_to_req[windows.token, None].expand_as(windows.q)[history].long()
    q = windows.q[history]
    gathered[history] = state[table[request, q // page].long(), q % page]
    return gathered


def _pool(rows: Tensor) -> Tensor:
    """Softmax per channel over the eight rows: front halves of the previous group, back halves of the own group."""
    kv, gate = rows[..., :KV_WIDTH], rows[..., KV_WIDTH:]
    kv = torch.cat([kv[:, :RATIO, :HEAD_DIM], kv[:, RATIO:, HEAD_DIM:]], dim=1)
    gate = torch.cat([gate[:, :RATIO, :HEAD_DIM], gate[:, RATIO:, HEAD_DIM:]], dim=1)
    weight = torch.exp(gate - gate.amax(dim=1, keepdim=True))
    return (weight * kv).sum(dim=1) / weight.sum(dim=1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs of the last 64 channels."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    a, b = x[:, -ROPE_DIM::2], x[:, -ROPE_DIM + 1 :: 2]
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([x[:, :-ROPE_DIM], rotated], dim=-1)


def _store_fp8_pow2(x: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """The scale is the least power of two that brings the largest magnitude to 448 = 1.75 * 2^8 or less, found from
    the bits of that magnitude, m * 2^t with 1 <= m < 2."""
    bits = _amax(x).view(torch.int32)
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)
    scale, inverse = (((127 + sign * exponent) << 23).view(torch.float32) for sign in (1, -1))
    _store_fp8_page(x * inverse[:, None], scale, slots, k_cache)


def _store_fp8_amax(x: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """Rotated; the scale brings the largest magnitude to 448, and an entry of zeros has scale 0."""
    h = _hadamard(x)
    scale = h.abs().amax(dim=-1) * torch.tensor(1 / FP8_MAX, dtype=torch.float32)
    _store_fp8_page(h / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None], scale, slots, k_cache)


def _store_fp8_page(scaled: Tensor, scale: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """A page is opaque: its entries of 128 values, then their fp32 scales; only the stride between pages is the
    tensor's own."""
    codes = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    per_page = k_cache.shape[1]

    def part(width: int, offset: int) -> Tensor:
        strides = (k_cache.stride(0), width, 1)
        return k_cache.as_strided((len(k_cache), per_page, width), strides, k_cache.storage_offset() + offset)

    page, entry = slots // per_page, slots % per_page
    part(HEAD_DIM, 0)[page, entry] = codes.view(torch.uint8)
    part(4, per_page * HEAD_DIM)[page, entry] = scale.view(torch.uint8).view(-1, 4)


def _store_int8_hadamard(x: Tensor, slots: Tensor, k_cache: Tensor, k_scale_cache: Tensor) -> None:
    h = _hadamard(x)
    amax = _amax(h)
    codes = (h * (INT8_MAX / amax)[:, None]).round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0)
    page, entry = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[page, entry] = codes.to(torch.int8)
    k_scale_cache[page, entry] = (amax / INT8_MAX).to(k_scale_cache.dtype)


def _amax(x: Tensor) -> Tensor:
    """The largest magnitude of each entry; a NaN counts as infinity, so that it marks its entry alone."""
    return x.abs().amax(dim=-1).clamp(min=AMAX_FLOOR).nan_to_num(torch.inf, torch.inf)


def _hadamard(x: Tensor) -> Tensor:
    """The orthonormal Sylvester-Hadamard transform, in the seven stages of the native kernels."""
    stride = 1
    while stride < HEAD_DIM:
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        stride *= 2
    return x * HEAD_DIM**-0.5


def _last_of_each_slot(slots: Tensor) -> Tensor:
    """The index of the last occurrence of each slot that is not -1."""
    ordered, index = slots.sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return index[last & (ordered >= 0)]


class _Valid(NamedTuple):
    """The tokens before the first violation of `_check_tokens`, and its error."""

    tokens: int
    error: ValueError | None


def _check_tokens(
    positions: Tensor,
    token_to_req: Tensor,
    state_slots: Tensor,
    k_slots: Tensor,
    state_rows: int,
    k_entries: int,
    max_pos: int,
    requests: int,
) -> _Valid:
    active = (state_slots >= 0) | (k_slots >= 0)
    checks = {
        Violation.STATE_SLOT: (state_slots, -1, state_rows, True),
        Violation.K_SLOT: (k_slots, -1, k_entries, True),
        Violation.POSITION: (positions, 0, max_pos, active),
        Violation.REQUEST: (token_to_req, 0, requests, active),
    }
    bad = torch.stack([((v < low) | (v >= bound)) & where for v, low, bound, where in checks.values()], dim=1)
    if not bad.any():
        return _Valid(len(positions), None)
    token, check = bad.nonzero()[0].tolist()
    code = list(checks)[check]
    values, _, bound, _ = checks[code]
    error = violation_error(
        code, token=token, request=int(token_to_req[token]), position=int(positions[token]),
        value=int(values[token]), bound=bound,
    )  # fmt: skip
    return _Valid(token, error)


def _check_windows(
    windows: _Windows, positions: Tensor, token_to_req: Tensor, table: Tensor, pages: int, page: int
) -> None:
    """Every history row must have a page."""
    history = ~windows.in_call & (windows.q >= 0)
    column = windows.q // page
    wide = column < table.shape[1]
    request = token_to_req[windows.token, None].long()
    value = table[request, column.clamp(0, max(table.shape[1] - 1, 0))] if table.numel() else column
    bad = history & ~(wide & (value > 0) & (value < pages))
    if not bad.any():
        return
    window, row = bad.nonzero()[0].tolist()
    token = int(windows.token[window])
    if wide[window, row]:
        code, value, bound = Violation.TABLE_ENTRY, value, pages
    else:
        code, value, bound = Violation.TABLE_COLUMN, column, table.shape[1]
    raise violation_error(
        code, token=token, request=int(token_to_req[token]), position=int(positions[token]),
        value=int(value[window, row]), bound=bound, needed=int(windows.q[window, row]),
    )  # fmt: skip
