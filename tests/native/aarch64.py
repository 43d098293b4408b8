"""The op built for aarch64 and run under emulation stores the bytes that it stores on this CPU.

`make test-aarch64` builds what this needs and runs it. Its name keeps it out of `pytest tests`,
where it could only be skipped on machines without a cross compiler and an emulator.
"""

import os
from pathlib import Path

import pytest

from batches import make_batch
from record import ALGORITHMS, CALLS, arbitrary_batch, record
from sanitize import replay

PROGRAM = Path(__file__).parents[2] / "build/aarch64/replay"
EMULATED = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", PROGRAM]
# Another library than the one that the program was built with: that of a wheel.
if library := os.environ.get("AARCH64_LIBRARY"):
    EMULATED[1:1] = ["-E", f"LD_PRELOAD={library}"]


@pytest.mark.parametrize("algorithm, geometry", CALLS)
@pytest.mark.parametrize("seed", range(100))
def test_random_calls_store_the_same_bytes_on_aarch64(seed, algorithm, geometry):
    replay(EMULATED, [record(arbitrary_batch(seed, geometry), algorithm)])


@pytest.mark.parametrize("seed", range(9))
def test_no_last_bit_of_the_arithmetic_differs_on_aarch64(seed):
    """Such a bit shows once in thousands of entries, where it turns a rounding to bfloat16 and so
    an int8 scale."""
    batch = make_batch([(0, 500)] * 32, k_format="int8_hadamard", seed=seed)
    replay(EMULATED, [record(batch, list(ALGORITHMS)[seed % 3])])
