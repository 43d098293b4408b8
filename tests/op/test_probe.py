"""How the native kernel tells whether the state's rows are in memory alone (csrc/cpu/probe.h), and
that it then stores the same bytes."""

import subprocess
from pathlib import Path

import pytest
import torch

from batches import MAIN_4, MAIN_128, assert_identical, make_batch
from vllm_dsv4_indexer.ops import cpu

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    program = tmp_path_factory.mktemp("probe") / "probe"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["c++", *flags, str(HERE / "probe.cpp"), "-o", program], check=True)
    return lambda reading, memory: subprocess.check_output(
        [program, str(reading), str(memory)], text=True
    ).strip()


@pytest.mark.parametrize("memory, found", [(2, "warm"), (50, "warm"), (100, "cold"), (400, "cold")])
@pytest.mark.parametrize("reading", (0, 20, 60))
def test_the_time_of_the_rows_decides_whatever_the_clock_takes(probe, reading, memory, found):
    assert probe(reading, memory) == found


@pytest.mark.parametrize("memory", (2, 400))
def test_a_clock_that_is_slower_than_what_it_measures_never_says_cold(probe, memory):
    assert probe(2000, memory) == "warm"


def test_a_cpu_without_stores_past_the_cache_says_so():
    """The kernel asks this constant first, and then writes each row once."""
    source = (
        '#include "vec.h"\nstatic_assert(!kHasStoresPastCache);\nint main() { wait_for_stores(); }'
    )
    command = [
        "c++",
        "-std=c++17",
        "-U__SSE2__",
        "-U__AVX__",
        "-DDSV4_LANES=4",
        "-Wno-unused-function",
    ]
    command += [f"-I{HERE.parents[1] / 'csrc/cpu'}", "-fsyntax-only", "-x", "c++", "-"]
    subprocess.run(command, input=source, text=True, check=True)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_dtype": torch.bfloat16, "layout": "engine", "padding": 5},
        {"k_format": "int8_hadamard", "page": 2, "layout": "padded"},
        {"geometry": MAIN_4, "kv_dtype": torch.bfloat16},
        {"geometry": MAIN_128},
    ],
    ids=str,
)
def test_stores_around_the_caches_store_the_same_bytes(isa, options, monkeypatch):
    batch = make_batch([(5, 150), (0, 130), (67, 1), (128, 30), (0, 3)], **options)
    past_cache = cpu.algorithm_for(cpu.native().library, "one_pass_past_cache", isa, batch.geometry)
    if not past_cache:
        pytest.skip(f"this CPU or build lacks {isa}")
    expected = batch.clone().compress("cpu")
    monkeypatch.setitem(cpu.native().algorithms, ("one_pass", batch.geometry), past_cache)
    assert_identical(batch.compress("cpu"), expected)
