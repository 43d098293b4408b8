"""What the AscendC kernels would cost on an NPU, without one. `make ascend-cost` prints it.

The counts are exact: count.py ran the kernels in the emulation and wrote them to counts.json, which
a test keeps up to date. What is made of them is a model, with the vendor's figures where there are
any. A launch takes as long as its busiest core. A core takes its rows in tiles: the scalar unit
prepares one, MTE2 loads it, the vector unit computes, MTE3 stores it. What different tiles do in
different units overlaps: there is a buffer for each unit that works on one. The main compressor has
one less: two tiles together take no less than all that is done with one. A step's plan is made once
for all layers, and is counted apart from them.

Left out, because nothing is known of them: a read and a write that meet in one bank, misses in the
scalar unit's caches, and what cores do to each other beyond sharing the bandwidth.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dsv4_indexer import output

if TYPE_CHECKING:
    from rich.table import Table

COUNTS = Path(__file__).with_name("counts.json")
BUDGET = Path(__file__).parents[2] / "csrc" / "ascend" / "budget.h"
Launches = list[dict]  # of a kernel: each its `cores`, and the counts of `all` and of the `busiest`
Counts = dict[str, dict[int, Launches]]  # by name and tokens

# The vendor's figures for Ascend910B1 and 910B3.
#
# Cycles of a vector instruction's repeat: 1, but for these. Where an operand's blocks meet in one
# group of banks, a repeat takes a cycle for each of them (`turns`): that makes 2 of Add, Sub, Mul
# and Max, whose operands are whole multiples of 512 bytes apart.
_REPEAT = {"Exp/float": 2, "Sqrt/float": 2, "TransDataTo5HD/float": 2, "Div/float": 4}
# Bytes a cycle between global memory and the unified buffer, each way: of 48 cores that share it,
# for each, and the most that one core gets.
_SHARED, _SHARERS, _ALONE = 18.2, 48, 54.5

# Published for the change from overlay scan to scatter, then pool, at 128 tokens on an A2/A3 NPU
# (pypto-lib, pull request 618): cycles saved.
PUBLISHED = {"pool": 0.456, "pool and state": 0.337}
_POOL_LAUNCH = {"overlay_scan": 0, "scatter_pool": 1}  # the other launch saves the state

ALGORITHMS = {
    "overlay_scan": "overlay scan",
    "scatter_pool": "scatter, then pool",
    "one_pass": "one pass",
}
MAIN = "one_pass, main"  # of the main compressor of the ratio 4
PLANS = {  # of a step: how it is told, and of what
    "plan": "one request, a number a token",
    "plan_requests": "one request, a number a request",
    "plan, decode": "requests of one token, a number a token",
    "plan_requests, decode": "requests of one token, a number a request",
}
_LAYERS = 21  # of ratio 4, in DeepSeek-V4-Flash
_COMPUTE = 2  # the vector unit's place among a core's units
# How many tiles have a buffer, of the indexer's compressor and of the main one.
_BUFFERS, _MAIN_BUFFERS = map(int, re.findall(r"kTiles = (\d+);", BUDGET.read_text()))
WAYS = ("read", "write")


@dataclass(frozen=True)
class Assumptions:
    """What the vendor gives a range for, or no document says, in cycles of a core unless said
    otherwise. Central values; RANGES has low and high. They were not fitted to what was
    published."""

    bandwidth: float = 1  # of global memory, as a part of the vendor's figures
    transfer: float = 60  # to start one transfer
    head: float = 27  # of a vector instruction that waits for an earlier one: the vendor's 24 to 31
    issue: float = 6  # of the scalar unit, to make one instruction for another unit
    scalar_local: float = 8  # to read a scalar from the unified buffer
    scalar_global: float = 25  # and from global memory, through the data cache
    launch: float = 9000  # 5 us, outside of graphs


RANGES = {
    "bandwidth": (0.5, 1.5),
    "transfer": (20, 200),
    "head": (24, 31),
    "issue": (2, 15),
    "scalar_local": (2, 20),
    "scalar_global": (8, 100),
    "launch": (3600, 18000),
}

# The stock chain of vLLM Ascend 0.26.0rc1 on A2 and A3, from its documented shapes, E = T / 4:
# bytes of global memory a token, read and written. The state and the compressor's workspace, which
# its projection fills, are [T, 512] fp32.
STOCK = {
    "compressor (workspace, state, bf16 output [E, 128])": (2048, 2048 + 64),
    "Hadamard, as a matrix product [E, 128] x [128, 128]": (64, 64),
    "its factor 128^-1/2": (64, 64),
    "dynamic quantisation to int8 and fp32 scales": (64, 32 + 1),
    "cast of the scales to fp16": (1, 0.5),
    "scatter of the codes": (32, 32),
    "scatter of the scales": (0.5, 0.5),
}


def load_counts() -> Counts:
    counts = json.loads(COUNTS.read_text())
    return {
        name: {int(t): launches for t, launches in by_length.items()}
        for name, by_length in counts.items()
    }


def unit_cycles(core: dict, cores: int, a: Assumptions) -> tuple[float, float, float, float]:
    """How long each unit of a core, one of `cores` in a launch, is busy with tiles: the scalar
    unit, MTE2, the vector unit and MTE3. Vector instructions are made while others compute."""
    scalar = (
        (core["reads"] + core["writes"]) * a.issue
        + core["scalar_local"] * a.scalar_local
        + core["scalar_global"] * a.scalar_global
    )
    load, store = (
        core[f"{way}_bytes"] / _rate(cores, a) + core[f"{way}s"] * a.transfer for way in WAYS
    )
    return scalar, load, vector_cycles(core["vector"], a), store


def _rate(cores: int, a: Assumptions) -> float:
    return min(_SHARED * _SHARERS / cores, _ALONE) * a.bandwidth


def bytes_cycles(launches: Launches, a: Assumptions) -> float:
    """What the busiest cores' bytes alone would take, reads beside writes: no kernel that moves
    them is faster."""
    return sum(
        max(launch["busiest"][f"{way}_bytes"] for way in WAYS) / _rate(launch["cores"], a)
        for launch in launches
    )


def vector_cycles(vector: dict[str, list[int]], a: Assumptions) -> float:
    compute = sum(
        waits * a.head + max(turns, repeats * _REPEAT.get(name, 1))
        for name, (_, repeats, waits, turns) in vector.items()
    )
    return max(compute, a.issue * sum(instructions for instructions, *_ in vector.values()))


def core_cycles(core: dict, cores: int, a: Assumptions, buffers: int = _BUFFERS) -> float:
    """One core's time in a launch: its tiles, taken to be equal, and what it computes after them.
    The first passes all units, and each of the others takes what the slowest does, or waits for
    its buffer."""
    tiles = max(core["tiles"], 1)
    stages = [cycles / tiles for cycles in unit_cycles(core, cores, a)]
    buffered = sum(stages[1:]) / buffers
    computed = sum(stages[: _COMPUTE + 1]) + (tiles - 1) * max(stages[: _COMPUTE + 1])
    stored = sum(stages) + (tiles - 1) * max(*stages, buffered)
    return max(stored, computed + vector_cycles(core["after"], a))


def kernel_cycles(launches: Launches, a: Assumptions, buffers: int = _BUFFERS) -> float:
    """The launches' time on the device, one after the other, without what it takes to launch
    them."""
    return sum(core_cycles(launch["busiest"], launch["cores"], a, buffers) for launch in launches)


def main_cycles(counts: Counts, tokens: int) -> tuple[float, float, float]:
    """Of the main compressor's launch: central, least, most."""
    return _cycles_of(counts[MAIN][tokens], _MAIN_BUFFERS)


def variations() -> list[Assumptions]:
    """The central assumptions, then each assumption at either end of its range."""
    central = Assumptions()
    return [central] + [
        replace(central, **{f.name: end}) for f in fields(Assumptions) for end in RANGES[f.name]
    ]


def saving(before: Launches, after: Launches) -> tuple[float, float, float]:
    """The part of the cycles that is saved: central, least, most."""
    values = [1 - kernel_cycles(after, a) / kernel_cycles(before, a) for a in variations()]
    return values[0], min(values), max(values)


def report() -> str:
    counts = load_counts()
    return output.text(
        "Modelled from counts of the emulation; nothing here was measured on an NPU.\nOne request, "
        "int8 with fp16 scales, 48 cores. In brackets: with each assumption at its low and high.",
        "The model against what was published for the change from overlay scan to scatter, then "
        "pool,\nat 128 tokens, by another implementation of both: cycles saved",
        _yardstick(counts),
        "Counts a token (constants: the gate's bias, the norm's weight and the plan's header, "
        "which every core loads)",
        _raw(counts),
        "Modelled cycles of a layer's kernels",
        _cycles(counts),
        "Counts and modelled cycles of the main compressor of the ratio 4, one pass, bf16 (KiB a "
        "token)",
        _main(counts),
        "Counts and modelled cycles of a step's plan (scalars: of the core that reads most)",
        _plans(counts),
        f"A step of {_LAYERS} layers: one launch for the plan, and in each layer one for the "
        "projection (a matrix product of\ntorch_npu's) and one for the op. Cycles without the "
        "projections. Without a plan the op's arguments took 37 tensor operations a step.",
        _step(counts),
        "vLLM Ascend's own chain, from its shapes (its kernels were not run): bytes a token",
        *_stock(counts),
        "Assumptions (cycles of a core; bandwidth: a part of the vendor's figures)",
        _assumptions(),
    )


def published_change(counts: Counts) -> dict[str, tuple[float, float, float]]:
    """The model's figures for what PUBLISHED has: central, least, most."""
    scan, scatter = (counts[name][128] for name in _POOL_LAUNCH)
    pools = [scan[_POOL_LAUNCH["overlay_scan"]]], [scatter[_POOL_LAUNCH["scatter_pool"]]]
    return {"pool": saving(*pools), "pool and state": saving(scan, scatter)}


def _yardstick(counts: Counts) -> "Table":
    modelled = published_change(counts)
    rows = [[name, f"{saved:.1%}", _range(modelled[name])] for name, saved in PUBLISHED.items()]
    return output.table(["", "published", "model"], rows)


def _raw(counts: Counts) -> "Table":
    columns = ["tokens", "", "launches", "cores", "KiB read", "written", "together"]
    columns += ["of them constants", "transfers"]
    columns += ["vector", "repeats", "waits", "bank turns", "scalar UB", "scalar GM"]
    rows = [
        [str(t), title, *_raw_cells(counts[name][t], t)]
        for t in counts["one_pass"]
        for name, title in ALGORITHMS.items()
    ]
    return output.table(columns, rows, names=2)


def _raw_cells(launches: Launches, tokens: int) -> list[str]:
    def sum_of(what: str) -> int:
        return sum(launch["all"][what] for launch in launches)

    vector = [
        counts
        for launch in launches
        for part in ("vector", "after")
        for counts in launch["all"][part].values()
    ]
    bytes_ = sum_of("read_bytes"), sum_of("write_bytes"), _moved(launches)
    others = (
        sum_of("reads") + sum_of("writes"),
        *(sum(column) for column in zip(*vector)),
        sum_of("scalar_local"),
        sum_of("scalar_global"),
    )
    return [
        str(len(launches)),
        str(launches[0]["cores"]),
        *(f"{n / tokens / 1024:.2f}" for n in (*bytes_, sum(map(_constants, launches)))),
        *(f"{n / tokens:.1f}" for n in others),
    ]


def _moved(launches: Launches) -> int:
    return sum(launch["all"]["read_bytes"] + launch["all"]["write_bytes"] for launch in launches)


def _constants(launch: dict) -> int:
    """What the cores of a launch load whatever the tokens: the bias [4, 256] fp32 and the header
    [16] int64; if they pool, [128] bf16."""
    return launch["cores"] * (4096 + 128 + (256 if "Exp/float" in launch["all"]["vector"] else 0))


def _cycles(counts: Counts) -> "Table":
    central, (*replaced, ours) = Assumptions(), ALGORITHMS.values()
    columns = ["tokens", *ALGORITHMS.values(), "its bytes alone"]
    columns += [f"{ours} saves of {name}" for name in replaced]
    rows = []
    for t in counts["one_pass"]:
        launches = [counts[name][t] for name in ALGORITHMS]
        kernels = [kernel_cycles(x, central) for x in launches]
        savings = [_range(saving(other, launches[2])) for other in launches[:2]]
        alone = bytes_cycles(launches[2], central)
        whole = [cycles + len(x) * central.launch for cycles, x in zip(kernels, launches)]
        cycles = [f"{n:.0f}" for n in (*kernels, alone, *whole)]
        rows.append([str(t), *cycles[:4], *savings, *cycles[4:]])
    return output.table(
        [*columns, *(f"{name}, with launches" for name in ALGORITHMS.values())], rows
    )


def _main(counts: Counts) -> "Table":
    columns = ["tokens", "cores", "KiB read", "written", "tiles", "its bytes alone", "cycles"]
    rows = []
    for t, launches in counts[MAIN].items():
        (launch,) = launches
        moved = [f"{launch['all'][f'{way}_bytes'] / t / 1024:.2f}" for way in WAYS]
        alone = f"{bytes_cycles(launches, Assumptions()):.0f}"
        cells = [t, launch["cores"], *moved, launch["all"]["tiles"], alone]
        rows.append([*map(str, cells), _range(main_cycles(counts, t), "{:.0f}")])
    return output.table(columns, rows)


def _plans(counts: Counts) -> "Table":
    columns = ["a step's plan of", "tokens", "launches", "cores", "KiB moved"]
    rows = []
    for name, told in PLANS.items():
        for t, launches in counts[name].items():
            busiest = launches[0]["busiest"]
            cells = [t, len(launches), launches[0]["cores"], f"{_moved(launches) / 1024:.1f}"]
            cells += [busiest["scalar_local"], busiest["scalar_global"]]
            rows.append([told, *map(str, cells), _range(_cycles_of(launches), "{:.0f}")])
    return output.table([*columns, "scalar UB", "scalar GM", "cycles"], rows)


def _step(counts: Counts) -> "Table":
    """One request, told by its request, through all layers."""
    central = Assumptions()
    rows = []
    for t, launches in counts["one_pass"].items():
        plan = kernel_cycles(counts["plan_requests"][t], central)
        layers = _LAYERS * kernel_cycles(launches, central)
        ours = 1 + _LAYERS * len(launches)
        whole = plan + layers + ours * central.launch
        part = plan / (plan + layers)
        rows.append(
            [t, f"{plan:.0f}", f"{layers:.0f}", f"{part:.1%}", ours + _LAYERS, f"{whole:.0f}"]
        )
    columns = ["tokens", "plan", f"{_LAYERS} layers", "the plan's part", "launches"]
    return output.table([*columns, "cycles with launches"], [map(str, row) for row in rows])


def _cycles_of(launches: Launches, buffers: int = _BUFFERS) -> tuple[float, float, float]:
    """Central, least, most."""
    values = [kernel_cycles(launches, a, buffers) for a in variations()]
    return values[0], min(values), max(values)


def _stock(counts: Counts) -> tuple["Table", str]:
    rows = [[name, f"{read:.1f}", f"{written:.1f}"] for name, (read, written) in STOCK.items()]
    total = sum(read + written for read, written in STOCK.values()) / 1024
    longest = max(counts["one_pass"])
    ours = _moved(counts["one_pass"][longest]) / longest / 1024
    return (
        output.table(["", "read", "written"], rows),
        f"Together {total:.2f} KiB a token in {len(STOCK)} launches, with the projection in the "
        f"first.\nOne pass, {longest} tokens: {ours:.2f} KiB in 1 launch, the projection in one "
        "before it. It saves launches, not bytes.",
    )


def _assumptions() -> "Table":
    central = Assumptions()
    rows = [
        [name, f"{getattr(central, name):g}", f"{low:g} to {high:g}"]
        for name, (low, high) in RANGES.items()
    ]
    return output.table(["", "central", "range"], rows)


def _range(values: tuple[float, float, float], form: str = "{:.1%}") -> str:
    central, low, high = map(form.format, values)
    return f"{central} ({low} to {high})"


if __name__ == "__main__":
    print(report())
