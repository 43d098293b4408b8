"""Haystacks for the needle checkpoint. checkpoint/needle.py says what the tokens mean.

Every entry of a document has a pair of a key and a value. Most are near misses. Some are needles,
between two decoys that erase the needle if the indexer's windows are wrong.
"""

import random
from dataclasses import dataclass

from ..checkpoint.needle import DECOYS, DISTANCES, FILLERS, KEYS, QUESTIONS, VALUES
from ..contract import FP8_PAGE_ENTRIES as PAGE
from ..contract import RATIO as GROUP


@dataclass(frozen=True)
class Needle:
    """A pair that a question can ask for.

    entry: the index of its entry. position: of its key; its value is the next token. key: an index
    into KEYS. value: the token that answers the question."""

    entry: int
    position: int
    key: int
    value: int


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    needles: list[Needle]

    def ask_by_key(self, needle: Needle) -> list[int]:
        """The prompt whose next token is the needle's value."""
        return [*self.tokens, QUESTIONS[needle.key]]

    def ask_by_distance(self, needle: Needle) -> list[int]:
        """The same, but only the distance between question and needle says which pair is meant."""
        return [*self.tokens, _distance(needle, len(self.tokens))]

    def all_questions(self) -> list[int]:
        """Four tokens for each needle, to follow the document: a question by distance, one by key,
        two of filler. A question has neither key nor value, so to the later ones the earlier ones
        are filler."""
        end = len(self.tokens)
        questions = [
            (_distance(needle, end + GROUP * index), QUESTIONS[needle.key], FILLERS[0], FILLERS[0])
            for index, needle in enumerate(self.needles)
        ]
        return [token for group in questions for token in group]


def _distance(needle: Needle, position: int) -> int:
    """The question at `position`, a multiple of 4, that means the needle."""
    return DISTANCES[position // GROUP - needle.entry]


def make_document(
    length: int, seed: int = 0, chunk: int | None = None, spacing: int = 8
) -> Document:
    """A document of `length` tokens, a multiple of 4. About one entry in `spacing` has a needle.

    So have the first and the last entry, and those at the borders of pages. If the engine prefills
    `chunk` tokens a step, so have the entries whose windows lie across a border, with the key
    before it. Keys stand at all four offsets.
    """
    draw = random.Random(f"{length} {seed}")
    return fill(draw, length, _apart(_hosts(draw, length // GROUP, chunk or length, spacing)))


def fill(draw: random.Random, length: int, hosts: dict[int, int]) -> Document:
    """hosts: the entries with a needle, and the last offset that the key of each may have."""
    entries = length // GROUP
    tokens = draw.choices(FILLERS, k=length)
    keys, decoys = draw.sample(range(len(KEYS)), entries), iter(draw.sample(DECOYS, entries))
    needles = []
    free = 0  # the first position that no pair holds
    for entry in range(entries):
        near_needle = entry - 1 in hosts or entry + 1 in hosts
        last = hosts.get(entry, 1 if entry + 1 in hosts else 2)  # leaves room for any needle
        position = draw.randint(max(free, GROUP * entry - 1), GROUP * entry + last)
        value = draw.choice(VALUES)
        tokens[position : position + 2] = [
            next(decoys) if near_needle else KEYS[keys[entry]],
            value,
        ]
        if entry in hosts:
            needles.append(Needle(entry, position, keys[entry], value))
        free = position + 2
    return Document(tokens, needles)


def _hosts(draw: random.Random, entries: int, chunk: int, spacing: int) -> dict[int, int]:
    """The entries that are to have a needle, the most important first, and the last offset that
    the key of each may have."""
    latest = {0: 2, entries - 1: 2}
    for border in range(chunk, GROUP * entries, chunk):
        latest[border // GROUP] = border % GROUP - 1
    for border in range(PAGE, entries, PAGE):
        latest.setdefault(border - draw.randint(0, 1), 2)
    for start in range(0, entries, spacing):
        latest.setdefault(min(start + draw.randrange(spacing), entries - 1), 2)
    return latest


def _apart(hosts: dict[int, int]) -> dict[int, int]:
    """Those without an earlier one beside them."""
    chosen = {}
    for entry, latest in hosts.items():
        if entry - 1 not in chosen and entry + 1 not in chosen:
            chosen[entry] = latest
    return chosen
