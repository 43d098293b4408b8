"""The result of a benchmark as a picture: an SVG file, written by hand, so that nothing need be
installed.

One row of panels for each number of threads and state of the caches: nanoseconds a token
(logarithmic) and the share of the floor. Across: the tokens of a call of one request, or, for
traffic, how deep in its document a chunk lies.
"""

import math
from html import escape

from .report import blocks, floor, median

COLOURS = {
    "cpu": "#d62728",
    "reference": "#9467bd",
    "one_pass": "#ff7f0e",
    "overlay_scan": "#2ca02c",
    "scatter_pool": "#1f77b4",
    "vllm": "#7f7f7f",
    "vllm_ops": "#8c564b",
    "floor": "#000000",
    "tail": "#e377c2",
    "layer": "#17becf",
    "plan": "#bcbd22",
}
WIDTH, HEIGHT, MARGIN = 360, 200, 60


def svg(result: dict) -> str:
    """The picture as text."""
    cells = [cell for cell in result["cells"] if cell["kind"] in ("one", "document")]
    across = "tokens" if any(cell["kind"] == "one" for cell in cells) else "context"
    parts, names = [], {}
    rows = blocks(cells)
    for i, (where, here) in enumerate(rows.items()):
        times, shares = _series(here, across)
        names |= dict.fromkeys(times)
        top = MARGIN + i * (HEIGHT + MARGIN)
        parts.append(_panel(MARGIN, top, f"ns/token, {where}", times, across, log_y=True))
        parts.append(
            _panel(2 * MARGIN + WIDTH, top, f"% of the floor, {where}", shares, across, log_y=False)
        )
    legend = "".join(
        f'<text x="{MARGIN + 105 * i}" y="20" fill="{COLOURS[name]}">{escape(name)}</text>'
        for i, name in enumerate(names)
    )
    width, height = 2 * (WIDTH + MARGIN) + MARGIN // 2, MARGIN + len(rows) * (HEIGHT + MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>{legend}{"".join(parts)}</svg>\n'
    )


def _series(cells: list[dict], across: str) -> tuple[dict, dict]:
    """By contestant, the points (x, nanoseconds a token) and (x, per cent of the floor)."""
    times, shares = {}, {}
    for cell in sorted(cells, key=lambda cell: cell[across]):
        lowest = median(floor(cell))
        medians = {
            name: median(calls) for name, calls in cell["nanoseconds"].items() if name in COLOURS
        }
        for name, ns in (medians | {"floor": lowest}).items():
            times.setdefault(name, []).append((cell[across], ns / cell["tokens"]))
            shares.setdefault(name, []).append((cell[across], 100 * lowest / ns))
    return times, shares


def _panel(left: int, top: int, title: str, series: dict, across: str, log_y: bool) -> str:
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points] + [0, 100] * (not log_y)
    x_ticks = (
        {x: f"{x}" for x in xs}
        if across == "tokens"
        else {k << 10: f"{k}K" for k in range(0, 257, 64)}
    )
    y_ticks = _round_numbers(min(ys), max(ys)) if log_y else range(0, 101, 25)
    x_of = _scale(min(x_ticks), max(x_ticks), left, left + WIDTH, across == "tokens")
    y_of = _scale(min(ys), max(ys), top + HEIGHT, top, log_y)
    parts = [f'<text x="{left}" y="{top - 8}">{escape(title)}</text>']
    for y in y_ticks:
        parts.append(
            f'<path d="M{left},{y_of(y):.1f}h{WIDTH}" stroke="#ddd"/>'
            f'<text x="{left - 5}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x, text in x_ticks.items():
        parts.append(
            f'<text x="{x_of(x):.1f}" y="{top + HEIGHT + 15}" text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<text x="{left + WIDTH}" y="{top + HEIGHT + 30}" text-anchor="end">{across}</text>'
    )
    for name, points in series.items():
        places = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in points]
        if across == "tokens":
            line = " ".join(",".join(place) for place in places)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>'
            )
        else:
            parts += [
                f'<circle cx="{x}" cy="{y}" r="2.5" fill="{COLOURS[name]}"/>' for x, y in places
            ]
    return "".join(parts)


def _scale(low: float, high: float, start: float, end: float, log: bool):
    """The function from [low, high] to [start, end]."""
    measure = math.log if log else float
    span = (measure(high) - measure(low)) or 1
    return lambda value: start + (measure(value) - measure(low)) / span * (end - start)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within the range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10**e for e in exponents for m in (1, 2, 5) if low <= m * 10**e <= high]
