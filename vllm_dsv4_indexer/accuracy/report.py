"""The result of `accuracy`: needles as a table and a picture of length by depth, recall as a table."""

from collections import defaultdict
from html import escape
from statistics import fmean

DEPTHS = 10  # parts of a document
CELL, MARGIN = 56, 70


def shares(result: dict) -> dict[int, list[tuple[int, int]]]:
    """By length, for each tenth of the document: how many needles were found, of how many asked for."""
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
    lines = [f"| tokens | needles | found by key | by distance | {' | '.join(depths)} |", "|---" * (DEPTHS + 4) + "|"]
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
    width, height = 2 * MARGIN + DEPTHS * CELL, MARGIN + (len(rows) + 1) * CELL
    parts = [
        f'<text x="{MARGIN}" y="20">needles found, by length (tokens) and depth: {escape(result["engine"])}</text>'
    ]
    for i, (length, depths) in enumerate(rows.items()):
        top = MARGIN // 2 + i * CELL
        parts.append(f'<text x="{MARGIN - 8}" y="{top + CELL // 2}" text-anchor="end">{length}</text>')
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


def recall_table(result: dict, lengths: list[int]) -> str:
    """A row for each range between two lengths, a column for each layer with an indexer, in Markdown."""
    layers = result["recall"]
    lines = [f"| tokens |{'|'.join(f' layer {layer} ' for layer in layers)}|", "|---" * (len(layers) + 1) + "|"]
    for low, high in zip([0, *lengths], lengths):
        inside = [[share for entries, share in layer if low < 4 * entries <= high] for layer in layers.values()]
        if all(inside):
            lines.append(f"| to {high} |{'|'.join(f' {100 * fmean(shares):.2f} % ' for shares in inside)}|")
    return "\n".join(lines)


def agreement_table(result: dict) -> str:
    """A row for each schedule, in Markdown."""
    lines = ["| schedule | positions | log-probabilities differ by | at most | same most likely token |", "|---" * 5 + "|"]
    for schedule, positions, mean, largest, same in result["agreement"]:
        lines.append(f"| {schedule} | {positions} | {mean:.4f} | {largest:.3f} | {100 * same:.1f} % |")
    return "\n".join(lines)


def _percent(found: int, of: int) -> str:
    return f"{100 * found / of:.0f} %" if of else ""


def _colour(found: int, of: int) -> str:
    """From red, nothing found, over yellow to green; grey where nothing was asked."""
    return f"hsl({120 * found / of:.0f} 65% 60%)" if of else "#ddd"
