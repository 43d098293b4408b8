"""Finds needles in one engine, with the right compressor and then with each fault planted.

    python tests/accuracy/run_faults.py MODEL RESULT.json [LENGTH [DOCUMENTS]]

MODEL is a needle checkpoint. Two documents at a time are prefilled side by side in chunks of a prime number of
tokens, so that windows cross chunks everywhere and another request's state is there to be taken. RESULT and the table
that is printed give for each fault how many needles were found, of how many, by the place of the needle and by how it
was asked for.
"""

import json
import sys
from pathlib import Path

import faults

from vllm_dsv4_indexer.accuracy.document import Document, Needle, make_document
from vllm_dsv4_indexer.accuracy.engines import VllmEngine
from vllm_dsv4_indexer.ops import cpu

LENGTH = 6144  # tokens of a document: 1536 entries, three times the indexer's top-k
CHUNK = 509  # tokens
RIGHT = "(none)"
PLACES = {
    "anywhere": lambda needle: True,
    "key in the previous group": lambda needle: needle.position < 4 * needle.entry,
    "window across chunks": lambda needle: needle.position < CHUNK * ((4 * needle.entry + 3) // CHUNK),
}
COLUMNS = [*PLACES, "by distance"]

Counts = dict[str, list[int]]


def main(model: str, result_file: str, length: int = LENGTH, documents: int = 2) -> None:
    now = faults.right
    cpu.compress = lambda *tensors, **options: now(*tensors, **options)  # before the engine looks it up
    engine = VllmEngine(model, {}, length, CHUNK, abreast=2)
    haystacks = [make_document(length, seed, CHUNK, spacing=32) for seed in range(documents)]
    result = {}
    print(f"| planted fault | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, now in {RIGHT: faults.right, **faults.FAULTS}.items():
        engine.llm.reset_prefix_cache()
        result[name] = count(engine, haystacks)
        shares = [f"{100 * hits / of:.0f} %" for hits, of in result[name].values()]
        print(f"| {name} | {' | '.join(shares)} |", flush=True)
    Path(result_file).write_text(json.dumps(result))


def count(engine: VllmEngine, haystacks: list[Document]) -> Counts:
    """By column, how many needles were found, of how many."""
    counts = {column: [0, 0] for column in COLUMNS}
    for two in zip(haystacks[::2], haystacks[1::2], strict=True):
        engine.answers([document.tokens for document in two])
        for document in two:
            for how, hits in engine.found(document).items():
                for needle, hit in zip(document.needles, hits, strict=True):
                    for column in columns(needle, how):
                        counts[column][0] += hit
                        counts[column][1] += 1
    return counts


def columns(needle: Needle, how: str) -> list[str]:
    return ["by distance"] if how == "distance" else [place for place, holds in PLACES.items() if holds(needle)]


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
