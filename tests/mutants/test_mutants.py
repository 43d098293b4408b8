"""The list of faults fits the sources and the tests that it names. `make mutants` plants them."""

from pathlib import Path

import pytest
from mutants import MUTANTS
from seams import SEAMS

ROOT = Path(__file__).parents[2]
ALL = [*MUTANTS, *SEAMS]


@pytest.mark.parametrize("mutant", ALL, ids=lambda m: f"{m.file}: {m.old} -> {m.new}")
def test_a_fault_stands_once_in_its_file_and_names_a_test_or_a_reason(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert bool(mutant.test) != bool(mutant.equivalent)
    file, _, name = mutant.test.partition("::")
    assert mutant.equivalent or f"def {name}" in (ROOT / "tests" / file).read_text()


def test_no_fault_is_listed_twice():
    assert len(ALL) == len({mutant[:3] for mutant in ALL})
    assert len(MUTANTS) >= 60 and len(SEAMS) >= 60
