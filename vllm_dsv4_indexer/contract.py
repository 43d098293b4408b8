"""What the op accepts: geometry, argument tables, checks and their messages.

Every implementation obeys this file. It checks metadata (dtype, shape, stride, device) for all of
them, without reading a tensor. Each implementation checks values (slots, requests, positions, table
entries) itself, before it writes anything: in the order of `Violation`, token by token, with the
messages of this file.

The numbers come from DeepSeek-V4's configuration and vLLM 0.32's cache specs. csrc/layout.h repeats
them for C++.
"""

import ctypes
import struct
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, get_origin, get_type_hints

import torch
from torch import Tensor

from .errors import UserError

HEAD_DIM = 128  # channels of one K entry (index_head_dim)
ROPE_DIM = 64  # its last channels, rotated in interleaved pairs
RATIO = 4  # positions per entry
WINDOW = 2 * RATIO  # positions pooled per entry: the previous group of four and the entry's own
KV_WIDTH = 2 * HEAD_DIM  # front half for the next group's window, back half for the own group's
ROW_WIDTH = 2 * KV_WIDTH  # a row is [kv 256 | gate 256]
# Tokens per state page, by ratio: vLLM has 4 and 8, vLLM Ascend the others too.
STATE_PAGES = {4: (2, 4, 8), 128: (4, 8, 16, 32)}
FP8_PAGE_ENTRIES = 64
FP8_SCALE_OFFSET = FP8_PAGE_ENTRIES * HEAD_DIM  # 64 x 128 values of a page, then 64 fp32 scales
FP8_ENTRY_BYTES = HEAD_DIM + 4
AMAX_MIN = 1e-4  # keeps the scale of an all-zero entry finite
FP8_MAX = 448.0
INT8_MAX = 127.0
# vLLM 0.32, csrc/cpu/sgl-kernels/compressor.cpp: an entry of the main cache has 448 codes in blocks
# with a scale each, and 64 rotated channels in bf16. Its scales lie behind the page's last entry.
DS_MLA_BLOCK = 64
DS_MLA_CODES = 448
DS_MLA_DATA_BYTES = DS_MLA_CODES + 2 * ROPE_DIM
DS_MLA_ENTRY_BYTES = DS_MLA_DATA_BYTES + DS_MLA_CODES // DS_MLA_BLOCK + 1  # the last byte is zero
DS_MLA_SCALE_MIN = 1e-4


class ContractError(UserError):
    """The arguments of the op break its contract. Nothing was written.

    `request`: the row of the block table that it is about, if it is about one.
    """

    def __init__(self, message: str, request: int | None = None):
        super().__init__(message)
        self.request = request


def window_of(ratio: int) -> int:
    """How many positions an entry pools. With the ratio 4 windows overlap: an entry pools the group
    before its own too."""
    return 2 * ratio if ratio == RATIO else ratio


class Geometry(NamedTuple):
    """What tells the compressors of the model apart. The shape of `ape` says which one it is."""

    head_dim: Annotated[int, "channels of an entry"]
    ratio: Annotated[int, "positions per entry"]

    @property
    def window(self) -> int:
        return window_of(self.ratio)

    @property
    def overlap(self) -> bool:
        return self.window > self.ratio

    @property
    def kv_width(self) -> int:
        """With overlap [front, for the next group's window | back, for the own group's]."""
        return (1 + self.overlap) * self.head_dim

    @property
    def row_width(self) -> int:
        """A row is [kv | gate]."""
        return 2 * self.kv_width

    def __str__(self) -> str:
        return f"head dimension {self.head_dim} and ratio {self.ratio}"


INDEXER = Geometry(HEAD_DIM, RATIO)
# The compressors of DeepSeek-V4, and the formats of the caches that they write.
GEOMETRIES = {
    INDEXER: ("fp8_pow2", "int8_hadamard", "fp8_amax"),
    Geometry(head_dim=512, ratio=4): ("fp8_ds_mla", "bf16"),
    Geometry(head_dim=512, ratio=128): ("fp8_ds_mla", "bf16"),
}


def geometry_for(k_format: str | None, ratio: int) -> Geometry:
    """The first that has this ratio and may write this format."""
    fitting = (
        geometry
        for geometry, k_formats in GEOMETRIES.items()
        if geometry.ratio == ratio and (k_format is None or k_format in k_formats)
    )
    return next(fitting, INDEXER)


class Argument(NamedTuple):
    """What a tensor of the op must be. A size is a number, a number of the Geometry by its name, or
    a symbol that has one value in all arguments.

    The last `dense` dimensions must be contiguous. The others may have any stride, so that a cache
    may be a view of an engine's shared storage.
    """

    sizes: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...]
    meaning: str = ""
    dense: int = 1

    def sized(self, geometry: Geometry) -> "Argument":
        """With the geometry's numbers in the places of their names."""
        return self._replace(sizes=tuple(getattr(geometry, str(s), s) for s in self.sizes))


FLOATS = (torch.float32, torch.bfloat16)
_FP32, _INT32, _INT64 = (torch.float32,), (torch.int32,), (torch.int64,)


def arguments_of(fields: type) -> dict[str, Argument]:
    """The annotations of a NamedTuple's tensors."""
    hints = get_type_hints(fields, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if get_origin(hint) is Annotated}


class Step(NamedTuple):
    """A step's tokens, and where their rows and entries go. It is the same for all layers of a
    cache group."""

    positions: Annotated[Tensor, Argument(("T",), _INT64, "position of each token in its request")]
    token_to_req: Annotated[Tensor, Argument(("T",), _INT32, "row of the block table")]
    inner_state_slot_mapping: Annotated[
        Tensor, Argument(("T",), _INT64, "state row; -1 or in page 0: none")
    ]
    inner_state_block_table: Annotated[Tensor, Argument(("R", "M"), _INT32, "state pages; 0: none")]
    k_slot_mapping: Annotated[
        Tensor, Argument(("T",), _INT64, "entry, at a window's end; -1: none")
    ]

    def closing(self, ratio: int) -> Tensor:
        """The tokens that write an entry."""
        closes = self.positions % ratio == ratio - 1
        return (closes & (self.k_slot_mapping >= 0)).nonzero()[:, 0]


class Layer(NamedTuple):
    """A layer's weights and caches. They are the same in every step. The K caches depend on the
    format: K_FORMATS."""

    ape: Annotated[Tensor, Argument(("ratio", "kv_width"), _FP32, "added to the gate", dense=2)]
    norm_weight: Annotated[Tensor, Argument(("head_dim",), FLOATS, "of RMSNorm")]
    cos_sin_cache: Annotated[Tensor, Argument(("max_pos", ROPE_DIM), _FP32, "32 cosines, 32 sines")]
    inner_state_cache: Annotated[
        Tensor, Argument(("pages", "page", "row_width"), _FP32, "rows [kv | gate + ape]")
    ]
    k_cache: Tensor
    k_scale_cache: Tensor | None = None


class Extents(NamedTuple):
    """The sizes of the caches and tables that a step is planned for. They bound its values."""

    state_pages: Annotated[int, "pages of inner_state_cache"]
    state_page: Annotated[int, "tokens of a state page, one of STATE_PAGES[ratio]"]
    k_entries: Annotated[int, "entries of k_cache: pages times entries of a page"]
    max_pos: Annotated[int, "rows of cos_sin_cache"]

    @staticmethod
    def of(layer: Layer) -> "Extents":
        state_pages, state_page, _ = layer.inner_state_cache.shape
        k_entries = layer.k_cache.shape[0] * layer.k_cache.shape[1]
        return Extents(state_pages, state_page, k_entries, layer.cos_sin_cache.shape[0])


class Requests(NamedTuple):
    """A step's requests and their pages in two caches, as vLLM Ascend's metadata have them.

    Requests of a graph's padding have no tokens, or block 0 in their tables.
    """

    query_start_loc: Annotated[
        Tensor, Argument(("R + 1",), _INT32, "first token of each request, and their end")
    ]
    start_pos: Annotated[Tensor, Argument(("R",), _INT32, "position of a request's first token")]
    state_block_table: Annotated[Tensor, Argument(("R", "M"), _INT32, "state pages; 0: none")]
    k_block_table: Annotated[Tensor, Argument(("R", "K"), _INT32, "K pages; 0: none")]
    slot_mapping: Annotated[
        Tensor | None,
        Argument(("slots",), _INT32 + _INT64, "at least T; -1: the token writes nothing", dense=0),
    ] = None


class Call(NamedTuple):
    """The tensors of `compress`, in the order of its signature: `kv_score`, a Layer and a Step."""

    kv_score: Tensor
    ape: Tensor
    norm_weight: Tensor
    cos_sin_cache: Tensor
    positions: Tensor
    token_to_req: Tensor
    inner_state_slot_mapping: Tensor
    inner_state_block_table: Tensor
    inner_state_cache: Tensor
    k_slot_mapping: Tensor
    k_cache: Tensor
    k_scale_cache: Tensor | None = None

    @property
    def step(self) -> Step:
        return Step(*(getattr(self, name) for name in Step._fields))

    @property
    def layer(self) -> Layer:
        return Layer(*(getattr(self, name) for name in Layer._fields))


_KV_SCORE = {"kv_score": Argument(("T", "row_width"), FLOATS, "[kv | gate], without ape")}
_STEP, _REQUESTS = arguments_of(Step), arguments_of(Requests)
K_FORMATS = {
    "fp8_pow2": {
        "k_cache": Argument(
            ("k_pages", FP8_PAGE_ENTRIES, FP8_ENTRY_BYTES),
            (torch.uint8,),
            "a page of bytes: 64 entries of 128 codes e4m3fn, then their fp32 scales",
            dense=2,
        )
    },
    "int8_hadamard": {
        "k_cache": Argument(("k_pages", "bs", HEAD_DIM), (torch.int8,), "codes"),
        "k_scale_cache": Argument(
            ("k_pages", "bs"), (torch.float32, torch.float16), "scales", dense=0
        ),
    },
    "fp8_amax": {
        "k_cache": Argument(
            ("k_pages", "bs", FP8_ENTRY_BYTES),
            (torch.uint8,),
            "a page of bytes: bs entries of 128 codes e4m3fn, then their fp32 scales",
            dense=2,
        )
    },
    "fp8_ds_mla": {
        "k_cache": Argument(
            ("k_pages", "bs", DS_MLA_ENTRY_BYTES),
            (torch.uint8,),
            "a page of bytes: bs entries of 448 codes e4m3fn and 64 bf16, then their scales: 7 "
            "exponents of two plus 127, and a zero",
            dense=2,
        )
    },
    # vllm-ascend 0.30.0rc2, DSAAttention.get_kv_cache_spec: the main caches on A2 and A3.
    "bf16": {"k_cache": Argument(("k_pages", "bs", "head_dim"), (torch.bfloat16,), "channels")},
}
# The tensors of a call, but for those of its step.
_TENSORS = {
    (geometry, k_format): {
        name: argument.sized(geometry)
        for name, argument in (_KV_SCORE | arguments_of(Layer) | K_FORMATS[k_format]).items()
    }
    for geometry, k_formats in GEOMETRIES.items()
    for k_format in k_formats
}


def arguments_of_call(k_format: str, geometry: Geometry = INDEXER) -> dict[str, Argument]:
    """What each tensor of a Call must be."""
    return _TENSORS[geometry, k_format] | _STEP


# ---- the plan ------------------------------------------------------------------------------------


PLAN_LAYOUT = 0x4453563401  # "DSV4", 1: changes when the sections do
STATE_ONLY_LAYOUT = -PLAN_LAYOUT  # a plan for the baselines: all sources are rows of the state
PLAN_HEADER = 16  # numbers, of which PlanHeader names the first
# With one number per token; then come the sources, as many per token as a window has rows. Only
# EARLY windows have them: elsewhere that section is address space that need not be touched.
PLAN_SECTIONS = 5
# An EARLY window is pooled before any row is saved, a LATE one from rows of its own call alone.
NO_WINDOW, EARLY, LATE = 0, 1, 2
# A source is a token of the call, or MASKED, or `row_source(slot)`, a row of the state as it was
# before the call.
MASKED = -1


_Planned = Annotated[int, "of the Extents that the step was planned for"]


class PlanHeader(NamedTuple):
    """The first numbers of a plan. csrc/plan.h repeats them."""

    layout: Annotated[int, "PLAN_LAYOUT"]
    tokens: Annotated[int, "T"]
    entries: Annotated[int, "windows that the step closes; -1 if only the device knows"]
    early: Annotated[int, "how many of them are EARLY; -1 if only the device knows"]
    unique: Annotated[int, "1 if no slot occurs twice: tokens may be written in any order"]
    saved: Annotated[int, "tokens whose row is saved; -1 if only the device knows"]
    shared: Annotated[int, "rows of windows that another request's token holds; -1 likewise"]
    state_pages: _Planned
    state_page: _Planned
    k_entries: _Planned
    max_pos: _Planned

    @staticmethod
    def of(plan: Tensor) -> "PlanHeader":
        """Of a plan on the host. Read at its address: a plan is made in each step, and a slice of a
        tensor takes twice as long."""
        return PlanHeader(*_HEADER.unpack(ctypes.string_at(plan.data_ptr(), _HEADER.size)))


_HEADER = struct.Struct(f"{len(PlanHeader._fields)}q")


class Plan(NamedTuple):
    """The sections of a plan, as views of it.

    A plan is one int64 tensor, so that a graph can replay it from one persistent buffer and a
    layer's call has one argument for it.
    """

    header: Annotated[Tensor, Argument((PLAN_HEADER,), _INT64, "a PlanHeader, then zeros")]
    positions: Annotated[Tensor, Argument(("T",), _INT64, "of a padding row anything")]
    requests: Annotated[Tensor, Argument(("T",), _INT64, "of a padding row anything")]
    state_slots: Annotated[Tensor, Argument(("T",), _INT64, "the row to save, -1 for none")]
    k_slots: Annotated[
        Tensor, Argument(("T",), _INT64, "the entry of the window that the token closes, or -1")
    ]
    windows: Annotated[Tensor, Argument(("T",), _INT64, "NO_WINDOW, EARLY or LATE")]
    sources: Annotated[
        Tensor, Argument(("T", "window"), _INT64, "where an EARLY window's rows come from")
    ]

    @staticmethod
    def of(tensor: Tensor, ratio: int = RATIO) -> "Plan":
        header, rest = tensor[:PLAN_HEADER], tensor[PLAN_HEADER:]
        window = window_of(ratio)
        tokens = len(rest) // (PLAN_SECTIONS + window)
        *sections, sources = rest.split([tokens] * PLAN_SECTIONS + [tokens * window])
        return Plan._make((header, *sections, sources.view(tokens, window)))


def row_source(slot: Any) -> Any:
    """The source that stands for the state row `slot`; and the slot of such a source."""
    return -2 - slot


def plan_size(tokens: int, ratio: int = RATIO) -> int:
    """How many int64 a plan for `tokens` has."""
    return PLAN_HEADER + (PLAN_SECTIONS + window_of(ratio)) * tokens


def check_plan_tensor(plan: Tensor, tokens: int, device: torch.device, ratio: int = RATIO) -> None:
    """Checks a plan without reading it: its device, dtype and length. Raises ContractError."""
    if plan.device != device:
        raise ContractError(f"plan is on {plan.device}; expected {device}, the device of the layer")
    if plan.dtype is not torch.int64 or plan.dim() != 1 or not plan.is_contiguous():
        raise ContractError(
            f"plan is {plan.dtype} {list(plan.shape)}; expected the tensor that `plan` returned"
        )
    expected = plan_size(tokens, ratio)
    if len(plan) != expected:
        raise ContractError(
            f"plan has {len(plan)} numbers; expected {expected} for {tokens} tokens and ratio "
            f"{ratio}: make a plan for each step, and for each ratio"
        )


def check_plan_header(
    plan: Tensor, tokens: int, extents: Extents, layout: int = PLAN_LAYOUT
) -> None:
    """Checks that a plan on the host fits: made for this implementation, for `tokens`, and for
    caches that are no larger than `extents`. Raises ContractError."""
    header = PlanHeader.of(plan)
    if header.layout != layout:
        raise ContractError(
            "plan was not made for this implementation by this version's `plan`: make the plan "
            "again"
        )
    if header.tokens != tokens:
        raise ContractError(
            f"plan is for {header.tokens} tokens, and kv_score has {tokens}: make a plan for each "
            "step"
        )
    for name, most in extents._asdict().items():
        planned = getattr(header, name)
        if planned > most or (name == "state_page" and planned != most):
            raise ContractError(
                f"plan is for caches of {name} {planned}, but the layer's have {most}: plan with "
                "the layer's extents"
            )


# ---- metadata ------------------------------------------------------------------------------------


# A number among the sizes counts as a symbol that has its own value.
_NUMBERS: dict[int | str, int] = {
    n: n
    for arguments in _TENSORS.values()
    for argument in arguments.values()
    for n in argument.sizes
    if isinstance(n, int)
}


def check_call(call: Call, k_format: str) -> Geometry:
    """Checks the tensors of `compress`, and says of which compressor they are. Raises
    ContractError, as all checks here do."""
    return _check_layer(call, k_format, _STEP)


def check_step(step: Step) -> None:
    """Checks the tensors of `plan`."""
    _check(step._asdict(), _STEP)


def check_extents(extents: Extents, ratio: int = RATIO) -> None:
    """Checks the numbers that a step is planned for."""
    if ratio not in STATE_PAGES:
        raise ContractError(f"ratio is {ratio}; expected one of {tuple(STATE_PAGES)}")
    if extents.state_page not in STATE_PAGES[ratio]:
        raise ContractError(
            f"state_page is {extents.state_page}; expected one of {STATE_PAGES[ratio]}"
        )
    for name, number in extents._asdict().items():
        if number < 0:
            raise ContractError(f"{name} is {number}; expected at least 0")


def check_requests(requests: Requests, tokens: int) -> None:
    """Checks the tensors of `plan_requests`."""
    _check(
        {name: tensor for name, tensor in requests._asdict().items() if tensor is not None},
        _REQUESTS,
    )
    if len(requests.query_start_loc) != len(requests.start_pos) + 1:
        found, count = len(requests.query_start_loc), len(requests.start_pos)
        raise ContractError(
            f"query_start_loc has {found} elements; expected {count + 1}, one more than start_pos"
        )
    if requests.slot_mapping is not None and len(requests.slot_mapping) < tokens:
        raise ContractError(
            f"slot_mapping has {len(requests.slot_mapping)} elements for {tokens} tokens"
        )


def check_layer(layer: Layer, k_format: str) -> Geometry:
    """Checks a layer's tensors, and says of which compressor they are."""
    return _check_layer(layer, k_format, {})


def check_kv_score(kv_score: Tensor, device: torch.device, geometry: Geometry = INDEXER) -> None:
    """Checks a layer's projection."""
    _check({"kv_score": kv_score}, {"kv_score": _KV_SCORE["kv_score"].sized(geometry)})
    if kv_score.device != device:
        raise ContractError(
            f"kv_score is on {kv_score.device}; expected {device}, the device of the layer"
        )


def _check_scales(k_scale_cache: Tensor | None, k_format: str) -> None:
    if k_format not in K_FORMATS:
        raise ContractError(
            f"k_format is {k_format!r}; the formats are {', '.join(map(repr, K_FORMATS))}"
        )
    if k_scale_cache is not None and "k_scale_cache" not in K_FORMATS[k_format]:
        raise ContractError(
            f"k_scale_cache must be None: the pages of k_format {k_format!r} hold their own scales"
        )


def _check_layer(tensors: Layer | Call, k_format: str, others: dict[str, Argument]) -> Geometry:
    _check_scales(tensors.k_scale_cache, k_format)
    geometry = geometry_of(tensors.ape, k_format)
    _check(tensors._asdict(), _TENSORS[geometry, k_format] | others)
    page, pages = tensors.inner_state_cache.shape[1], STATE_PAGES[geometry.ratio]
    if page not in pages:
        raise ContractError(
            f"inner_state_cache has pages of {page} tokens; expected one of {pages}"
        )
    return geometry


def geometry_of(ape: Tensor, k_format: str) -> Geometry:
    """The compressor whose `ape` has this shape, if its cache may have this format."""
    for geometry, k_formats in GEOMETRIES.items():
        if ape.shape == (geometry.ratio, geometry.kv_width) and k_format in k_formats:
            return geometry
    expected = " or ".join(
        f"[{geometry.ratio}, {geometry.kv_width}] with {', '.join(map(repr, k_formats))}"
        for geometry, k_formats in GEOMETRIES.items()
    )
    raise ContractError(
        f"ape has shape {list(ape.shape)} and k_format is {k_format!r}; expected {expected}"
    )


def _check(tensors: dict[str, Tensor | None], table: dict[str, Argument]) -> None:
    bound, first = dict(_NUMBERS), next(iter(tensors))
    device = getattr(tensors[first], "device", None)
    for name, tensor in tensors.items():
        if name not in table:
            continue
        sizes, dtypes, _, dense = table[name]
        if tensor is None:
            raise ContractError(f"{name} is None, but the op and this k_format need it")
        if tensor.dtype not in dtypes:
            raise ContractError(
                f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}"
            )
        shape = tensor.shape
        if shape != tuple(map(bound.setdefault, sizes, shape)) or len(shape) != len(sizes):
            expected = ", ".join(
                f"{s}={bound[s]}" if bound.get(s, s) != s else str(s) for s in sizes
            )
            raise ContractError(f"{name} has shape {list(shape)}; expected [{expected}]")
        if not tensor.is_contiguous() and not _is_dense(tensor, dense):
            raise ContractError(
                f"{name} has strides {tensor.stride()}; expected its last {dense} dim(s) contiguous"
            )
        if tensor.device != device:
            raise ContractError(
                f"{name} is on {tensor.device}; expected {device}, the device of {first}"
            )


def _is_dense(tensor: torch.Tensor, dims: int) -> bool:
    shape, strides, expected = tensor.shape, tensor.stride(), 1
    for dim in range(-1, -1 - dims, -1):
        if shape[dim] > 1 and strides[dim] != expected:
            return False
        expected *= shape[dim]
    return True


class Violation(IntEnum):
    """What can be wrong with a value, in the order in which a token's values are checked.
    csrc/cpu/abi.h repeats the codes."""

    STATE_SLOT = 1
    K_SLOT = 2
    POSITION = 3
    REQUEST = 4
    TABLE_COLUMN = 5
    TABLE_ENTRY = 6


_MESSAGES = {
    Violation.STATE_SLOT: (
        "inner_state_slot_mapping[{token}] = {value} (request {request}, position {position}): a "
        "slot is -1 for none, or less than {bound}, the rows of inner_state_cache; take it from "
        "the block table of this cache"
    ),
    Violation.K_SLOT: (
        "k_slot_mapping[{token}] = {value} (request {request}, position {position}): a slot is -1 "
        "for none, or less than {bound}, the entries of k_cache; take it from the block table of "
        "this cache"
    ),
    Violation.POSITION: (
        "positions[{token}] = {value} (request {request}): the position of a token with a slot is "
        "at least 0 and less than {bound}, the rows of cos_sin_cache; give padding rows slot -1, "
        "or build a longer cos_sin_cache"
    ),
    Violation.REQUEST: (
        "token_to_req[{token}] = {value} (position {position}): the request of a token with a slot "
        "is at least 0 and less than {bound}, the rows of inner_state_block_table; give padding "
        "rows slot -1"
    ),
    Violation.TABLE_COLUMN: (
        "inner_state_block_table has {bound} columns, but the window that token {token} closes "
        "(request {request}, position {position}) needs column {value} for position {needed}; pass "
        "a table as wide as the request is long"
    ),
    Violation.TABLE_ENTRY: (
        "inner_state_block_table has page {value} for position {needed} of request {request}, "
        "which the window that token {token} closes (position {position}) needs: a page is at "
        "least 1 (0 is the null page) and less than {bound}, the pages of inner_state_cache; keep "
        "the last {window} positions of every request allocated"
    ),
}


def violation_error(
    code: int,
    *,
    token: int,
    request: int,
    position: int,
    value: int,
    bound: int,
    needed: int = 0,
    window: int = WINDOW,
) -> ContractError:
    """The error for one violation. `needed`: the position of the window's row that the block table
    does not have."""
    return ContractError(_MESSAGES[Violation(code)].format_map(locals()), request)
