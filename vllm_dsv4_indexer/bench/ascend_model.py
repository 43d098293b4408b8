"""`vllm-dsv4-indexer bench --model ascend`: what the AscendC kernels would cost, without an NPU.

The counts are exact: tests/ascend_emulation/count.py ran the kernels in the emulation, for one
request of T tokens, and wrote them beside this file (the emulation is no part of the package; a
test keeps the file up to date). What is made of them is a model: a core's launch takes as long as
the busiest of its transfers, its vector and its scalar unit. A layer's algorithm is counted without
the step's plan, which is counted apart: it is made once a step.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

COUNTS = Path(__file__).with_name("ascend_counts.json")

# Vector throughput of A2 and A3 in elements a cycle: asc-devkit, docs/zh/api/附录/Vector指令理论性能汇总.md,
# tables 6 to 13. Copy is not listed there; it is taken to be as fast as Adds.
_PER_CYCLE = {
    "Exp/float": 32,
    "Div/float": 32,
    "Sqrt/float": 32,
    "Cast/int8_t": 128,
    "Cast/half": 128,
    "Brcb/half": 128,
}
_LANES = {
    "Cast/int8_t": 128,
    "Cast/half": 128,
    "Brcb/half": 128,
    "TransDataTo5HD/float": 128,
}  # elements of a repeat
_FLOATS = 64  # of both, where nothing else is said

# Published for the change from A to B, T = 128, on an A2/A3 NPU (pypto-lib, pull request 618):
# cycles saved.
_PUBLISHED = {"pool": 0.456, "pool and state": 0.337}

ALGORITHMS = {"A": "overlay_scan", "B": "scatter_pool", "C": "one_pass"}
_POOL_LAUNCH = {"A": 0, "B": 1}  # the other launch saves the state
PLANS = {  # of a step: how it is told, and of what
    "plan": "one request, a number a token",
    "plan_requests": "one request, a number a request",
    "plan, decode": "T requests of one token, a number a token",
    "plan_requests, decode": "T requests of one token, a number a request",
}
_LAYERS = 21  # of ratio 4, in DeepSeek-V4-Flash


@dataclass(frozen=True)
class Assumptions:
    """What no document says, in cycles of a core unless said otherwise. Central values; RANGES has
    low and high. They were set before the model was compared with what was published, and not
    fitted to it."""

    bytes_per_cycle: float = 18  # global memory, for each of 48 cores at once: 1.6 TB/s at 1.8 GHz
    transfer: float = 60  # to start one transfer
    vector_issue: float = 12  # of an instruction, beyond its repeats
    scalar_local: float = 8  # to read a scalar from the unified buffer
    scalar_global: float = 25  # and from global memory, through the data cache
    launch: float = 9000  # 5 us, outside of graphs


RANGES = {
    "bytes_per_cycle": (9, 36),
    "transfer": (20, 200),
    "vector_issue": (4, 30),
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


def load_counts() -> dict[str, dict[int, list[dict]]]:
    """By algorithm and T: the launches, each with its `cores`, and the counts of `all` and of the
    `busiest` core."""
    counts = json.loads(COUNTS.read_text())
    return {
        name: {int(t): launches for t, launches in by_length.items()}
        for name, by_length in counts.items()
    }


def core_cycles(core: dict, a: Assumptions) -> float:
    """One core's time in one launch."""
    moved, transfers = core["read_bytes"] + core["write_bytes"], core["reads"] + core["writes"]
    vector = sum(
        instructions * a.vector_issue
        + repeats * _LANES.get(name, _FLOATS) / _PER_CYCLE.get(name, _FLOATS)
        for name, (instructions, repeats) in core["vector"].items()
    )
    scalar = core["scalar_local"] * a.scalar_local + core["scalar_global"] * a.scalar_global
    return max(moved / a.bytes_per_cycle + transfers * a.transfer, vector, scalar)


def kernel_cycles(launches: list[dict], a: Assumptions) -> float:
    """The launches' time on the device, one after the other, without what it takes to launch
    them."""
    return sum(core_cycles(launch["busiest"], a) for launch in launches)


def variations() -> list[Assumptions]:
    """The central assumptions, then each assumption at either end of its range."""
    central = Assumptions()
    return [central] + [
        replace(central, **{f.name: end}) for f in fields(Assumptions) for end in RANGES[f.name]
    ]


def saving(before: list[dict], after: list[dict]) -> tuple[float, float, float]:
    """The part of the cycles that is saved: central, least, most."""
    values = [1 - kernel_cycles(after, a) / kernel_cycles(before, a) for a in variations()]
    return values[0], min(values), max(values)


def report() -> str:
    loaded = load_counts()
    counts = {letter: loaded[name] for letter, name in ALGORITHMS.items()}
    parts = [_yardstick(counts), _raw(counts), _cycles(counts), _plans(loaded), _step(loaded)]
    return "\n\n".join([*parts, _stock(counts), _assumptions()])


def _yardstick(counts: dict) -> str:
    lines = [
        "Modelled from counts of the emulation; nothing here was measured on an NPU.",
        "A overlay_scan, B scatter_pool, C one_pass; one request of T tokens, int8 with fp16 "
        "scales, 48 cores.",
        "",
        "First the model against what was published for the change from A to B at T=128, by "
        "another implementation",
        "of both (cycles saved; in brackets: with each assumption at its low and high):",
    ]
    a, b = counts["A"][128], counts["B"][128]
    pools = [a[_POOL_LAUNCH["A"]]], [b[_POOL_LAUNCH["B"]]]
    for (name, published), pair in zip(_PUBLISHED.items(), (pools, (a, b))):
        lines.append(f"  {name:16} published {published:6.1%}   model {_range(saving(*pair))}")
    return "\n".join(lines)


def _raw(counts: dict) -> str:
    titles = "T,,launches,cores,KiB read,written,together,of them constants,transfers,vector,repeats,scalar UB,scalar GM"
    rows = [titles.split(",")]
    for t in counts["C"]:
        for letter, by_length in counts.items():
            launches = by_length[t]
            n = {
                k: sum(x["all"][k] for x in launches) / t
                for k in launches[0]["all"]
                if k != "vector"
            }
            instructions, repeats = (
                sum(c[i] for x in launches for c in x["all"]["vector"].values()) / t for i in (0, 1)
            )
            bytes_ = (
                n["read_bytes"],
                n["write_bytes"],
                _moved(launches) / t,
                sum(map(_constants, launches)) / t,
            )
            row = [
                str(t),
                letter,
                str(len(launches)),
                str(launches[0]["cores"]),
                *(f"{x / 1024:.2f}" for x in bytes_),
            ]
            rest = (
                n["reads"] + n["writes"],
                instructions,
                repeats,
                n["scalar_local"],
                n["scalar_global"],
            )
            rows.append(row + [f"{x:.1f}" for x in rest])
    return (
        "Counts a token (constants: the gate's bias, the norm's weight and the plan's header, "
        "which every core loads)\n" + _table(rows)
    )


def _moved(launches: list[dict]) -> int:
    return sum(launch["all"]["read_bytes"] + launch["all"]["write_bytes"] for launch in launches)


def _constants(launch: dict) -> int:
    """What the cores of a launch load whatever the tokens: the bias [4, 256] fp32 and the header
    [16] int64; if they pool, [128] bf16."""
    return launch["cores"] * (4096 + 128 + (256 if "Exp/float" in launch["all"]["vector"] else 0))


def _cycles(counts: dict) -> str:
    central = Assumptions()
    rows = [["T", "A", "B", "C", "C saves of A", "C saves of B", "A", "B", "C with launches"]]
    for t in counts["C"]:
        launches = [by_length[t] for by_length in counts.values()]
        kernels = [kernel_cycles(x, central) for x in launches]
        savings = [_range(saving(other, launches[2])) for other in launches[:2]]
        whole = [cycles + len(x) * central.launch for cycles, x in zip(kernels, launches)]
        rows.append(
            [str(t), *(f"{x:.0f}" for x in kernels), *savings, *(f"{x:.0f}" for x in whole)]
        )
    return (
        "Modelled cycles of the kernels (in brackets: with each assumption at its low and high)\n"
        + _table(rows)
    )


def _plans(loaded: dict) -> str:
    rows = [
        [
            "a step's plan of",
            "T",
            "launches",
            "cores",
            "KiB moved",
            "scalar UB",
            "scalar GM",
            "cycles",
        ]
    ]
    for name, told in PLANS.items():
        for t, launches in loaded[name].items():
            busiest = launches[0]["busiest"]
            scalars = busiest["scalar_local"], busiest["scalar_global"]
            cycles = _range(_cycles_of(launches), "{:.0f}")
            moved = f"{_moved(launches) / 1024:.1f}"
            rows.append(
                [
                    told,
                    str(t),
                    str(len(launches)),
                    str(launches[0]["cores"]),
                    moved,
                    *map(str, scalars),
                    cycles,
                ]
            )
    return (
        "Counts and modelled cycles of a step's plan (scalars: of the core that reads most)\n"
        + _table(rows)
    )


def _step(loaded: dict) -> str:
    """One request of T tokens, told by its request, through all layers."""
    central = Assumptions()
    rows = [
        [
            "T",
            "plan",
            f"{_LAYERS} x C",
            "the plan's part",
            "launches",
            "cycles with launches, without projections",
        ]
    ]
    for t, launches in loaded["one_pass"].items():
        plan, layer = (
            kernel_cycles(loaded["plan_requests"][t], central),
            kernel_cycles(launches, central),
        )
        whole, count = plan + _LAYERS * layer, 1 + _LAYERS * (1 + len(launches))
        ours = whole + (1 + _LAYERS * len(launches)) * central.launch
        rows.append(
            [
                str(t),
                f"{plan:.0f}",
                f"{_LAYERS * layer:.0f}",
                f"{plan / whole:.1%}",
                str(count),
                f"{ours:.0f}",
            ]
        )
    return (
        f"A step of {_LAYERS} layers: one launch for the plan, and in each layer one for the "
        "projection (a matrix product of\ntorch_npu's) and one for C. Without a plan the op's "
        f"arguments took 37 tensor operations a step.\n{_table(rows)}"
    )


def _cycles_of(launches: list[dict]) -> tuple[float, float, float]:
    """Central, least, most."""
    values = [kernel_cycles(launches, a) for a in variations()]
    return values[0], min(values), max(values)


def _stock(counts: dict) -> str:
    rows = [
        [f"  {name:52}", f"{read:.1f} read", f"{written:.1f} written"]
        for name, (read, written) in STOCK.items()
    ]
    total = sum(read + written for read, written in STOCK.values()) / 1024
    longest = max(counts["C"])
    ours = _moved(counts["C"][longest]) / longest / 1024
    return (
        "vLLM Ascend's own chain, from its shapes (its kernels were not run), bytes a "
        f"token\n{_table(rows)}\n  together {total:.2f} KiB a token in {len(STOCK)} launches, with "
        f"the projection in the first\n  C at T={longest}: {ours:.2f} KiB in 1 launch, the "
        "projection in one before it; it saves launches, not bytes"
    )


def _assumptions() -> str:
    central = Assumptions()
    rows = [
        [f"  {name:15}", f"{getattr(central, name):.0f}", f"{low} to {high}"]
        for name, (low, high) in RANGES.items()
    ]
    return "Assumptions, central and range (cycles of a core, or bytes a cycle)\n" + _table(rows)


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows
    )


def _range(values: tuple[float, float, float], form: str = "{:.1%}") -> str:
    central, low, high = map(form.format, values)
    return f"{central:>6} ({low} to {high})"
