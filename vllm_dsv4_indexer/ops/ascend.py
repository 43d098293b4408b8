"""The op on Ascend NPUs: gives the tensors' addresses to the native library (csrc/ascend), on the
current stream.

Nothing here waits for the device, so values are not checked. A row whose slot is out of range or in
page 0 is not written. A window's row without a page is left out. A plan that does not fit a layer
does nothing. csrc/ascend/tiling.h lists what the kernels can do; anything else is refused.

One condition is stricter than the op's own, and vLLM Ascend keeps it: the slots of a call are
unique, and a slot has one position. csrc/ascend/README.md says why.
"""

import ctypes
import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from .. import contract
from ..contract import Extents, Geometry, Layer, Requests, Step
from .arguments import LAYER_FIELDS, STEP_FIELDS, PackedLayer, step_fields
from .library import load_library

_LIBRARY = "vllm_dsv4_indexer/libdsv4_indexer_ascend.so"
_K_FORMATS = {"int8_hadamard": 1, "fp8_amax": 2, "bf16": 3}
# csrc/ascend/abi.h: struct PlanArguments, struct RunArguments, enum Outcome.
_OF_REQUESTS = (
    "query_start_loc",
    "start_pos",
    "k_table",
    "k_table_stride",
    "k_columns",
    "k_page",
    "slot_mapping",
    "slot_mapping_stride",
)
_OF_A_CALL = ("tokens", "kv_score", "kv_score_stride", "plan")
_OF_A_LAYER = (*Geometry._fields, *LAYER_FIELDS)
PLAN_FIELDS = (*STEP_FIELDS, "plan", "state_only", *_OF_REQUESTS)
RUN_FIELDS = (*_OF_A_CALL, *_OF_A_LAYER)
_PLAN = struct.Struct(f"{len(PLAN_FIELDS)}q")
_CALL = struct.Struct(f"{len(_OF_A_CALL)}q")
_LAYER = struct.Struct(f"{len(_OF_A_LAYER) - 1}qf0q")  # 0q pads it as C does
_REFUSED = 1


def plan(step: Step, extents: Extents, *, algorithm: str = "one_pass") -> Tensor:
    """See `vllm_dsv4_indexer.ops.plan`. It is one launch. The plans of the other algorithms, which
    are for comparison, take all rows from the state."""
    made = _empty_plan(step.positions.shape[0], step.positions.device)
    of_requests = (0,) * len(_OF_REQUESTS)
    arguments = _PLAN.pack(
        *step_fields(step, extents), made.data_ptr(), algorithm != "one_pass", *of_requests
    )
    _launch(native().dsv4_indexer_ascend_plan, made.device, arguments)
    return made


def plan_requests(requests: Requests, tokens: int, extents: Extents, k_page: int) -> Tensor:
    """See `vllm_dsv4_indexer.ops.plan_requests`. It is one launch, and gives the plan of the step
    that `requests.step_of` lists."""
    starts, start_pos, table, k_table, slot_mapping = requests
    made = _empty_plan(tokens, start_pos.device)
    unlisted = dict.fromkeys(("positions", "token_to_req", "state_slots", "k_slots"), 0)
    fields = unlisted | {
        "tokens": tokens,
        "block_table": table.data_ptr(),
        "block_table_stride": table.stride(0),
        "requests": start_pos.shape[0],
        "table_columns": table.shape[1],
        **extents._asdict(),
        "plan": made.data_ptr(),
        "state_only": False,
        "query_start_loc": starts.data_ptr(),
        "start_pos": start_pos.data_ptr(),
        "k_table": k_table.data_ptr(),
        "k_table_stride": k_table.stride(0),
        "k_columns": k_table.shape[1],
        "k_page": k_page,
        **_signs(slot_mapping),
    }
    arguments = _PLAN.pack(*(fields[name] for name in PLAN_FIELDS))
    _launch(native().dsv4_indexer_ascend_plan_requests, made.device, arguments)
    return made


class Bound:
    """A layer's tensors, ready for the library."""

    def __init__(self, layer: Layer, *, eps: float, k_format: str, algorithm: str = "one_pass"):
        geometry = contract.geometry_of(layer.ape, k_format)
        self._arguments = PackedLayer(layer, _K_FORMATS[k_format], eps, _LAYER, geometry)
        self._run = functools.partial(native().dsv4_indexer_ascend_run, algorithm.encode())

    def __call__(self, kv_score: Tensor, plan: Tensor) -> None:
        """Runs the layer. Only the device knows how many entries it writes."""
        if kv_score.dtype is not torch.float32:
            raise contract.ContractError(
                f"kv_score has dtype {kv_score.dtype}; on NPUs the projection gives torch.float32"
            )
        tokens, stride = kv_score.shape[0], kv_score.stride(0)
        call = _CALL.pack(tokens, kv_score.data_ptr(), stride, plan.data_ptr())
        _launch(self._run, kv_score.device, call + self._arguments.packed())


bind = Bound


@functools.cache
def native() -> ctypes.CDLL:
    """The native library, loaded."""
    library = load_library(_LIBRARY, "ascend")
    launch = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    for name, before in (("plan", []), ("plan_requests", []), ("run", [ctypes.c_char_p])):
        function = getattr(library, f"dsv4_indexer_ascend_{name}")
        function.argtypes, function.restype = before + launch, ctypes.c_int64
    return library


def _empty_plan(tokens: int, device: torch.device) -> Tensor:
    return torch.empty(contract.plan_size(tokens), dtype=torch.int64, device=device)


def _signs(slots: Tensor | None) -> dict[str, int]:
    """The fields for `slot_mapping`. The kernel reads signs of int32 alone: of an int64, those of
    its second half."""
    if slots is None:
        return {"slot_mapping": 0, "slot_mapping_stride": 0}
    halves = slots.itemsize // 4
    address = slots.data_ptr() + 4 * (halves - 1)
    return {"slot_mapping": address, "slot_mapping_stride": halves * slots.stride(0)}


def _launch(function: Callable[..., int], device: torch.device, arguments: bytes) -> None:
    """Raises ContractError if the kernels refuse the call, RuntimeError with CANN's message if the
    launch fails."""
    message = ctypes.create_string_buffer(1000)
    outcome = function(arguments, _stream(device), message, len(message))
    if outcome:
        error = contract.ContractError if outcome == _REFUSED else RuntimeError
        raise error(message.value.decode(errors="replace"))


def _stream(device: torch.device) -> int:
    return torch.npu.current_stream(device).npu_stream  # type: ignore[attr-defined]
