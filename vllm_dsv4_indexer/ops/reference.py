"""The definition of the op, in eager torch: short and slow. The equations are those on which vLLM
0.32, transformers 5.19 and DeepSeek's own model file agree. docs/design.md has them in words.

It serves every compressor of the model, on any device, by name. It reads values on the host, so it
waits for the device.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contract
from ..contract import (
    AMAX_MIN,
    DS_MLA_BLOCK,
    DS_MLA_SCALE_MIN,
    EARLY,
    FP8_MAX,
    HEAD_DIM,
    INDEXER,
    INT8_MAX,
    LATE,
    MASKED,
    NO_WINDOW,
    PLAN_LAYOUT,
    RATIO,
    ROPE_DIM,
    Extents,
    Geometry,
    Layer,
    Plan,
    PlanHeader,
    Step,
    Violation,
    row_source,
    violation_error,
)

# ---- the plan of a step --------------------------------------------------------------------------


def plan(step: Step, extents: Extents, ratio: int = RATIO) -> Tensor:
    """See `vllm_dsv4_indexer.ops.plan`."""
    tokens = len(step.positions)
    valid = _check_tokens(step, extents)
    closes = (step.k_slot_mapping >= 0) & (step.positions % ratio == ratio - 1)
    window = contract.window_of(ratio)
    windows = _windows(closes[: valid.tokens].nonzero()[:, 0], step, window)
    _check_windows(windows, step, extents)
    if valid.error is not None:
        raise valid.error
    slots = step.inner_state_slot_mapping  # those of page 0, the null page, are nobody's
    step = step._replace(inner_state_slot_mapping=slots.masked_fill(slots < extents.state_page, -1))

    made = step.positions.new_zeros(contract.plan_size(tokens, ratio))
    sections = Plan.of(made, ratio)
    unique = _unique(step.inner_state_slot_mapping) and _unique(step.k_slot_mapping[windows.token])
    late = windows.own.all(dim=1) & unique
    sections.positions.copy_(step.positions)
    sections.requests.copy_(step.token_to_req)
    sections.state_slots.copy_(step.inner_state_slot_mapping)
    sections.k_slots.copy_(step.k_slot_mapping.masked_fill(~closes, -1))
    sections.windows[windows.token] = torch.where(late, LATE, EARLY)
    sections.sources.fill_(MASKED)
    sections.sources[windows.token] = torch.where(
        late[:, None], MASKED, _sources(windows, step, extents.state_page)
    )
    header = PlanHeader(
        PLAN_LAYOUT,
        tokens,
        entries=len(windows.token),
        early=int((~late).sum()),
        unique=int(unique),
        saved=int((step.inner_state_slot_mapping >= 0).sum()),
        shared=_shared(sections),
        **extents._asdict(),
    )
    sections.header[: len(header)] = torch.tensor(header)
    return made


class _Windows(NamedTuple):
    """The windows that the tokens `token` [E] close, each of W positions.

    q: [E, W], their positions. u: [E, W], the tokens that stand there. own: [E, W], whether these
    are the request's own tokens at these positions.
    """

    token: Tensor
    q: Tensor
    u: Tensor
    own: Tensor

    @property
    def history(self) -> Tensor:
        """[E, W]: whether the row is not an own token's, and not before the request's start."""
        return ~self.own & (self.q >= 0)


def _windows(token: Tensor, step: Step, window: int) -> _Windows:
    back = torch.arange(window - 1, -1, -1, device=token.device)
    q = step.positions[token, None] - back
    u = token[:, None] - back
    held = u.clamp(min=0)
    own = (u >= 0) & (q >= 0)  # a padding row may have a position before 0
    own &= (step.token_to_req[held] == step.token_to_req[token, None]) & (step.positions[held] == q)
    return _Windows(token, q, held, own)


def _sources(windows: _Windows, step: Step, page: int) -> Tensor:
    """[E, W], by the row rule: the request's own token; else the last token of the call with this
    position and the state slot that the request's table gives it; else that row of the state as it
    was before the call."""
    request = step.token_to_req[windows.token, None].expand_as(windows.q)[windows.history].long()
    q = windows.q[windows.history]
    slot = step.inner_state_block_table[request, q // page].long() * page + q % page
    same = (step.inner_state_slot_mapping == slot[:, None]) & (step.positions == q[:, None])
    index = torch.arange(len(step.positions), device=q.device)
    other = torch.where(same, index, -1).amax(dim=1) if len(q) else q
    sources = torch.where(windows.own, windows.u, MASKED)
    sources[windows.history] = torch.where(other >= 0, other, row_source(slot))
    return sources


def _shared(sections: Plan) -> int:
    """How many rows of windows another request's token of the step holds."""
    token, place = (sections.sources >= 0).nonzero(as_tuple=True)
    source = sections.sources[token, place]
    return int((sections.requests[source] != sections.requests[token]).sum())


def _unique(slots: Tensor) -> bool:
    used = slots[slots >= 0]
    return len(used.unique()) == len(used)


# ---- a layer -------------------------------------------------------------------------------------


def bind(layer: Layer, *, eps: float, k_format: str) -> Any:
    """Returns a function of kv_score and a plan. It runs the layer and returns how many entries it
    wrote."""
    geometry = contract.geometry_of(layer.ape, k_format)
    return functools.partial(_run, layer, geometry, eps, k_format)


def _run(
    layer: Layer, geometry: Geometry, eps: float, k_format: str, kv_score: Tensor, made: Tensor
) -> int:
    contract.check_plan_header(made, len(kv_score), Extents.of(layer))
    step, ratio = Plan.of(made, geometry.ratio), geometry.ratio

    # One row per token, as the state holds it: [kv | gate + ape].
    kv, gate = kv_score.float().chunk(2, dim=1)
    rows = torch.cat([kv, gate + layer.ape[step.positions % ratio]], dim=1)

    # Every window is pooled from the state as it was, then the state is written.
    token = (step.windows != NO_WINDOW).nonzero()[:, 0]
    pooled = pool(_window_rows(token, step, rows, layer.inner_state_cache), geometry)
    cos_sin = layer.cos_sin_cache[step.positions[token] - ratio + 1]
    entries = rope(rms_norm(pooled, layer.norm_weight.float(), eps), cos_sin)
    entries = entries.bfloat16().float()

    last = _last_of_each_slot(step.state_slots)
    slots, page = step.state_slots[last], layer.inner_state_cache.shape[1]
    layer.inner_state_cache[slots // page, slots % page] = rows[last]

    last = _last_of_each_slot(step.k_slots[token])
    slots = step.k_slots[token][last]
    if k_format == "fp8_pow2":
        _store_fp8_pow2(entries[last], slots, layer.k_cache)
    elif k_format == "fp8_amax":
        _store_fp8_amax(entries[last], slots, layer.k_cache)
    elif k_format == "fp8_ds_mla":
        _store_fp8_ds_mla(entries[last], slots, layer.k_cache)
    elif k_format == "bf16":
        _store_bf16(entries[last], slots, layer.k_cache)
    else:
        assert layer.k_scale_cache is not None, "the contract has checked it"
        _store_int8_hadamard(entries[last], slots, layer.k_cache, layer.k_scale_cache)
    return len(token)


def _window_rows(token: Tensor, step: Plan, rows: Tensor, state: Tensor) -> Tensor:
    """[E, W, row width]: the rows of the windows that these tokens close. A row that does not exist
    has kv 0 and gate -inf."""
    window, width = step.sources.shape[1], rows.shape[1]
    in_run = token[:, None] - torch.arange(window - 1, -1, -1, device=token.device)
    sources = torch.where(step.windows[token, None] == LATE, in_run, step.sources[token])
    gathered = rows.new_zeros(*sources.shape, width)
    gathered[..., width // 2 :] = -torch.inf
    of_call, of_state = sources >= 0, sources < MASKED
    gathered[of_call] = rows[sources[of_call]]
    slots, page = row_source(sources[of_state]), state.shape[1]
    gathered[of_state] = state[slots // page, slots % page]
    return gathered


def pool(rows: Tensor, geometry: Geometry = INDEXER) -> Tensor:
    """Softmax per channel over the rows of each window, [E, W, row width]. With overlap: front
    halves of the previous group, back halves of the own group."""
    kv, gate = rows.chunk(2, dim=-1)
    if geometry.overlap:
        kv, gate = _front_and_back(kv, geometry), _front_and_back(gate, geometry)
    weight = torch.exp(gate - gate.amax(dim=1, keepdim=True))
    return (weight * kv).sum(dim=1) / weight.sum(dim=1)


def _front_and_back(x: Tensor, geometry: Geometry) -> Tensor:
    front, back = x.chunk(2, dim=-1)
    return torch.cat([front[:, : geometry.ratio], back[:, geometry.ratio :]], dim=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs of the last 64 channels."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    a, b = x[:, -ROPE_DIM::2], x[:, -ROPE_DIM + 1 :: 2]
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([x[:, :-ROPE_DIM], rotated], dim=-1)


def _store_fp8_pow2(x: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """The scale is the least power of two that brings the largest magnitude to 448 or less."""
    exponent = _exponent(_amax(x, AMAX_MIN))
    codes = _fp8(x * _power_of_two(-exponent)[:, None])
    _store_page(codes, _power_of_two(exponent)[:, None], slots, k_cache)


def _store_fp8_amax(x: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """Rotates first. The scale brings the largest magnitude to 448; an entry of zeros has scale
    0."""
    h = _hadamard(x)
    scale = h.abs().amax(dim=-1) * torch.tensor(1 / FP8_MAX, dtype=torch.float32)
    codes = _fp8(h / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    _store_page(codes, scale[:, None], slots, k_cache)


def _store_fp8_ds_mla(x: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """The 448 channels that RoPE leaves alone are quantised in blocks, each with a power of two for
    its scale: the scale's exponent plus 127 is stored (UE8M0). The rotated ones stay in bf16."""
    blocks = x[:, :-ROPE_DIM].unflatten(-1, (-1, DS_MLA_BLOCK))
    exponent = _exponent(_amax(blocks, FP8_MAX * DS_MLA_SCALE_MIN))
    codes = _fp8(blocks * _power_of_two(-exponent)[..., None]).flatten(1)
    rotated = x[:, -ROPE_DIM:].bfloat16().view(torch.uint8)
    scales = torch.nn.functional.pad(exponent + 127, (0, 1)).to(torch.uint8)
    _store_page(torch.cat([codes, rotated], dim=1), scales, slots, k_cache)


def _store_bf16(x: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """All channels as they are."""
    k_cache[slots // k_cache.shape[1], slots % k_cache.shape[1]] = x.bfloat16()


def _store_page(values: Tensor, scales: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    """A page has the values of its entries, then their scales. Of the tensor's strides, only that
    between pages counts."""
    per_page, offset = k_cache.shape[1], k_cache.storage_offset()
    page, entry = slots // per_page, slots % per_page
    for stored in (values.view(torch.uint8), scales.view(torch.uint8)):
        width = stored.shape[1]
        part = k_cache.as_strided(
            (len(k_cache), per_page, width), (k_cache.stride(0), width, 1), offset
        )
        part[page, entry] = stored
        offset += per_page * width


def _fp8(scaled: Tensor) -> Tensor:
    """The codes as bytes."""
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _exponent(amax: Tensor) -> Tensor:
    """Of the least power of two that brings this magnitude to 448 or less.

    448 = 1.75 * 2^8. The exponent follows from the bits of the magnitude, m * 2^t with 1 <= m < 2.
    """
    bits = amax.view(torch.int32)
    return (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((127 + exponent) << 23).view(torch.float32)


def _store_int8_hadamard(x: Tensor, slots: Tensor, k_cache: Tensor, k_scale_cache: Tensor) -> None:
    h = _hadamard(x)
    amax = _amax(h, AMAX_MIN)
    inverse = torch.tensor(INT8_MAX) / amax  # of a number and a tensor torch rounds twice
    codes = (h * inverse[:, None]).round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0)
    page, entry = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[page, entry] = codes.to(torch.int8)
    k_scale_cache[page, entry] = (amax / INT8_MAX).to(k_scale_cache.dtype)


def _amax(x: Tensor, least: float) -> Tensor:
    """The largest magnitude of what shares a scale. A NaN counts as infinity, so that it spoils its
    own entry alone."""
    return x.abs().amax(dim=-1).clamp(min=least).nan_to_num(torch.inf, torch.inf)


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
    """How many tokens come before the first violation, and its error."""

    tokens: int
    error: ValueError | None


def _check_tokens(step: Step, extents: Extents) -> _Valid:
    positions, token_to_req, state_slots, table, k_slots = step
    active = (state_slots >= 0) | (k_slots >= 0)
    state_rows = extents.state_pages * extents.state_page
    checks = {
        Violation.STATE_SLOT: (state_slots, -1, state_rows, torch.ones_like(active)),
        Violation.K_SLOT: (k_slots, -1, extents.k_entries, torch.ones_like(active)),
        Violation.POSITION: (positions, 0, extents.max_pos, active),
        Violation.REQUEST: (token_to_req, 0, len(table), active),
    }
    bad = torch.stack(
        [((v < low) | (v >= bound)) & where for v, low, bound, where in checks.values()], dim=1
    )
    if not bad.any():
        return _Valid(len(positions), None)
    token, check = bad.nonzero()[0].tolist()
    code = list(checks)[check]
    values, _, bound, _ = checks[code]
    error = violation_error(
        code,
        token=token,
        request=int(token_to_req[token]),
        position=int(positions[token]),
        value=int(values[token]),
        bound=bound,
    )
    return _Valid(token, error)


def _check_windows(windows: _Windows, step: Step, extents: Extents) -> None:
    """Every history row must have a page."""
    table = step.inner_state_block_table
    column = windows.q // extents.state_page
    wide = column < table.shape[1]
    request = step.token_to_req[windows.token, None].long()
    value = table[request, column.clamp(0, max(table.shape[1] - 1, 0))] if table.numel() else column
    bad = windows.history & ~(wide & (value > 0) & (value < extents.state_pages))
    if not bad.any():
        return
    window, row = bad.nonzero()[0].tolist()
    token = int(windows.token[window])
    if wide[window, row]:
        code, value, bound = Violation.TABLE_ENTRY, value, extents.state_pages
    else:
        code, value, bound = Violation.TABLE_COLUMN, column, table.shape[1]
    raise violation_error(
        code,
        token=token,
        request=int(step.token_to_req[token]),
        position=int(step.positions[token]),
        value=int(value[window, row]),
        bound=bound,
        needed=int(windows.q[window, row]),
        window=windows.q.shape[1],
    )
