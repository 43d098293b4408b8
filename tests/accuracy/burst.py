"""A burst of documents that begin alike, for an engine that gets all questions at once."""

import random
from dataclasses import replace

from vllm_dsv4_indexer.accuracy.document import Document, fill
from vllm_dsv4_indexer.checkpoint.needle import VALUES
from vllm_dsv4_indexer.contract import RATIO as GROUP

BURST = 12  # documents


def make_burst(common: int, seed: int = 0) -> list[Document]:
    """Documents with one needle each. They share their first `common` tokens, a multiple of 4, and
    are 4 to 48 tokens longer. The needle's key is the last shared token, its value the first of the
    document's own."""
    draw = random.Random(f"burst {common} {seed}")
    whole = fill(draw, common + 4 * BURST, {common // GROUP: -1})
    (needle,) = whole.needles
    documents = []
    for number, value in enumerate(draw.sample(VALUES, BURST), start=1):
        tokens = whole.tokens[: common + GROUP * number]
        tokens[common] = value
        documents.append(Document(tokens, [replace(needle, value=value)]))
    return documents
