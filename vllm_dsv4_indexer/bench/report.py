"""The result of a benchmark as tables. A result is what bench.json holds: `machine`, `options` and the `cells` of measure.py.

Cells of one case name, number of threads and state of the caches make one group, whose calls are pooled.
"""

from collections import defaultdict
from dataclasses import dataclass
from statistics import quantiles

from .contestants import FLOORS

ALGORITHMS = {"A": "overlay_scan", "B": "scatter_pool", "C": "cpu"}


@dataclass(frozen=True)
class Times:
    """The calls of one contestant in one group; times in nanoseconds a token, `call` in microseconds."""

    p10: float
    p50: float
    p90: float
    p99: float
    call: float


@dataclass(frozen=True)
class Group:
    case: str
    threads: int
    cache: str
    kind: str
    tokens: int  # of a call, and so is `bytes` (the mean, where they differ)
    bytes: float
    times: dict[str, Times]  # by contestant; "floor" is the faster of the two


def groups(result: dict) -> list[Group]:
    """The groups of a result, in the order of their first cells; by thread count and cache state first."""
    cells = defaultdict(list)
    for cell in result["cells"]:
        cells[cell["threads"], cell["cache"], cell["case"]].append(cell)
    return [_group(members) for _, members in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1] == "cold"))]


def _group(cells: list[dict]) -> Group:
    names = [name for name in cells[0]["nanoseconds"] if name not in FLOORS]
    calls = {name: [(ns, cell["tokens"]) for cell in cells for ns in cell["nanoseconds"][name]] for name in names}
    calls["floor"] = [(ns, cell["tokens"]) for cell in cells for ns in floor(cell)]
    first, tokens = cells[0], sum(cell["tokens"] for cell in cells)
    return Group(
        first["case"], first["threads"], first["cache"], first["kind"], tokens // len(cells),
        sum(cell["bytes"] for cell in cells) / len(cells), {name: _times(c) for name, c in calls.items()},
    )  # fmt: skip


def floor(cell: dict) -> list[int]:
    """The calls of the faster floor."""
    return min((cell["nanoseconds"][name] for name in FLOORS), key=median)


def median(values: list[float]) -> float:
    return percentile(values, 50)


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def _times(calls: list[tuple[int, int]]) -> Times:
    per_token = [ns / tokens for ns, tokens in calls]
    return Times(*(percentile(per_token, p) for p in (10, 50, 90, 99)), median([ns / 1000 for ns, _ in calls]))


def table(result: dict) -> str:
    """Everything that was measured, for reading."""
    parts = [_machine(result)]
    block = None
    for group in groups(result):
        if block != (block := (group.threads, group.cache)):
            parts.append(f"\n{where(group.cache, group.threads)}\n{'':16}{'us/call':>11}{'ns/token':>11}{'p10':>11}{'p90':>11}{'p99':>11}"
                         f"{'x vLLM':>9}{'GB/s':>7}{'of floor':>10}")  # fmt: skip
        parts.append(group.case)
        parts += [_line(group, name) for name in group.times]
    return "\n".join(parts + _algorithms(result))


def where(cache: str, threads: int) -> str:
    return f"{cache} caches, {threads} thread{'s' * (threads > 1)}"


def _line(group: Group, name: str) -> str:
    t, vllm = group.times[name], group.times.get("vllm")
    ratio = f"{vllm.p50 / t.p50:.2f}" if vllm else "-"
    share = group.times["floor"].p50 / t.p50
    return (f"  {name:14}{t.call:11.1f}{t.p50:11.1f}{t.p10:11.1f}{t.p90:11.1f}{t.p99:11.1f}{ratio:>9}"
            f"{group.bytes / group.tokens / t.p50:7.1f}{share:10.0%}")  # fmt: skip


def _algorithms(result: dict) -> list[str]:
    """The algorithms against each other on one request, where all three were measured."""
    lines, block = [], None
    for group in groups(result):
        if group.kind != "one" or not group.times.keys() >= set(ALGORITHMS.values()):
            continue
        a, b, c = (group.times[name].p50 for name in ALGORITHMS.values())
        if block != (block := (group.threads, group.cache)):
            lines.append(f"\nA overlay_scan, B scatter_pool, C cpu (one pass); ns/token, {where(group.cache, group.threads)}\n"
                         f"{'T':>8}{'A':>10}{'B':>10}{'C':>10}{'B saves of A':>15}{'C of A':>9}{'C of B':>9}")  # fmt: skip
        lines.append(f"{group.tokens:8}{a:10.1f}{b:10.1f}{c:10.1f}{1 - b / a:15.1%}{1 - c / a:9.1%}{1 - c / b:9.1%}")
    return lines


def _machine(result: dict) -> str:
    m = result["machine"]
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in m["caches"].items())
    return (
        f"{m['cpu']}, {m['cores']} cores ({caches}), {m['isa']}; load {m['load']} at the start; "
        f"torch {m['torch']}, vLLM {m['vllm'] or 'not installed'}; kv_score {result['options']['kv_dtype']}\n"
        f"bandwidth (floor, cold, longest call): {_bandwidth(result)}"
    )


def _bandwidth(result: dict) -> str:
    best = {g.threads: g for g in sorted(groups(result), key=lambda g: g.tokens) if g.cache == "cold"}
    return ", ".join(
        f"{g.bytes / g.tokens / g.times['floor'].p50:.1f} GB/s with {n} thread{'s' * (n > 1)}" for n, g in best.items()
    )


def compare(before: dict, after: dict) -> str:
    """What changed from one result to another, for what both measured. A change is marked where the spans from p10 to
    p90 do not meet."""
    lines = []
    for name, a, b in (("before", before, after), ("after", after, before)):
        if a["machine"] != b["machine"] or a["options"] != b["options"]:
            lines.append(f"{name}: {_machine(a)}")
    lines.append(f"{'':50}{'before':>10}{'after':>10}{'change':>9}   (ns/token)")
    old = {(g.case, g.threads, g.cache): g.times for g in groups(before)}
    for group in groups(after):
        times = old.get((group.case, group.threads, group.cache), {})
        for name in group.times.keys() & times.keys():
            lines.append(_change(f"{group.case}, {where(group.cache, group.threads)}: {name}", times[name], group.times[name]))
    return "\n".join(lines)


def _change(what: str, a: Times, b: Times) -> str:
    mark = "faster" if b.p90 < a.p10 else "slower" if b.p10 > a.p90 else ""
    return f"{what:50}{a.p50:10.1f}{b.p50:10.1f}{b.p50 / a.p50 - 1:+9.1%}   {mark}"
