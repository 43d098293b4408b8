"""What the op `compress` accepts: geometry, argument table, checks and their messages.

Every implementation obeys this file. Metadata (dtype, shape, stride, device) is checked here for all of them and never
reads a tensor. Values (slots, requests, positions, table entries) are checked by each implementation before it writes
anything, in the order of `Violation`, token by token, and reported with the messages of this file.

Source of the numbers: DeepSeek-V4's configuration and vLLM 0.32's cache specs. csrc/layout.h repeats them for C++.
"""

from enum import IntEnum
from typing import NamedTuple

import torch

from .errors import UserError

HEAD_DIM = 128  # channels of one K entry (index_head_dim)
ROPE_DIM = 64  # its last channels, rotated in interleaved pairs
RATIO = 4  # positions per entry
WINDOW = 2 * RATIO  # positions pooled per entry: the previous group of four and the entry's own
KV_WIDTH = 2 * HEAD_DIM  # one series for the next group's window, one for the row's own
ROW_WIDTH = 2 * KV_WIDTH  # a row is [kv 256 | gate 256]
STATE_PAGES = (2, 4, 8)  # tokens per state page: vLLM has 4, vLLM Ascend 8, 4 or 2
FP8_PAGE_ENTRIES = 64
FP8_SCALE_OFFSET = FP8_PAGE_ENTRIES * HEAD_DIM  # an fp8 page holds 64 x 128 values, then 64 fp32 scales
FP8_ENTRY_BYTES = HEAD_DIM + 4
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero entry finite
FP8_MAX = 448.0
INT8_MAX = 127.0


class ContractError(UserError):
    """The arguments of `compress` break its contract. Nothing was written."""


class Argument(NamedTuple):
    """One row of the argument table. A size is a number or a symbol that must agree across arguments.

    The last `dense` dimensions must be contiguous; the strides of the others are free, so that caches may be views of
    an engine's shared storage.
    """

    name: str
    sizes: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...]
    dense: int = 1


_FLOATS = (torch.float32, torch.bfloat16)
_COMMON = (
    Argument("kv_score", ("T", ROW_WIDTH), _FLOATS),
    Argument("ape", (RATIO, KV_WIDTH), (torch.float32,), dense=2),
    Argument("norm_weight", (HEAD_DIM,), _FLOATS),
    Argument("cos_sin_cache", ("max_pos", ROPE_DIM), (torch.float32,)),
    Argument("positions", ("T",), (torch.int64,)),
    Argument("token_to_req", ("T",), (torch.int32,)),
    Argument("inner_state_slot_mapping", ("T",), (torch.int64,)),
    Argument("inner_state_block_table", ("R", "M"), (torch.int32,)),
    Argument("inner_state_cache", ("pages", "page", ROW_WIDTH), (torch.float32,)),
    Argument("k_slot_mapping", ("T",), (torch.int64,)),
)
K_FORMATS = {
    "fp8_pow2": (
        *_COMMON,
        Argument("k_cache", ("k_pages", FP8_PAGE_ENTRIES, FP8_ENTRY_BYTES), (torch.uint8,), dense=2),
    ),
    "int8_hadamard": (
        *_COMMON,
        Argument("k_cache", ("k_pages", "bs", HEAD_DIM), (torch.int8,)),
        Argument("k_scale_cache", ("k_pages", "bs"), (torch.float32, torch.float16), dense=0),
    ),
    "fp8_amax": (
        *_COMMON,
        Argument("k_cache", ("k_pages", "bs", FP8_ENTRY_BYTES), (torch.uint8,), dense=2),
    ),
}


# A number among the sizes is a symbol bound to itself.
_NUMBERS = {n: n for arguments in K_FORMATS.values() for a in arguments for n in a.sizes if isinstance(n, int)}


def check_metadata(tensors: tuple[torch.Tensor | None, ...], k_format: str) -> None:
    """Checks `tensors`, in the order of the op's signature, against the table of `k_format`."""
    arguments = K_FORMATS.get(k_format)
    if arguments is None:
        raise ContractError(f"k_format is {k_format!r}; the formats are {', '.join(map(repr, K_FORMATS))}")
    if len(arguments) < len(tensors) and tensors[-1] is not None:
        raise ContractError(f"k_scale_cache must be None: the pages of k_format {k_format!r} hold their own scales")
    device = getattr(tensors[0], "device", None)
    bound = dict(_NUMBERS)
    for argument, tensor in zip(arguments, tensors):
        name, sizes, dtypes, dense = argument
        if tensor is None:
            raise ContractError(f"{argument.name} is None, but k_format {k_format!r} needs it")
        if tensor.dtype not in dtypes:
            raise ContractError(f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
        shape = tensor.shape
        if shape != tuple(map(bound.setdefault, sizes, shape)) or len(shape) != len(sizes):
            expected = ", ".join(f"{s}={bound[s]}" if bound.get(s, s) != s else str(s) for s in sizes)
            raise ContractError(f"{name} has shape {list(shape)}; expected [{expected}]")
        if not tensor.is_contiguous() and not _is_dense(tensor, dense):
            raise ContractError(f"{name} has strides {tensor.stride()}; expected its last {dense} dim(s) contiguous")
        if tensor.device != device:
            raise ContractError(f"{name} is on {tensor.device}; expected {device}, the device of kv_score")
    if bound["page"] not in STATE_PAGES:
        raise ContractError(f"inner_state_cache has pages of {bound['page']} tokens; expected one of {STATE_PAGES}")


def _is_dense(tensor: torch.Tensor, dims: int) -> bool:
    shape, strides, expected = tensor.shape, tensor.stride(), 1
    for dim in range(-1, -1 - dims, -1):
        if shape[dim] > 1 and strides[dim] != expected:
            return False
        expected *= shape[dim]
    return True


class Violation(IntEnum):
    """What a value can break, in the order in which the checks of one token run. csrc/cpu/abi.h repeats the codes."""

    STATE_SLOT = 1
    K_SLOT = 2
    POSITION = 3
    REQUEST = 4
    TABLE_COLUMN = 5
    TABLE_ENTRY = 6


_MESSAGES = {
    Violation.STATE_SLOT: (
        "inner_state_slot_mapping[{token}] = {value} (request {request}, position {position}): a slot is -1 for none, "
        "or less than {bound}, the rows of inner_state_cache; take it from the block table of this cache"
    ),
    Violation.K_SLOT: (
        "k_slot_mapping[{token}] = {value} (request {request}, position {position}): a slot is -1 for none, or less "
        "than {bound}, the entries of k_cache; take it from the block table of this cache"
    ),
    Violation.POSITION: (
        "positions[{token}] = {value} (request {request}): the position of a token with a slot is at least 0 and less "
        "than {bound}, the rows of cos_sin_cache; give padding rows slot -1, or build a longer cos_sin_cache"
    ),
    Violation.REQUEST: (
        "token_to_req[{token}] = {value} (position {position}): the request of a token with a slot is at least 0 and "
        "less than {bound}, the rows of inner_state_block_table; give padding rows slot -1"
    ),
    Violation.TABLE_COLUMN: (
        "inner_state_block_table has {bound} columns, but the window that token {token} closes (request {request}, "
        "position {position}) needs column {value} for position {needed}; pass a table as wide as the request is long"
    ),
    Violation.TABLE_ENTRY: (
        "inner_state_block_table has page {value} for position {needed} of request {request}, which the window that "
        "token {token} closes (position {position}) needs: a page is at least 1 (0 is the null page) and less than "
        "{bound}, the pages of inner_state_cache; keep the last 8 positions of every request allocated"
    ),
}


def violation_error(
    code: int, *, token: int, request: int, position: int, value: int, bound: int, needed: int = 0
) -> ContractError:
    """The error for one violation; `needed` is the window position that a table violation is about."""
    return ContractError(_MESSAGES[Violation(code)].format_map(locals()))
