"""The result of a benchmark as tables.

The cells of one number of threads and state of the caches make a block, those of one case name in
it a group, whose calls are pooled.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING

from .. import output
from ..errors import UserError
from ..ops.cpu import FLOORS
from .contestants import VLLM
from .result import Cell, Result

if TYPE_CHECKING:
    from rich.table import Table

ALGORITHMS = {  # whom ours replaces, and ours
    "overlay_scan": "overlay scan",
    "scatter_pool": "scatter, then pool",
    "one_pass": "one pass",
}


@dataclass(frozen=True)
class Times:
    """The calls of one contestant in one group, in nanoseconds a token; `call` in microseconds."""

    p10: float
    p50: float
    p90: float
    p99: float
    call: float


@dataclass(frozen=True)
class Group:
    """tokens, bytes and flops are a call's, in the mean where calls differ; the rest as in
    result.Cell. times: by contestant, where "floor" is the faster of the two."""

    case: str
    block: str
    kind: str
    tokens: int
    bytes: float
    flops: float
    changed: dict[str, float]
    times: dict[str, Times]


def read(path: Path) -> Result:
    """The result in a file. Raises UserError where it is none, or one of another version."""
    try:
        result: Result = json.loads(path.read_text())
        tables(result)  # looks at everything
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError):  # ValueError: no text, or no JSON
        raise UserError(f"{path} was not written by `vllm-dsv4-indexer bench run`") from None
    except KeyError as key:
        raise UserError(
            f"{path}, of another version, has no {key}; run `vllm-dsv4-indexer bench run` again"
        ) from None
    return result


def blocks(cells: list[Cell]) -> dict[str, list[Cell]]:
    """The cells of each number of threads and state of the caches, in words: "warm caches, 1
    thread"."""
    keys = sorted(
        {(cell["threads"], cell["cache"]) for cell in cells},
        key=lambda key: (key[0], key[1] == "cold"),
    )
    return {
        f"{cache} caches, {n} thread{'s' * (n > 1)}": [
            c for c in cells if (c["threads"], c["cache"]) == (n, cache)
        ]
        for n, cache in keys
    }


def groups(result: Result) -> list[Group]:
    """The groups of a result, block by block."""
    found = []
    for block, cells in blocks(result["cells"]).items():
        by_case = defaultdict(list)
        for cell in cells:
            by_case[cell["case"]].append(cell)
        found += [_group(block, members) for members in by_case.values()]
    return found


def _group(block: str, cells: list[Cell]) -> Group:
    first = cells[0]
    return Group(
        first["case"],
        block,
        first["kind"],
        sum(cell["tokens"] for cell in cells) // len(cells),
        sum(cell["bytes"] for cell in cells) / len(cells),
        sum(cell["flops"] for cell in cells) / len(cells),
        {
            name: sum(cell["codes_changed"][name] for cell in cells) / len(cells)
            for name in first["codes_changed"]
        },
        _times_by_contestant(cells),
    )


def _times_by_contestant(cells: list[Cell]) -> dict[str, Times]:
    """Of each cell as many calls: short ones are repeated more often."""
    calls: dict[str, list[tuple[int, int]]] = defaultdict(list)
    rounds = min(len(floor(cell)) for cell in cells)
    for cell in cells:
        for name, nanoseconds in (cell["nanoseconds"] | {"floor": floor(cell)}).items():
            calls[name] += [(ns, cell["tokens"]) for ns in nanoseconds[:rounds]]
    del calls["floor_past_cache"]
    return {name: _times(of_it) for name, of_it in calls.items()}


def floor(cell: Cell) -> list[int]:
    """The calls of the faster floor."""
    return min((cell["nanoseconds"][name] for name in FLOORS), key=median)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def percentile(values: Sequence[float], percent: int) -> float:
    return (
        quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
    )


def _times(calls: list[tuple[int, int]]) -> Times:
    per_token = [ns / tokens for ns, tokens in calls]
    p10, p50, p90, p99 = (percentile(per_token, p) for p in (10, 50, 90, 99))
    return Times(p10, p50, p90, p99, call=median([ns / 1000 for ns, _ in calls]))


def tables(result: Result) -> list["Table | str"]:
    """Everything that was measured, for reading."""
    parts: list[Table | str] = [_machine(result)]
    found = groups(result)
    for block in dict.fromkeys(group.block for group in found):
        members = [group for group in found if group.block == block]
        parts += [f"{block}: ns/token, medians and percentiles; us a call", _measured(members)]
        if (algorithms := _algorithms(members)) is not None:
            parts += [f"{block}: native code alone, one request, ns/token", algorithms]
    return parts


def _measured(members: list[Group]) -> "Table":
    """A line for each contestant of each group of a block."""
    projects = members[0].flops > 0
    more = ["GFLOP/s", "codes changed"] if projects else ["x its ops", "GB/s", "of floor"]
    columns = ["case", "", "us", "ns/token", "p10", "p90", "p99", "x vllm", *more]
    rows = [
        [group.case, *_line(group, name)]
        for group in members
        for name in group.times
        if name != "floor" or not projects
    ]
    return output.table(columns, rows, names=2)


def _line(group: Group, name: str) -> list[str]:
    t = group.times[name]
    theirs = ("vllm_projection",) if name.endswith("_projection") else VLLM
    vllm, *its_ops = (
        f"{group.times[other].p50 / t.p50:.2f}" if other in group.times else "-" for other in theirs
    )
    times = [f"{value:.1f}" for value in (t.call, t.p50, t.p10, t.p90, t.p99)]
    if group.flops:
        changed = f"{group.changed[name]:.3%}" if name in group.changed else "-"
        return [name, *times, vllm, f"{group.flops / group.tokens / t.p50:.1f}", changed]
    rate = f"{group.bytes / group.tokens / t.p50:.1f}"
    return [name, *times, vllm, *its_ops, rate, f"{group.times['floor'].p50 / t.p50:.0%}"]


def _algorithms(members: list[Group]) -> "Table | None":
    """The algorithms against each other, of the groups in which all three were measured."""
    compared = [
        group for group in members if group.kind == "one" and group.times.keys() >= set(ALGORITHMS)
    ]
    if not compared:
        return None
    rows = []
    for group in compared:
        scan, scatter, ours = (group.times[name].p50 for name in ALGORITHMS)
        saved = (1 - ours / scan, 1 - ours / scatter)
        rows.append(
            [
                str(group.tokens),
                *(f"{ns:.1f}" for ns in (scan, scatter, ours)),
                *(f"{part:.1%}" for part in saved),
            ]
        )
    *replaced, ours_name = ALGORITHMS.values()
    saves = [f"{ours_name} saves of {other}" for other in replaced]
    return output.table(["tokens", *ALGORITHMS.values(), *saves], rows)


def _machine(result: Result) -> str:
    m = result["machine"]
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in m["caches"].items())
    return (
        f"{m['cpu']}, {m['cores']} cores ({caches}), {m['isa']}; load {m['load']} at the start; "
        f"torch {m['torch']}, vLLM {m['vllm'] or 'not installed'}; kv_score "
        f"{result['options']['kv_dtype']}\nbandwidth (the floor of the longest call): "
        f"{_bandwidth(result)}"
    )


def _bandwidth(result: Result) -> str:
    longest = {g.block: g for g in sorted(groups(result), key=lambda g: g.tokens)}
    return "; ".join(
        f"{g.bytes / g.tokens / g.times['floor'].p50:.1f} GB/s {block}"
        for block, g in longest.items()
    )


def compare(before: Result, after: Result) -> list["Table | str"]:
    """What changed from one result to another, for what both measured. A change is marked where the
    spans from p10 to p90 do not meet."""
    parts: list[Table | str] = []
    for name, a, b in (("before", before, after), ("after", after, before)):
        if a["machine"] != b["machine"] or a["options"] != b["options"]:
            parts.append(f"{name}: {_machine(a)}")
    old = {(g.case, g.block): g.times for g in groups(before)}
    rows = []
    for group in groups(after):
        times = old.get((group.case, group.block), {})
        rows += [
            [f"{group.case}, {group.block}: {name}", *_change(times[name], group.times[name])]
            for name in group.times
            if name in times
        ]
    return [*parts, output.table(["ns/token", "before", "after", "change", ""], rows)]


def _change(a: Times, b: Times) -> list[str]:
    mark = "faster" if b.p90 < a.p10 else "slower" if b.p10 > a.p90 else ""
    return [f"{a.p50:.1f}", f"{b.p50:.1f}", f"{b.p50 / a.p50 - 1:+.1%}", mark]
