"""The op `dsv4_indexer::project` on CPUs: the projection `kv_score = x @ weight.T`, not rounded to
bfloat16. Products of bfloat16 are exact in fp32, and are summed in fp32.

    bf16_dot   csrc/cpu/projection.cpp: instructions that multiply pairs of bfloat16 (AVX512_BF16).
               A token's row has the same bits in any call. The weight takes the memory that it had.
    fp32       torch.mm on widened operands: the weight once, which doubles its memory, x in blocks.

Which is faster depends on the core. With AVX512_BF16, AMD's cores do twice as many products in the
same time as with fp32 multiply-adds, and Intel's half as many (a core of Zen 4: 232 against 116
GFLOP/s, of Emerald Rapids: 86 against 177).
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..contract import ROW_WIDTH
from . import cpu

_PANEL = 64  # outputs that lie together in a packed weight; csrc/cpu/projection.cpp says how
_BLOCK = 256  # rows of x that are widened at a time: they stay in the cache

_library = torch.library.Library("dsv4_indexer", "FRAGMENT")
_library.define("project(Tensor x, Tensor weight) -> Tensor")


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Returns kv_score [T, 512] in fp32. `x`: hidden states [T, hidden]. `weight`: from
    `prepare_weight`.

    Raises ValueError if x does not fit the weight.
    """
    return torch.ops.dsv4_indexer.project(x, weight)


@functools.cache
def methods() -> tuple[str, ...]:
    """The methods that this CPU has, fastest first."""
    native = cpu.native()
    rank = native.library.dsv4_indexer_bf16_dot() if native.isa == "avx512" else 0
    return {0: ("fp32",), 1: ("fp32", "bf16_dot"), 2: ("bf16_dot", "fp32")}[rank]


def prepare_weight(weight: Tensor, method: str | None = None) -> Tensor:
    """The weight in the layout of `project`.

    weight: [512, hidden], rows 0..255 wkv and 256..511 wgate.
    method: one of `methods()`, by default the first. bf16_dot needs bfloat16 and an even hidden
    size; any other weight is prepared for fp32.
    """
    rows, hidden = weight.shape
    if rows != ROW_WIDTH:
        raise ValueError(
            f"the projection's weight has shape {list(weight.shape)}; expected [{ROW_WIDTH}, "
            "hidden]"
        )
    method = method or methods()[0]
    if method not in methods():
        raise ValueError(
            f"the projection's method is {method!r}; this CPU has {', '.join(methods())}"
        )
    if method == "bf16_dot" and weight.dtype is torch.bfloat16 and hidden % 2 == 0:
        return weight.view(-1, _PANEL, hidden // 2, 2).transpose(1, 2).contiguous()
    return weight.float()


def method_of(weight: Tensor) -> str:
    """The method that a weight made by `prepare_weight` is for."""
    return "fp32" if weight.dtype is torch.float32 else "bf16_dot"


def _project(x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, weight)
    if len(x):
        {"fp32": _fp32, "bf16_dot": _bf16_dot}[method_of(weight)](x, weight, out)
    return out


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    """The result without its values; also the fake implementation, for torch.compile."""
    dot = method_of(weight) == "bf16_dot"
    hidden = 2 * weight.shape[1] if dot else weight.shape[1]
    if (
        x.dim() != 2
        or x.shape[1] != hidden
        or x.stride(1) != 1
        or (dot and x.dtype is not torch.bfloat16)
    ):
        kind = "torch.bfloat16" if dot else "floating point"
        raise ValueError(
            f"x has shape {list(x.shape)}, strides {x.stride()} and dtype {x.dtype}; this weight "
            f"is for rows of {hidden} contiguous values, {kind}"
        )
    return x.new_empty(x.shape[0], ROW_WIDTH, dtype=torch.float32)


def _fp32(x: Tensor, weight: Tensor, out: Tensor) -> None:
    wide = weight.new_empty(min(_BLOCK, len(x)), weight.shape[1])
    for rows, block in zip(out.split(_BLOCK), x.split(_BLOCK)):
        torch.mm(wide[: len(block)].copy_(block), weight.T, out=rows)


def _bf16_dot(x: Tensor, weight: Tensor, out: Tensor) -> None:
    failed = _native_project()(
        cpu.native().parallel_for,
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        weight.data_ptr(),
        out.data_ptr(),
    )
    if failed:
        raise RuntimeError("torch's parallel_for failed: see torch's own message")


@functools.cache
def _native_project() -> Callable[..., int]:
    function = cpu.native().library.dsv4_indexer_project
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return function


_library.impl("project", _project, "CPU")
torch.library.register_fake("dsv4_indexer::project", _empty, lib=_library)
