"""Records calls of the op, with what they store, for replay.cpp."""

import random
import struct

import torch

from batches import Batch, make_batch, random_case
from vllm_dsv4_indexer.contract import GEOMETRIES, INDEXER, Extents, Geometry
from vllm_dsv4_indexer.ops import cpu
from vllm_dsv4_indexer.ops.arguments import kv_score_fields, layer_fields, step_fields

# The algorithms, and "one pass" once more with all its stores around the caches.
ALGORITHMS = {name: name for name in cpu.ALGORITHMS} | {"one_pass_past_cache": "one_pass"}
# Each of them for each compressor that it serves.
CALLS = [(algorithm, INDEXER) for algorithm in ALGORITHMS] + [
    (algorithm, geometry)
    for geometry in GEOMETRIES
    for algorithm in ("one_pass", "one_pass_past_cache")
    if geometry != INDEXER
]


def arbitrary_batch(seed: int, geometry: Geometry = INDEXER) -> Batch:
    """A random batch, some of whose rows hold NaN, infinity or gates that underflow, have no slot,
    or share one."""
    pick = random.Random(seed)
    native = [k_format for k_format in GEOMETRIES[geometry] if k_format in cpu.K_FORMATS]
    batch = make_batch(
        **random_case(pick, geometry)
        | {
            "norm_dtype": pick.choice((torch.float32, torch.bfloat16)),
            "k_format": pick.choice(native),
            "scale_dtype": pick.choice((torch.float32, torch.float16)),
        }
    )
    tokens = int((batch.inner_state_slot_mapping >= 0).sum())  # the rest is padding

    def some() -> list[int]:
        return pick.sample(range(tokens), pick.randrange(min(tokens, 4)))

    batch.kv_score[some()] = torch.nan
    batch.kv_score[some(), : geometry.kv_width] = torch.inf
    batch.kv_score[some(), geometry.kv_width :] *= 300
    for slots in (batch.inner_state_slot_mapping, batch.k_slot_mapping):
        slots[some()] = -1
        if pick.random() < 0.2:
            slots[some()] = slots[pick.randrange(tokens)].clone()
    return batch


def record(batch: Batch, algorithm: str) -> bytes:
    """The call, and what this process's library makes of it: see replay.cpp."""
    arguments, before = _image(batch)
    expected = ALGORITHMS[algorithm]
    rule = cpu.ROW_RULE if expected == "one_pass" else cpu.STATE_ONLY
    plan = cpu.plan(batch.call.step, Extents.of(batch.call.layer), batch.geometry.ratio, rule)
    bound = cpu.bind(batch.call.layer, eps=batch.eps, k_format=batch.k_format, algorithm=expected)
    entries = bound(batch.kv_score, plan)
    sizes = [len(array) for array in before]
    numbers = struct.pack(f"{3 + len(sizes)}q", entries, entries, len(sizes), *sizes)
    which = algorithm.encode().ljust(32, b"\0") + struct.pack("2q", *batch.geometry)
    return b"".join([which, arguments, numbers, *before, *_image(batch)[1]])


def _image(batch: Batch) -> tuple[bytes, list[bytes]]:
    """The batch's arguments, with places where addresses belong (calls.h), and its arrays."""
    arrays, numbers, places = [], {}, {}
    for tensor in batch.call:
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in numbers:
            numbers[storage.data_ptr()] = len(arrays)
            arrays.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes())
        array, offset = numbers[storage.data_ptr()], tensor.data_ptr() - storage.data_ptr()
        places[tensor.data_ptr()] = (array + 1) << 32 | offset
    structs = (
        (cpu.STEP, step_fields(batch.call.step, Extents.of(batch.call.layer))),
        (cpu.LAYER, layer_fields(batch.call.layer, cpu.K_FORMATS[batch.k_format], batch.eps)),
        (cpu.KV_SCORE, kv_score_fields(batch.kv_score)),
    )
    packed = (
        form.pack(*(places.get(field, field) for field in fields)) for form, fields in structs
    )
    return b"".join(packed), arrays
