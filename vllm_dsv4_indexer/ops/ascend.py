"""`plan` and `bind` on Ascend NPUs: tensors' addresses for the native library (csrc/ascend), on the
current stream.

Nothing here waits for the device, so values are not checked: a row whose slot is out of range or in
page 0 is not written, a window's row without a page counts for nothing, and a plan for other caches
does nothing. What the kernels cannot do is refused with the table of csrc/ascend/tiling.h. One
condition beyond the op's own, kept by vLLM Ascend (csrc/ascend/README.md says why): a slot belongs to
one position of one sequence, so that the slots of a call are unique.
"""

import ctypes
import functools
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import contract
from ..contract import Extents, Layer, Step
from .library import library_path
from .requests import Requests

_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_ascend.so"
_K_FORMATS = {"int8_hadamard": 1, "fp8_amax": 2}
_REFUSED = 1  # csrc/ascend/abi.h, `enum Outcome`


class PlanArguments(NamedTuple):
    """csrc/ascend/abi.h, `struct PlanArguments`."""

    tokens: int
    plan: int
    state_pages: int
    state_page: int
    k_entries: int
    max_pos: int
    state_table: int
    state_table_stride: int
    requests: int
    state_columns: int
    positions: int = 0
    token_to_req: int = 0
    state_slots: int = 0
    k_slots: int = 0
    all_from_state: int = 0
    query_start_loc: int = 0
    start_pos: int = 0
    k_table: int = 0
    k_table_stride: int = 0
    k_columns: int = 0
    k_page: int = 0
    slot_mapping: int = 0
    slot_mapping_stride: int = 0


class RunArguments(NamedTuple):
    """csrc/ascend/abi.h, `struct RunArguments`."""

    tokens: int
    kv_score: int
    kv_score_stride: int
    plan: int
    ape: int
    norm_weight: int
    norm_weight_is_bf16: int
    cos_sin: int
    cos_sin_stride: int
    max_pos: int
    state: int
    state_page_stride: int
    state_row_stride: int
    state_pages: int
    state_page: int
    k_cache: int
    k_page_stride: int
    k_entry_stride: int
    k_pages: int
    k_page: int
    k_scale: int
    k_scale_page_stride: int
    k_scale_entry_stride: int
    k_scale_is_fp16: int
    k_format: int
    eps: float


def _layout(arguments: type[NamedTuple]) -> str:
    """The fields for `struct`: int64 and addresses, and floats; padded as C does."""
    types = {int: "q", float: "f"}
    return "".join(types[field] for field in arguments.__annotations__.values()) + "0q"


_PLAN = struct.Struct(_layout(PlanArguments))
_OF_A_CALL = struct.Struct("4q")  # the first fields of RunArguments; the others are a layer's
_OF_A_LAYER = struct.Struct(_layout(RunArguments)[4:])
# csrc/ascend/abi.h, `kAbi`: another number for other fields, or another arrangement of the plan.
ABI = zlib.crc32(
    repr([(a.__name__, a._fields, _layout(a)) for a in (PlanArguments, RunArguments)]).encode()
    + repr((contract.PLAN_LAYOUT, contract.PLAN_HEADER, contract.PLAN_WIDTH)).encode()
)


def plan(step: Step, extents: Extents, *, algorithm: str = "one_pass") -> Tensor:
    """See `vllm_dsv4_indexer.ops.plan`; one launch. The other algorithms' plans have all rows in the
    state, and all windows early."""
    made = _empty_plan(len(step.positions), step.positions.device)
    arguments = PlanArguments(
        *_of_any_plan(made, step.inner_state_block_table, extents),
        positions=step.positions.data_ptr(),
        token_to_req=step.token_to_req.data_ptr(),
        state_slots=step.inner_state_slot_mapping.data_ptr(),
        k_slots=step.k_slot_mapping.data_ptr(),
        all_from_state=algorithm != "one_pass",
    )
    _launch(native().dsv4_indexer_ascend_plan, made.device, _PLAN.pack(*arguments))
    return made


def plan_requests(requests: Requests, tokens: int, extents: Extents, k_page: int) -> Tensor:
    """The plan of a step that is told by its requests (`requests.step_of` says how); one launch."""
    made = _empty_plan(tokens, requests.start_pos.device)
    table = requests.k_block_table
    arguments = PlanArguments(
        *_of_any_plan(made, requests.state_block_table, extents),
        query_start_loc=requests.query_start_loc.data_ptr(),
        start_pos=requests.start_pos.data_ptr(),
        k_table=table.data_ptr(),
        k_table_stride=table.stride(0),
        k_columns=table.shape[1],
        k_page=k_page,
        **_mapping(requests.slot_mapping),
    )._replace(requests=len(requests.start_pos))
    _launch(native().dsv4_indexer_ascend_plan_requests, made.device, _PLAN.pack(*arguments))
    return made


def bind(
    layer: Layer, *, eps: float, k_format: str, algorithm: str = "one_pass"
) -> Callable[[Tensor, Tensor], None]:
    """See `vllm_dsv4_indexer.ops.bind`. How many entries a call writes only the device knows."""
    if k_format not in _K_FORMATS:
        formats = ", ".join(_K_FORMATS)
        raise contract.ContractError(f"k_format {k_format!r} has no kernel for NPUs; there are {formats}")
    of_the_layer = _OF_A_LAYER.pack(*_layer_fields(layer, k_format, eps))
    run = functools.partial(native().dsv4_indexer_ascend_run, algorithm.encode())

    def call(kv_score: Tensor, plan: Tensor) -> None:
        if kv_score.dtype is not torch.float32:
            raise contract.ContractError(
                f"kv_score has dtype {kv_score.dtype}; on NPUs the projection's output is torch.float32"
            )
        of_the_call = _OF_A_CALL.pack(
            kv_score.shape[0], kv_score.data_ptr(), kv_score.stride(0), plan.data_ptr()
        )
        _launch(run, layer.ape.device, of_the_call + of_the_layer)  # `layer` keeps the addresses alive

    return call


def _empty_plan(tokens: int, device: torch.device) -> Tensor:
    return torch.empty(contract.plan_size(tokens), dtype=torch.int64, device=device)


def _of_any_plan(made: Tensor, table: Tensor, extents: Extents) -> tuple[int, ...]:
    """The fields of PlanArguments up to `state_columns`."""
    tokens = (len(made) - contract.PLAN_HEADER) // contract.PLAN_WIDTH
    return tokens, made.data_ptr(), *extents, table.data_ptr(), table.stride(0), *table.shape


def _mapping(slots: Tensor | None) -> dict[str, int]:
    """Only signs are looked at: an int64 is read as the upper of its two int32, which lie the lower
    one first."""
    if slots is None:
        return {}
    words = slots.itemsize // 4
    address = slots.data_ptr() + 4 * (words - 1)
    return {"slot_mapping": address, "slot_mapping_stride": words * slots.stride(0)}


def _layer_fields(layer: Layer, k_format: str, eps: float) -> tuple[int | float, ...]:
    """The fields of RunArguments from `ape` on."""
    norm, cos_sin, state, keys = layer.norm_weight, layer.cos_sin_cache, layer.inner_state_cache, layer.k_cache
    scale = layer.k_scale_cache
    if scale is None:  # an fp8 page is opaque
        k_entry_stride, scales = contract.HEAD_DIM, (0, 0, 0, 0)
    else:
        k_entry_stride = keys.stride(1)
        scales = (scale.data_ptr(), *scale.stride(), scale.dtype is torch.float16)
    return (
        layer.ape.data_ptr(), norm.data_ptr(), norm.dtype is torch.bfloat16,
        cos_sin.data_ptr(), cos_sin.stride(0), cos_sin.shape[0],
        state.data_ptr(), *state.stride()[:2], *state.shape[:2],
        keys.data_ptr(), keys.stride(0), k_entry_stride, *keys.shape[:2],
        *scales, _K_FORMATS[k_format], eps,
    )  # fmt: skip


def _launch(function: Callable[..., int], device: torch.device, arguments: bytes) -> None:
    """Raises ContractError for what is refused, and RuntimeError with what CANN says of the launch."""
    message = ctypes.create_string_buffer(1000)
    outcome = function(arguments, _stream(device), message, len(message))
    if outcome:
        error = contract.ContractError if outcome == _REFUSED else RuntimeError
        raise error(message.value.decode(errors="replace"))


@functools.cache
def native() -> ctypes.CDLL:
    """The native library, loaded."""
    path = library_path(_LIBRARY)
    library = ctypes.CDLL(str(path))
    if _abi_of(library) != ABI:
        raise ImportError(f"{path} has another interface than this package; build and install it again")
    launch = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    for name, more in (("plan", []), ("plan_requests", []), ("run", [ctypes.c_char_p])):
        function = getattr(library, f"dsv4_indexer_ascend_{name}")
        function.argtypes, function.restype = more + launch, ctypes.c_int64
    return library


def _abi_of(library: ctypes.CDLL) -> int | None:
    """None: a library from before there was such a number."""
    if not hasattr(library, "dsv4_indexer_ascend_abi"):
        return None
    library.dsv4_indexer_ascend_abi.restype = ctypes.c_int64
    return library.dsv4_indexer_ascend_abi()


def _stream(device: torch.device) -> int:
    return torch.npu.current_stream(device).npu_stream
