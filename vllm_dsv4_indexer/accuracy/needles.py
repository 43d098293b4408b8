"""Needles in haystacks, asked for at every length and depth."""

import time
from typing import TypedDict

from .document import make_document
from .engines import Finder


class Asked(TypedDict):
    """One document. length: its tokens. entries: where its needles are. key, distance: of each
    needle, whether it was found, asked for by its key and by its distance from the question."""

    length: int
    entries: list[int]
    key: list[bool]
    distance: list[bool]


def find(finder: Finder, lengths: list[int], seed: int, chunk: int) -> list[Asked]:
    """A document of each length; `chunk` is how many tokens of it a step prefills."""
    asked: list[Asked] = []
    for length in lengths:
        start = time.monotonic()
        document = make_document(length, seed, chunk, spacing=max(8, length // 256))
        found = finder.found(document)
        entries = [needle.entry for needle in document.needles]
        asked.append({"length": length, "entries": entries, **found})
        print(
            f"{length} tokens: {len(entries)} needles, {time.monotonic() - start:.0f} s", flush=True
        )
    return asked
