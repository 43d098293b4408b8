"""Runs random calls of the op's native code under AddressSanitizer with UndefinedBehaviorSanitizer,
and under ThreadSanitizer. From the top of the checkout:

    python tests/native/sanitize.py [--seconds N] [--seed N]

ThreadSanitizer of GCC 12 does not start where the kernel places memory too randomly ("unexpected
memory mapping"): `sysctl vm.mmap_rnd_bits=28` helps.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def build(name: str) -> Path:
    """The folder of this folder's programs, built under the sanitizers of that name."""
    folder = ROOT / "build" / "sanitize" / name
    configure = ["cmake", "-S", HERE, "-B", folder, "-G", "Ninja", f"-DSANITIZE={SANITIZERS[name]}"]
    for command in (configure, ["cmake", "--build", folder]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def environment() -> dict[str, str]:
    """This process's, without LD_PRELOAD: a sanitizer's runtime must come first, and an engine of
    vLLM on a CPU sets it in the process that makes the engine."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def replay(program: Path | list, records: Iterable[bytes]) -> str:
    """Feeds records to a program `replay`; returns what it says. Raises AssertionError with its
    report if it finds something."""
    with subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    ) as process:
        try:
            for record in records:
                process.stdin.write(record)
            process.stdin.close()
        except BrokenPipeError:  # it has stopped at an earlier one, and says why
            pass
        report = process.stdout.read().decode()
    assert process.returncode == 0, report
    return report


def random_records(seeds: Iterable[int], seconds: float = float("inf")) -> Iterable[bytes]:
    """For each seed all CALLS, until the time is over."""
    from record import CALLS, arbitrary_batch, record

    end = time.monotonic() + seconds
    for seed in itertools.takewhile(lambda _: time.monotonic() < end, seeds):
        for algorithm, geometry in CALLS:
            yield record(arbitrary_batch(seed, geometry), algorithm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=300, help="for each (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call (default: 0)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "op"))  # for record.py
    for name, sanitizers in SANITIZERS.items():
        records = random_records(itertools.count(options.seed), options.seconds)
        said = replay(build(name) / "replay", records).strip()
        print(f"{said} under {sanitizers}: nothing found", flush=True)


if __name__ == "__main__":
    main()
