"""The result of a benchmark as tables. A result is what bench.json holds: `machine`, `options` and
`cells` (measure.py).

Cells of one number of threads and state of the caches make a block, those of one case name in it a
group, whose calls are pooled.
"""

from collections import defaultdict
from dataclasses import dataclass
from statistics import quantiles

from ..ops.cpu import FLOORS
from .contestants import VLLM

ABC = ("overlay_scan", "scatter_pool", "one_pass")


@dataclass(frozen=True)
class Times:
    """The calls of one contestant in one group; times in nanoseconds a token, `call` in
    microseconds."""

    p10: float
    p50: float
    p90: float
    p99: float
    call: float


@dataclass(frozen=True)
class Group:
    case: str
    where: str
    kind: str
    tokens: int  # of a call, and so are `bytes` and `flops` (the mean, where they differ)
    bytes: float
    flops: float  # of the projection, where the calls have one
    changed: dict[
        str, float
    ]  # by contestant, the share of codes that are not those of a float64 projection
    times: dict[str, Times]  # by contestant; "floor" is the faster of the two


def blocks(cells: list[dict]) -> dict[str, list[dict]]:
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


def groups(result: dict) -> list[Group]:
    """The groups of a result, block by block."""
    found = []
    for where, cells in blocks(result["cells"]).items():
        by_case = defaultdict(list)
        for cell in cells:
            by_case[cell["case"]].append(cell)
        found += [_group(where, members) for members in by_case.values()]
    return found


def _group(where: str, cells: list[dict]) -> Group:
    calls = defaultdict(list)
    rounds = min(
        len(floor(cell)) for cell in cells
    )  # of each cell: short calls are repeated more often
    for cell in cells:
        for name, nanoseconds in (cell["nanoseconds"] | {"floor": floor(cell)}).items():
            calls[name] += [(ns, cell["tokens"]) for ns in nanoseconds[:rounds]]
    del calls["floor_past_cache"]
    first = cells[0]
    tokens, size, flops = (
        sum(cell[what] for cell in cells) / len(cells) for what in ("tokens", "bytes", "flops")
    )
    changed = {
        name: sum(cell["codes_changed"][name] for cell in cells) / len(cells)
        for name in first["codes_changed"]
    }
    times = {name: _times(c) for name, c in calls.items()}
    return Group(first["case"], where, first["kind"], int(tokens), size, flops, changed, times)


def floor(cell: dict) -> list[int]:
    """The calls of the faster floor."""
    return min((cell["nanoseconds"][name] for name in FLOORS), key=median)


def median(values: list[float]) -> float:
    return percentile(values, 50)


def percentile(values: list[float], percent: int) -> float:
    return (
        quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
    )


def _times(calls: list[tuple[int, int]]) -> Times:
    per_token = [ns / tokens for ns, tokens in calls]
    return Times(
        *(percentile(per_token, p) for p in (10, 50, 90, 99)),
        median([ns / 1000 for ns, _ in calls]),
    )


def table(result: dict) -> str:
    """Everything that was measured, for reading."""
    parts = [_machine(result)]
    block = None
    for group in groups(result):
        if block != (block := group.where):
            what = (
                f"{'GFLOP/s':>10}{'changed':>10}"
                if group.flops
                else f"{'x its ops':>10}{'GB/s':>7}{'of floor':>10}"
            )
            parts.append(
                f"\n{block}\n{'':18}{'us/call':>11}{'ns/token':>11}{'p10':>11}{'p90':>11}{'p99':>11}{'x vllm':>9}"
                + what
            )
        parts.append(group.case)
        parts += [_line(group, name) for name in group.times if name != "floor" or not group.flops]
    return "\n".join(parts + _algorithms(result))


def _line(group: Group, name: str) -> str:
    t = group.times[name]
    theirs = ("vllm_projection",) if name.endswith("_projection") else VLLM
    vllm, *its_ops = (
        f"{group.times[other].p50 / t.p50:.2f}" if other in group.times else "-" for other in theirs
    )
    line = f"  {name:16}{t.call:11.1f}{t.p50:11.1f}{t.p10:11.1f}{t.p90:11.1f}{t.p99:11.1f}{vllm:>9}"
    if group.flops:
        changed = f"{group.changed[name]:.3%}" if name in group.changed else "-"
        return f"{line}{group.flops / group.tokens / t.p50:10.1f}{changed:>10}"
    share = group.times["floor"].p50 / t.p50
    return f"{line}{its_ops[0]:>10}{group.bytes / group.tokens / t.p50:7.1f}{share:10.0%}"


def _algorithms(result: dict) -> list[str]:
    """The algorithms against each other on one request, where all three were measured."""
    lines, block = [], None
    for group in groups(result):
        if group.kind != "one" or not group.times.keys() >= set(ABC):
            continue
        a, b, c = (group.times[name].p50 for name in ABC)
        if block != (block := group.where):
            lines.append(
                f"\n{block}: A overlay_scan, B scatter_pool, C one_pass, native code alone, "
                f"ns/token\n{'T':>8}{'A':>10}{'B':>10}{'C':>10}{'B saves of A':>15}{'C of A':>9}{'C of B':>9}"
            )
        lines.append(
            f"{group.tokens:8}{a:10.1f}{b:10.1f}{c:10.1f}{1 - b / a:15.1%}{1 - c / a:9.1%}{1 - c / b:9.1%}"
        )
    return lines


def _machine(result: dict) -> str:
    m = result["machine"]
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in m["caches"].items())
    return (
        f"{m['cpu']}, {m['cores']} cores ({caches}), {m['isa']}; load {m['load']} at the start; "
        f"torch {m['torch']}, vLLM {m['vllm'] or 'not installed'}; kv_score "
        f"{result['options']['kv_dtype']}\nbandwidth (the floor of the longest call): "
        f"{_bandwidth(result)}"
    )


def _bandwidth(result: dict) -> str:
    longest = {g.where: g for g in sorted(groups(result), key=lambda g: g.tokens)}
    return "; ".join(
        f"{g.bytes / g.tokens / g.times['floor'].p50:.1f} GB/s {where}"
        for where, g in longest.items()
    )


def compare(before: dict, after: dict) -> str:
    """What changed from one result to another, for what both measured. A change is marked where the
    spans from p10 to p90 do not meet."""
    lines = []
    for name, a, b in (("before", before, after), ("after", after, before)):
        if a["machine"] != b["machine"] or a["options"] != b["options"]:
            lines.append(f"{name}: {_machine(a)}")
    lines.append(f"{'':50}{'before':>10}{'after':>10}{'change':>9}   (ns/token)")
    old = {(g.case, g.where): g.times for g in groups(before)}
    for group in groups(after):
        times = old.get((group.case, group.where), {})
        for name in filter(times.__contains__, group.times):
            lines.append(
                _change(f"{group.case}, {group.where}: {name}", times[name], group.times[name])
            )
    return "\n".join(lines)


def _change(what: str, a: Times, b: Times) -> str:
    mark = "faster" if b.p90 < a.p10 else "slower" if b.p10 > a.p90 else ""
    return f"{what:50}{a.p50:10.1f}{b.p50:10.1f}{b.p50 / a.p50 - 1:+9.1%}   {mark}"
