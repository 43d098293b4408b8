"""Whether an implementation stores what the reference stores, on random cases."""

import random
from typing import NamedTuple

from .batches import Batch, make_batch, random_case
from .contract import GEOMETRIES
from .replay import first_difference, store


class Result(NamedTuple):
    entries: int
    neighbours: int  # codes beside the reference's, where a value lies between two
    difference: str  # of the first case that differs, with the line that repeats it; else empty


def compare(impl: str, cases: int, seed: int) -> Result:
    """The cases of `cases` seeds, from `seed` on, of each kind of compressor in turn."""
    entries = neighbours = 0
    for number in range(seed, seed + cases):
        batch = _case(number)
        slots, page = batch.inner_state_slot_mapping, batch.inner_state_cache.shape[1]
        pages = (slots[slots >= 0] // page).unique()
        reference, other = (
            store(batch.clone().call, batch.eps, batch.k_format, name, pages)
            for name in ("reference", impl)
        )
        entries += len(reference.codes)
        neighbours += int((reference.codes != other.codes).sum())
        if difference := other.refused or first_difference(reference, other, pages):
            again = f"vllm-dsv4-indexer doctor --cases 1 --seed {number}"
            return Result(entries, neighbours, f"{difference} by {impl}; again: {again}")
    return Result(entries, neighbours, "")


def _case(seed: int) -> Batch:
    """In the format of vLLM's CPU engine."""
    geometry, formats = list(GEOMETRIES.items())[seed % len(GEOMETRIES)]
    case = random_case(random.Random(seed), geometry) | {"k_format": formats[0]}
    return make_batch(**case)
