"""The op `dsv4_indexer::compress`: schema, fake implementation and dispatch.

An implementation is a function in a module of this folder, which takes the arguments of the op without `impl`, already
checked by `contract.check_metadata`, checks the values itself before it writes, and returns how many entries it wrote, or
None if only the device knows.
To add one, write the module and its line in `IMPLEMENTATIONS`.
"""

import functools
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import contract


class Implementation(NamedTuple):
    """`module.function` of this folder, and the device types that it serves: none named means every one, if asked for.
    The default of a device is the first that names it."""

    function: str
    devices: tuple[str, ...] = ()


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu.compress", ("cpu",)),
    "ascend": Implementation("ascend.compress", ("npu",)),
    "reference": Implementation("reference.compress"),
    "overlay_scan": Implementation("baselines.overlay_scan", ("cpu",)),
    "scatter_pool": Implementation("baselines.scatter_pool", ("cpu",)),
}


@dataclass
class Work:
    """What `compress` has done in this process: the proof that an engine really calls it."""

    calls: int = 0
    tokens: int = 0
    entries: int = 0
    seconds: float = 0.0  # that the calls took; on a CPU until the last byte was written
    uncounted: int = 0  # calls whose entries only the device knows

    def __str__(self) -> str:
        entries = f"wrote {self.entries} entries in {self.seconds:.4f} s"
        if self.uncounted:
            entries = f"wrote {self.entries} entries, not counting {self.uncounted} calls whose entries only the device knows"
            entries += " (nor any call that a captured graph repeats)"
        return f"compress was called {self.calls} times on {self.tokens} tokens and {entries}"


work = Work()

_library = torch.library.Library("dsv4_indexer", "DEF")
_library.define(
    "compress(Tensor kv_score, Tensor ape, Tensor norm_weight, Tensor cos_sin_cache, Tensor positions, "
    "Tensor token_to_req, Tensor inner_state_slot_mapping, Tensor inner_state_block_table, "
    "Tensor(a!) inner_state_cache, Tensor k_slot_mapping, Tensor(b!) k_cache, Tensor(c!)? k_scale_cache=None, *, "
    "float eps=1e-6, str k_format='fp8_pow2', str? impl=None) -> ()"
)


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
    k_scale_cache: Tensor | None = None,
    *,
    eps: float = 1e-6,
    k_format: str = "fp8_pow2",
    impl: str | None = None,
) -> None:
    """Saves the state rows of a batch and stores the K entries whose windows it closes.

    A token at position p with a state slot saves the row `[kv | gate + ape[p % 4]]`. A token with (p + 1) % 4 == 0 and
    a K slot also emits one entry: the rows of positions p-7 .. p are pooled by a softmax per channel over their gates
    (front halves of the first four, back halves of the last four), then RMSNorm, RoPE at position p-3, one rounding to
    bfloat16, quantisation. Rows of this call come from `kv_score`, older ones from the state as it was before the
    call (the pre-image rule), so a token without a state slot still counts in its own call. If a slot occurs twice,
    the last token wins. A padding row has both slots -1; its position and request may be anything that no
    window of a later token in this call asks for.

    Args:
        kv_score: [T, 512] fp32 or bf16, the projection `[kv 256 | gate 256]`, without the positional bias.
        ape: [4, 256] fp32, the gate's positional bias.
        norm_weight: [128] fp32 or bf16, the RMSNorm weight.
        cos_sin_cache: [max_pos, 64] fp32, 32 cosines then 32 sines of each position.
        positions: [T] int64, the absolute position of each token.
        token_to_req: [T] int32, each token's row of `inner_state_block_table`.
        inner_state_slot_mapping: [T] int64, the state row of each token, `page * page_size + row`; -1 for none.
        inner_state_block_table: [R, M] int32, the state page of each `page_size` positions of a request. Page 0 is the
            null page; the last 8 positions before a token that closes a window need another one.
        inner_state_cache: [pages, page_size, 512] fp32 rows; page_size is 2, 4 or 8. Read and written.
        k_slot_mapping: [T] int64, the entry slot of a token that closes a window; -1 for none.
        k_cache: written. `fp8_pow2`: uint8 [pages, 64, 132], a page of `stride(0)` bytes with entry o's values at
            o * 128 and its fp32 scale at 8192 + 4 * o. `fp8_amax`: uint8 [pages, bs, 132], the same with bs entries a
            page. `int8_hadamard`: int8 [pages, bs, 128].
        k_scale_cache: written. [pages, bs] fp32 or fp16 for `int8_hadamard`, None for the fp8 formats.
        eps: RMSNorm epsilon.
        k_format: "fp8_pow2" (power-of-two scale, e4m3fn), "int8_hadamard" (Hadamard rotation, amax / 127 scale) or
            "fp8_amax" (Hadamard rotation, amax / 448 scale, e4m3fn).
        impl: the name of an implementation; None for the default of the tensors' device.

    The caches may be views of one storage with any page stride; only their pages must not overlap.

    Raises:
        ContractError: (a ValueError) the arguments break the contract of contract.py; nothing was written.
        ValueError: `impl` is unknown, or there is none for the device.
    """
    torch.ops.dsv4_indexer.compress(
        kv_score, ape, norm_weight, cos_sin_cache, positions, token_to_req, inner_state_slot_mapping,
        inner_state_block_table, inner_state_cache, k_slot_mapping, k_cache, k_scale_cache,
        eps=eps, k_format=k_format, impl=impl,
    )  # fmt: skip


def prepare(impl: str | None, device: str) -> None:
    """Load an implementation and what it needs now, so that whatever is missing is known before the first call.

    Raises ValueError (`impl` is unknown, or there is none for the device; a setting in the environment is wrong) and
    ImportError (the native library, or something in torch that it needs, is missing), which say what to do.
    """
    module = sys.modules[_implementation(impl, device).__module__]
    if hasattr(module, "prepare"):
        module.prepare()


# torch leaves out the arguments that equal their default, so the defaults are needed here too.
def _dispatch(*args, eps: float = 1e-6, k_format: str = "fp8_pow2", impl: str | None = None) -> None:
    start = time.perf_counter()
    kv_score = args[0]
    tensors = args if len(args) == 12 else (*args, None)
    contract.check_metadata(tensors, k_format)
    run = _implementation(impl, kv_score.device.type)
    if kv_score.shape[0]:
        entries = run(*tensors, eps=eps, k_format=k_format)
        work.entries += entries or 0
        work.uncounted += entries is None
        work.calls += 1
        work.tokens += kv_score.shape[0]
        work.seconds += time.perf_counter() - start


def _fake(*args, eps: float = 1e-6, k_format: str = "fp8_pow2", impl: str | None = None) -> None:
    """Also what torch calls if only some of the tensors are on the meta device: an error, not a call that does nothing."""
    contract.check_metadata(args if len(args) == 12 else (*args, None), k_format)


@functools.cache
def _implementation(name: str | None, device: str) -> Callable[..., int | None]:
    usable = [n for n, i in IMPLEMENTATIONS.items() if not i.devices or device in i.devices]
    if name is None:
        name = next((n for n in usable if IMPLEMENTATIONS[n].devices), None)
    if name not in usable:
        what = "there is no default impl" if name is None else f"impl {name!r} is not one"
        raise ValueError(f"{what} for device {device!r}; available by name: {', '.join(usable)}")
    module, function = IMPLEMENTATIONS[name].function.split(".")
    return getattr(importlib.import_module(f".{module}", __name__), function)


# One Python kernel for every device: it costs about 3 us a call more than a C++ one, and torch.library.custom_op 60.
_library.impl("compress", _dispatch, "CompositeExplicitAutograd")
torch.library.register_fake("dsv4_indexer::compress", _fake, lib=_library)
