"""The result of `accuracy`: needles as a table and a picture of length by depth, all else as
tables."""

import json
from collections import defaultdict
from html import escape
from itertools import chain
from statistics import fmean, stdev

from ..contract import RATIO
from .agreement import Agreement
from .recall import Recall
from .tasks import Z

DEPTHS = 10  # parts of a document
CELL, MARGIN = 56, 70


def shares(result: dict) -> dict[int, list[tuple[int, int]]]:
    """By length, for each tenth of the document: how many needles were found, of how many asked
    for."""
    by_length = defaultdict(lambda: [(0, 0)] * DEPTHS)
    for document in result["documents"]:
        depths = by_length[document["length"]]
        for how in ("key", "distance"):
            for entry, hit in zip(document["entries"], document[how], strict=True):
                depth = DEPTHS * 4 * entry // document["length"]
                found, of = depths[depth]
                depths[depth] = found + hit, of + 1
    return by_length


def needle_table(result: dict) -> str:
    """A row for each length, a column for each depth, in Markdown."""
    depths = [f"to {100 * (depth + 1) // DEPTHS} %" for depth in range(DEPTHS)]
    lines = [
        f"| tokens | needles | found by key | by distance | {' | '.join(depths)} |",
        "|---" * (DEPTHS + 4) + "|",
    ]
    by_length = shares(result)
    for document in result["documents"]:
        needles = len(document["entries"])
        cells = [_percent(sum(document[how]), needles) for how in ("key", "distance")]
        cells += [_percent(*counts) for counts in by_length[document["length"]]]
        lines.append(f"| {document['length']} | {needles} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heat_map(result: dict) -> str:
    """The heat map, written by hand, so that nothing need be installed."""
    rows = shares(result)
    engines = {
        "vllm": f"vLLM, dsv4_indexer {json.dumps(result['settings'])}",
        "transformers": "transformers",
    }
    who = result["url"] or engines[result["engine"]]
    width, height = 2 * MARGIN + DEPTHS * CELL, MARGIN + (len(rows) + 1) * CELL
    parts = [
        f'<text x="{MARGIN}" y="20">needles found, by length (tokens) and depth: {escape(who)}</text>'
    ]
    for i, (length, depths) in enumerate(rows.items()):
        top = MARGIN // 2 + i * CELL
        parts.append(
            f'<text x="{MARGIN - 8}" y="{top + CELL // 2}" text-anchor="end">{length}</text>'
        )
        for depth, counts in enumerate(depths):
            left, middle = MARGIN + depth * CELL, MARGIN + depth * CELL + CELL // 2
            parts.append(
                f'<rect x="{left}" y="{top}" width="{CELL - 1}" height="{CELL - 1}" fill="{_colour(*counts)}"/>'
                f'<text x="{middle}" y="{top + CELL // 2}" text-anchor="middle">{_percent(*counts)}</text>'
            )
    for depth in range(0, DEPTHS + 1, 2):
        x, y = MARGIN + depth * CELL, MARGIN // 2 + len(rows) * CELL + 15
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{100 * depth // DEPTHS} %</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def recall_table(recalls: list[Recall], lengths: list[int]) -> str:
    """A row for each range between two lengths, a column for each layer with an indexer, in
    Markdown. If there is another engine to compare with, the same of it and the mean difference,
    with its 95 % confidence interval."""
    columns = [layer for recall in recalls for layer in recall.values()]
    titles = [
        f"{whose}layer {number}"
        for whose, recall in zip(("", "the other's "), recalls)
        for number in recall
    ]
    titles += ["difference"] * (len(recalls) == 2)
    lines = [f"| tokens | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for low, high in zip([0, *lengths], lengths):
        inside = [
            [share for entries, share in column if low < RATIO * entries <= high]
            for column in columns
        ]
        if all(inside):
            cells = [f"{100 * fmean(shares):.2f} %" for shares in inside]
            if len(recalls) == 2:
                half = len(inside) // 2
                cells.append(_difference([*chain(*inside[:half])], [*chain(*inside[half:])]))
            lines.append(f"| to {high} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(one: list[float], other: list[float]) -> str:
    """In percentage points. The positions count as independent: over ten prompts the mean of a
    prompt spread as if they were (a deviation of 0.0115 points, 0.0101 expected)."""
    differences = [100 * (a - b) for a, b in zip(one, other, strict=True)]
    interval = Z * stdev(differences) / len(differences) ** 0.5
    return f"{fmean(differences):+.3f} ± {interval:.3f}"


def agreement_table(title: str, agreements: list[Agreement]) -> str:
    """A row for each schedule, in Markdown."""
    lines = [
        f"| {title} | positions | log-probabilities differ by | at most | same most likely token |",
        "|---" * 5 + "|",
    ]
    for schedule, positions, mean, largest, same in agreements:
        lines.append(
            f"| {schedule} | {positions} | {mean:.4f} | {largest:.3f} | {100 * same:.1f} % |"
        )
    return "\n".join(lines)


def task_table(result: dict) -> str:
    """A row for each task and metric, in Markdown."""
    servers = [result["url"], result["against_url"]]
    names = [
        "task",
        "metric",
        "samples",
        *servers,
        "difference",
        "95 % interval",
        "scores differ",
        "answers differ",
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in result["scores"]:
        samples = row["samples"]
        means = [
            100 * fmean(scores)
            for scores in zip(*(sample["scores"] for sample in samples), strict=True)
        ]
        difference, low, high = (
            f"{100 * value:+.1f}" for value in (row["difference"], *row["interval"])
        )
        cells = [
            row["task"],
            row["metric"],
            str(len(samples)),
            *(f"{mean:.1f} %" for mean in means),
        ]
        cells += [
            difference,
            f"{low} to {high}",
            _differ(samples, "scores"),
            _differ(samples, "answers"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _differ(samples: list[dict], what: str) -> str:
    return str(sum(one != other for one, other in (sample[what] for sample in samples)))


def _percent(found: int, of: int) -> str:
    return f"{100 * found / of:.0f} %" if of else ""


def _colour(found: int, of: int) -> str:
    """From red, nothing found, over yellow to green; grey where nothing was asked."""
    return f"hsl({120 * found / of:.0f} 65% 60%)" if of else "#ddd"
