"""The result of a benchmark as a picture.

One row of panels for each number of threads and state of the caches: nanoseconds a token
(logarithmic) and the share of the floor. Across: the tokens of a call of one request, or, for
traffic, how deep in its document a chunk lies.
"""

from collections import defaultdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .report import blocks, floor, median
from .result import Cell, Result

COLOURS = {
    "ours": "tab:red",
    "reference": "tab:purple",
    "one_pass": "tab:orange",
    "overlay_scan": "tab:green",
    "scatter_pool": "tab:blue",
    "vllm": "tab:gray",
    "vllm_ops": "tab:brown",
    "floor": "black",
    "readable": "tab:pink",
    "layer": "tab:cyan",
    "plan": "tab:olive",
    "checked": "tomato",
}
PANEL = (5.0, 2.8)  # inches
Series = dict[str, list[tuple[int, float]]]  # by contestant, points


def figure(result: Result) -> Figure:
    cells = [cell for cell in result["cells"] if cell["kind"] in ("one", "document")]
    lengths = any(cell["kind"] == "one" for cell in cells)
    rows = blocks(cells) or {"no call of one request": []}
    size = 2 * PANEL[0], len(rows) * PANEL[1] + 0.5
    drawn = Figure(figsize=size, layout="constrained")
    panels = drawn.subplots(len(rows), 2, squeeze=False)
    for (left, right), (block, here) in zip(panels, rows.items()):
        times, shares = _series(here, lengths)
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        right.set_ylim(0, 105)
        for panel, series, what in ((left, times, "ns/token"), (right, shares, "% of the floor")):
            panel.set_title(f"{what}, {block}", fontsize="medium")
            _draw(panel, series, lengths)
    legend = panels[0][0].get_legend_handles_labels()
    drawn.legend(*legend, loc="outside upper center", ncols=6, frameon=False)
    return drawn


def _series(cells: list[Cell], lengths: bool) -> tuple[Series, Series]:
    """Nanoseconds a token, and per cent of the floor, whose bytes a plan does not move."""
    times: Series = defaultdict(list)
    shares: Series = defaultdict(list)
    for cell in cells:
        x = cell["tokens"] if lengths else cell["context"]
        lowest = median(floor(cell))
        medians = {
            name: median(calls) for name, calls in cell["nanoseconds"].items() if name in COLOURS
        }
        for name, ns in (medians | {"floor": lowest}).items():
            times[name].append((x, ns / cell["tokens"]))
            if name != "plan":
                shares[name].append((x, 100 * lowest / ns))
    return times, shares


def _draw(panel: Axes, series: Series, lengths: bool) -> None:
    for name, points in series.items():
        xs, ys = zip(*sorted(points))
        style = "o-" if lengths else "o"
        panel.plot(xs, ys, style, color=COLOURS[name], label=name, markersize=3)
    panel.grid(color="0.9")
    if lengths:
        ticks = sorted({x for points in series.values() for x, _ in points})
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
    else:
        ticks = [k << 10 for k in range(0, 257, 64)]
        panel.set_xlabel("context, tokens")
    panel.set_xticks(ticks, [f"{x}" if lengths else f"{x >> 10}K" for x in ticks])
    panel.minorticks_off()
