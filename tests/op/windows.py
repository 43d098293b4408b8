"""Compares the native op with the reference on as many random windows as are asked for, byte by
byte: what they store, and what they must leave as it was. From the top of the checkout:

    python tests/op/windows.py [--windows N] [--geometry 128/4] [--seed S]
"""

import argparse
import random
import time

from batches import assert_close, make_batch, random_case
from vllm_dsv4_indexer.contract import GEOMETRIES

GEOMETRY = {f"{geometry.head_dim}/{geometry.ratio}": geometry for geometry in GEOMETRIES}
LONGEST = 400  # windows of a request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--windows", type=int, default=10_000_000, help="default: %(default)s")
    parser.add_argument(
        "--geometry", choices=GEOMETRY, default="128/4", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first batch (default: 0)")
    options = parser.parse_args()
    geometry = GEOMETRY[options.geometry]
    longest = LONGEST * geometry.ratio
    windows = values = neighbours = 0
    start, seed = time.monotonic(), options.seed
    while windows < options.windows:
        batch = make_batch(**random_case(random.Random(seed), geometry, longest))
        again = (
            f"python tests/op/windows.py --windows 1 --geometry {options.geometry} --seed {seed}"
        )
        native, reference = (batch.clone().compress(impl) for impl in ("cpu", "reference"))
        differ, stored = assert_close(native, reference, again)
        neighbours, values = neighbours + differ, values + stored
        windows += int((batch.k_slot_mapping >= 0).sum())
        seed += 1
    print(
        f"{windows} windows of {options.geometry} in {seed - options.seed} batches, "
        f"{time.monotonic() - start:.0f} s: every byte is the reference's, but for {neighbours} of "
        f"{values} values that are the neighbouring code"
    )


if __name__ == "__main__":
    main()
