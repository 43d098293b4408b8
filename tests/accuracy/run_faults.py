"""Finds needles in one engine, with the right compressor and then with each fault planted.

    python tests/accuracy/run_faults.py MODEL RESULT.json [LENGTH [DOCUMENTS]]

MODEL is a needle checkpoint. Two documents at a time are prefilled side by side in chunks of a
prime number of tokens, so that windows cross chunks everywhere and another request's state is there
to be taken. Then comes a burst of documents that begin alike, in one step. RESULT and the table
that is printed give for each fault how many needles were found, of how many, by the place of the
needle and by how it was asked for.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import faults
from burst import make_burst
from torch import Tensor

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.accuracy.document import Document, Needle, make_document
from vllm_dsv4_indexer.accuracy.engines import VllmEngine
from vllm_dsv4_indexer.contract import Call, Extents, Layer, Step
from vllm_dsv4_indexer.ops import cpu

LENGTH = 6144  # tokens of a document: 1536 entries, three times the indexer's top-k
CHUNK = 509  # tokens
COMMON = 2304  # tokens of a burst: 576 entries, more than the indexer selects
ONE_STEP = 8192  # tokens: a burst is so many at most
RIGHT = "(none)"
K_FORMAT = "fp8_pow2"  # of the indexers
PLACES = {
    "anywhere": lambda needle: True,
    "key in the previous group": lambda needle: needle.position < 4 * needle.entry,
    "window across chunks": lambda needle: (
        needle.position < CHUNK * ((4 * needle.entry + 3) // CHUNK)
    ),
}
BEHIND_PREFIX = "behind a prefix of the same step"
COLUMNS = [*PLACES, "by distance", BEHIND_PREFIX]

Counts = dict[str, list[int]]


def main(model: str, result_file: str, length: int = LENGTH, documents: int = 2) -> None:
    planted = Planted()
    ops.IMPLEMENTATIONS["cpu"] = ops.IMPLEMENTATIONS["cpu"]._replace(load=lambda: planted.functions)
    engine = VllmEngine(model, {"state_save": "full"}, length, ONE_STEP)  # some faults read it
    haystacks = [make_document(length, seed, CHUNK, spacing=32) for seed in range(documents)]
    result = {}
    print(f"| planted fault | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, planted.compress in {RIGHT: faults.compress, **faults.FAULTS}.items():
        forget(engine)
        engine.set_chunk(CHUNK, abreast=2)
        result[name] = count(engine, haystacks)
        forget(engine)
        engine.set_chunk(ONE_STEP)
        questions = [(document, document.needles[0]) for document in make_burst(COMMON)]
        hits = [hit for hits in engine.ask(questions).values() for hit in hits]
        result[name][BEHIND_PREFIX] = [sum(hits), len(hits)]
        shares = [f"{100 * hits / of:.0f} %" for hits, of in result[name].values()]
        print(f"| {name} | {' | '.join(shares)} |", flush=True)
    Path(result_file).write_text(json.dumps(result))


def forget(engine: VllmEngine) -> None:
    """As if the engine were new: a row that was there before could be the right one, or do as well,
    by chance."""
    engine.llm.reset_prefix_cache()
    for layer in engine.indexed_layers().values():
        layer.indexer.compressor.state_cache.kv_cache.zero_()


class Planted:
    """An implementation of which the run of each layer's indexer is the `compress` of the moment,
    planning included."""

    compress: faults.Compress = staticmethod(faults.compress)

    def __init__(self):
        self.functions = ops.Functions(self.plan, self.bind)

    def plan(self, step: Step, extents: Extents, *ratio: int) -> Tensor:
        if not ratio:
            self.step = step
        return cpu.plan(step, extents, *ratio)  # that the engine has one to hand on

    def bind(self, layer: Layer, **options) -> Callable[[Tensor, Tensor], int]:
        if options["k_format"] != K_FORMAT:
            return cpu.bind(layer, **options)

        def run(kv_score: Tensor, _: Tensor) -> int:
            return self.compress(
                Call(kv_score, **layer._asdict(), **self.step._asdict()), **options
            )

        return run


def count(engine: VllmEngine, haystacks: list[Document]) -> Counts:
    """By column, how many needles were found, of how many."""
    counts = {column: [0, 0] for column in [*PLACES, "by distance"]}
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
    return (
        ["by distance"]
        if how == "distance"
        else [place for place, holds in PLACES.items() if holds(needle)]
    )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
