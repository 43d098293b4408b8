"""The op built for aarch64 and run under emulation stores the bytes that it stores on this CPU.

`make test-aarch64` builds what this needs and runs it. Its name keeps it out of `pytest tests`,
where it could only be skipped on machines without a cross compiler and an emulator.
"""

import operator
import random
import subprocess
from pathlib import Path

import pytest
import torch

from batches import Batch, make_batch, random_case
from vllm_dsv4_indexer.contract import KV_WIDTH, Extents
from vllm_dsv4_indexer.ops import cpu
from vllm_dsv4_indexer.ops.arguments import kv_score_fields, layer_fields, step_fields

DRIVER = Path(__file__).parents[2] / "build/aarch64/driver"
EMULATED = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", DRIVER)
EPS = 1e-6


def arbitrary_batch(seed: int) -> Batch:
    """A random batch, some of whose rows hold NaN, infinity or gates that underflow, have no slot,
    or share one."""
    pick = random.Random(seed)
    batch = make_batch(
        **random_case(pick),
        norm_dtype=pick.choice((torch.float32, torch.bfloat16)),
        k_format=pick.choice(("fp8_pow2", "int8_hadamard")),  # those with native code for CPUs
        scale_dtype=pick.choice((torch.float32, torch.float16)),
    )
    tokens = int((batch.inner_state_slot_mapping >= 0).sum())  # the rest is padding

    def some() -> list[int]:
        return pick.sample(range(tokens), pick.randrange(min(tokens, 4)))

    batch.kv_score[some()] = torch.nan
    batch.kv_score[some(), :KV_WIDTH] = torch.inf
    batch.kv_score[some(), KV_WIDTH:] *= 300
    for slots in (batch.inner_state_slot_mapping, batch.k_slot_mapping):
        slots[some()] = -1
        if pick.random() < 0.2:
            slots[some()] = slots[pick.randrange(tokens)].clone()
    return batch


def image(batch: Batch) -> tuple[bytes, bytes]:
    """The batch's arguments, with offsets where addresses belong, and the memory that they are
    offsets into."""
    memory, storages, offsets = bytearray(), {}, {}
    for tensor in batch.call:
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = len(memory)
            memory += torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
            memory += bytes(-len(memory) % 64)
        offsets[tensor.data_ptr()] = (
            storages[storage.data_ptr()] + tensor.data_ptr() - storage.data_ptr()
        )
    structs = (
        (cpu.STEP, step_fields(batch.call.step, Extents.of(batch.call.layer))),
        (cpu.LAYER, layer_fields(batch.call.layer, cpu.K_FORMATS[batch.k_format], EPS)),
        (cpu.KV_SCORE, kv_score_fields(batch.kv_score)),
    )
    packed = (
        struct.pack(*(offsets.get(field, field) for field in fields)) for struct, fields in structs
    )
    return b"".join(packed), bytes(memory)


def assert_stores_the_same_emulated(batch: Batch, algorithm: str, case: str) -> None:
    arguments, memory = image(batch)
    command = (*EMULATED, algorithm, str(len(memory)))
    stored = subprocess.run(
        command, input=arguments + memory, stdout=subprocess.PIPE, check=True
    ).stdout
    bound = cpu.bind(batch.call.layer, eps=EPS, k_format=batch.k_format, algorithm=algorithm)
    rule = cpu.ROW_RULE if algorithm == "one_pass" else cpu.STATE_ONLY
    entries = bound(batch.kv_score, cpu.plan(batch.call.step, Extents.of(batch.call.layer), rule))
    expected = entries.to_bytes(8, "little") + image(batch)[1]
    same = (
        stored == expected
    )  # not in the assertion: pytest would write out what differs in megabytes
    assert same, f"{sum(map(operator.ne, stored, expected))} bytes differ: {case}, {algorithm}"


@pytest.mark.parametrize("algorithm", cpu.ALGORITHMS)
@pytest.mark.parametrize("seed", range(100))
def test_random_calls_store_the_same_bytes_on_aarch64(seed, algorithm):
    assert_stores_the_same_emulated(arbitrary_batch(seed), algorithm, f"arbitrary_batch({seed})")


@pytest.mark.parametrize("seed", range(9))
def test_no_last_bit_of_the_arithmetic_differs_on_aarch64(seed):
    """Such a bit shows once in thousands of entries, where it turns a rounding to bfloat16 and so
    an int8 scale."""
    batch = make_batch([(0, 500)] * 32, k_format="int8_hadamard", seed=seed)
    assert_stores_the_same_emulated(batch, cpu.ALGORITHMS[seed % 3], f"seed {seed}")
