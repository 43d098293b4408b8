"""Haystacks for the needle checkpoint (checkpoint/needle.py, which says what the tokens mean).

Every entry of a document hosts a pair: thousands of near misses, and here and there a needle
between two decoys, which erase it if the windows of the indexer are wrong.
"""

import random
from dataclasses import dataclass, replace

from ..checkpoint.needle import DECOYS, DISTANCES, FILLERS, KEYS, QUESTIONS, VALUES
from ..contract import FP8_PAGE_ENTRIES as PAGE
from ..contract import RATIO as GROUP

BURST = 12  # documents of a burst


@dataclass(frozen=True)
class Needle:
    """A pair that a question can ask for.

    entry: the index of its entry. position: of its key; its value is the next token. key: of KEYS,
    counted from 0. value: the token that answers the question."""

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
        """The same, where only the distance between question and needle says which pair is
        meant."""
        return [*self.tokens, _distance(needle, len(self.tokens))]

    def all_questions(self) -> list[int]:
        """Four tokens for each needle, to follow the document: by distance, by key, two of filler.
        A question is no key and no value, so those before it are nothing but a longer document."""
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
    """A document of `length` tokens, a multiple of 4, of which about one entry in `spacing` hosts a
    needle.

    So do the first and the last entry, those at the borders of pages, and, if the engine prefills
    in steps of `chunk` tokens, those whose windows lie across a border, with the key before it.
    Keys stand at all four offsets.
    """
    draw = random.Random(f"{length} {seed}")
    return _fill(draw, length, _apart(_hosts(draw, length // GROUP, chunk or length, spacing)))


def make_burst(common: int, seed: int = 0) -> list[Document]:
    """Documents with one needle each and the first `common` tokens in common, a multiple of 4: the
    needle's key is the last of these, its value the first that a document has of its own. They are
    4 to 48 tokens longer."""
    draw = random.Random(f"burst {common} {seed}")
    whole = _fill(draw, common + 4 * BURST, {common // GROUP: -1})
    (needle,) = whole.needles
    documents = []
    for number, value in enumerate(draw.sample(VALUES, BURST), start=1):
        tokens = whole.tokens[: common + GROUP * number]
        tokens[common] = value
        documents.append(Document(tokens, [replace(needle, value=value)]))
    return documents


def _fill(draw: random.Random, length: int, hosts: dict[int, int]) -> Document:
    """A document in which `hosts` hold the needles; of each the last offset that its key may
    have."""
    entries = length // GROUP
    tokens = draw.choices(FILLERS, k=length)
    needles, keys, decoys = (
        [],
        draw.sample(range(len(KEYS)), entries),
        iter(draw.sample(DECOYS, entries)),
    )
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
    """The entries that are to host a needle, the most important first, with the last offset that
    its key may have."""
    latest = {0: 2, entries - 1: 2}
    for border in range(chunk, GROUP * entries, chunk):
        latest[border // GROUP] = border % GROUP - 1
    for border in range(PAGE, entries, PAGE):
        latest.setdefault(border - draw.randint(0, 1), 2)
    for start in range(0, entries, spacing):
        latest.setdefault(min(start + draw.randrange(spacing), entries - 1), 2)
    return latest


def _apart(hosts: dict[int, int]) -> dict[int, int]:
    """Those that have no earlier one beside them."""
    chosen = {}
    for entry, latest in hosts.items():
        if entry - 1 not in chosen and entry + 1 not in chosen:
            chosen[entry] = latest
    return chosen
