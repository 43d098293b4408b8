"""The results of `accuracy` as tables."""

from collections.abc import Iterable
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

from .. import output
from ..contract import RATIO
from .agreement import Agreement
from .needles import Asked
from .recall import Recall
from .tasks import Scores

if TYPE_CHECKING:
    from rich.table import Table

DEPTHS = 10  # parts of a document
Shares = list[tuple[int, int]]  # of each part: needles found, of how many asked for


def shares(documents: list[Asked]) -> dict[int, Shares]:
    """By length of the document."""
    return {document["length"]: _shares(document) for document in documents}


def _shares(document: Asked) -> Shares:
    counts = [(0, 0)] * DEPTHS
    for hits in (document["key"], document["distance"]):
        for entry, hit in zip(document["entries"], hits, strict=True):
            depth = DEPTHS * RATIO * entry // document["length"]
            found, of = counts[depth]
            counts[depth] = found + hit, of + 1
    return counts


def needle_table(documents: list[Asked]) -> "Table":
    """A row for each length, a column for each depth."""
    depths = [f"to {100 * (depth + 1) // DEPTHS} %" for depth in range(DEPTHS)]
    rows = []
    for document, counts in zip(documents, shares(documents).values(), strict=True):
        needles = len(document["entries"])
        by_question = [(sum(hits), needles) for hits in (document["key"], document["distance"])]
        cells = [percent(*count) for count in (*by_question, *counts)]
        rows.append([str(document["length"]), str(needles), *cells])
    return output.table(["tokens", "needles", "found by key", "by distance", *depths], rows)


def percent(found: int, of: int) -> str:
    return f"{100 * found / of:.0f} %" if of else ""


def recall_table(recalls: list[Recall], lengths: list[int]) -> "Table":
    """A row for each range between two lengths, a column for each layer with an indexer. If there
    is another engine to compare with, the same of it and the mean difference, with its 95 %
    confidence interval."""
    titles = [
        f"{whose}layer {number}"
        for whose, recall in zip(("", "the other's "), recalls)
        for number in recall
    ]
    titles += ["difference"] * (len(recalls) == 2)
    rows = []
    for low, high in zip([0, *lengths], lengths):
        inside = [
            [share for entries, share in layer if low < RATIO * entries <= high]
            for recall in recalls
            for layer in recall.values()
        ]
        if all(inside):
            cells = [f"{100 * fmean(of_layer):.2f} %" for of_layer in inside]
            if len(recalls) == 2:
                cells.append(_difference(inside[: len(inside) // 2], inside[len(inside) // 2 :]))
            rows.append([f"to {high}", *cells])
    return output.table(["tokens", *titles], rows)


def _difference(one: Iterable[list[float]], other: Iterable[list[float]]) -> str:
    """In percentage points, with Student's interval of a mean. The positions count as independent:
    over ten prompts the mean of a prompt spread as if they were (a deviation of 0.0115 points,
    0.0101 expected)."""
    from scipy import stats

    pairs = zip(chain(*one), chain(*other), strict=True)
    differences = [100 * (a - b) for a, b in pairs]
    interval = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{fmean(differences):+.3f} ± {interval:.3f}"


def agreement_table(title: str, agreements: list[Agreement]) -> "Table":
    """A row for each schedule."""
    columns = [title, "positions", "log-probabilities differ by", "at most"]
    rows = (
        [schedule, str(positions), f"{mean:.4f}", f"{largest:.3f}", f"{100 * same:.1f} %"]
        for schedule, positions, mean, largest, same in agreements
    )
    return output.table([*columns, "same most likely token"], rows)


def task_table(servers: list[str], scores: list[Scores]) -> "Table":
    """A row for each task and metric."""
    columns = ["task", "metric", "samples", *servers, "difference", "95 % interval"]
    return output.table(
        [*columns, "scores differ", "answers differ"], map(_task_row, scores), names=2
    )


def _task_row(row: Scores) -> list[str]:
    samples = row["samples"]
    means = [100 * fmean(sample["scores"][server] for sample in samples) for server in (0, 1)]
    difference, low, high = (
        f"{100 * value:+.1f}" for value in (row["difference"], *row["interval"])
    )
    return [
        row["task"],
        row["metric"],
        str(len(samples)),
        *(f"{mean:.1f} %" for mean in means),
        difference,
        f"{low} to {high}",
        _differ([sample["scores"] for sample in samples]),
        _differ([sample["answers"] for sample in samples]),
    ]


def _differ(pairs: Iterable[list[float] | list[list[str]]]) -> str:
    return str(sum(one != other for one, other in pairs))
