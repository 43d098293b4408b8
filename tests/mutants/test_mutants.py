"""The list of faults fits the sources and the tests that it names. `make mutants` plants them."""

from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.old} -> {m.new}")
def test_a_fault_stands_once_in_its_file_and_names_a_test_or_a_reason(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert bool(mutant.test) != bool(mutant.equivalent)
    file, _, name = mutant.test.partition("::")
    assert mutant.equivalent or f"def {name}" in (ROOT / "tests" / file).read_text()


def test_the_list_has_no_fault_twice():
    assert len(MUTANTS) == len({mutant[:3] for mutant in MUTANTS}) >= 60
