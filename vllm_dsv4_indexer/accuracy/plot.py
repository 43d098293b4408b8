"""Needles found, by length and depth, as a picture."""

from matplotlib.figure import Figure

from .needles import Asked
from .report import DEPTHS, percent, shares


def heat_map(documents: list[Asked], who: str) -> Figure:
    """From red, nothing found, over yellow to green; a part in which nothing was asked is empty.
    `who` was asked."""
    rows = shares(documents)
    drawn = Figure(figsize=(8, 1 + 0.6 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    part = [[found / of if of else float("nan") for found, of in row] for row in rows.values()]
    axes.pcolormesh(part, cmap="RdYlGn", vmin=0, vmax=1, alpha=0.6, edgecolors="white", linewidth=2)
    for y, row in enumerate(rows.values()):
        for x, counts in enumerate(row):
            axes.text(
                x + 0.5, y + 0.5, percent(*counts), ha="center", va="center", fontsize="small"
            )
    axes.invert_yaxis()
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [str(length) for length in rows])
    borders = range(0, DEPTHS + 1, 2)
    axes.set_xticks(borders, [f"{100 * depth // DEPTHS} %" for depth in borders])
    axes.set_ylabel("tokens")
    axes.set_xlabel("depth")
    axes.set_title(f"needles found: {who}", fontsize="medium")
    return drawn
