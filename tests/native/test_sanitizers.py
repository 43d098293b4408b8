"""The native code under sanitizers; `make sanitize` and `make fuzz` run longer.

Each call runs with every instruction set and on several threads, and must store what the library of
this process stores. corpus/ holds inputs that the fuzzer has found worth keeping.
"""

import subprocess

import pytest

from record import arbitrary_batch, record
from sanitize import HERE, SANITIZERS, build, environment, random_records, replay


@pytest.fixture(scope="module")
def programs():
    return {name: build(name) for name in SANITIZERS}


@pytest.mark.parametrize("name", SANITIZERS)
def test_random_calls_do_nothing_that_a_sanitizer_forbids(programs, name):
    assert replay(programs[name] / "replay", random_records(range(10))) == "80 calls\n"


def test_what_the_fuzzer_has_kept_does_nothing_that_a_sanitizer_forbids(programs):
    inputs = sorted((HERE / "corpus").iterdir())
    done = subprocess.run(
        [programs["address"] / "fuzz", *inputs],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (done.returncode, done.stdout) == (0, f"{len(inputs)} inputs\n"), done.stderr


def test_a_call_that_stores_another_byte_is_found(programs):
    recorded = bytearray(record(arbitrary_batch(0), "one_pass"))
    recorded[-1] ^= 1
    with pytest.raises(AssertionError, match="call 0, one_pass: another outcome than recorded"):
        replay(programs["address"] / "replay", [bytes(recorded)])
