"""Plants the faults of mutants.py and seams.py, one at a time, in a copy of the tree, and runs the
test that must catch each. Fails if one survives, or cannot be built.

    python tests/mutants/run.py [WORD...]    those alone whose file has a WORD in its name
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants import MUTANTS, Mutant
from seams import CONTRACT, FAMILIES, SEAMS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/engine_ascend"))
from pairs import environment_of

LIBRARY = "libdsv4_indexer_cpu.so"
# Of the copy's package, also where an editable installation shows imports another way.
PYTEST = """
import os, sys
sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "known_source_files")]
sys.path.insert(0, os.getcwd())
import pytest, vllm_dsv4_indexer
assert vllm_dsv4_indexer.__file__.startswith(os.getcwd()), vllm_dsv4_indexer.__file__
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def copy_tree(to: Path) -> None:
    for part in ("csrc", "tests", "vllm_dsv4_indexer"):
        shutil.copytree(
            ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(ROOT / "pyproject.toml", to)
    configure = ["cmake", "-S", "csrc", "-B", "build"]
    subprocess.run(configure, cwd=to, check=True, capture_output=True)


def build(tree: Path) -> bool:
    """Builds what has changed. The emulation of an NPU is built by its tests."""
    if subprocess.run(["cmake", "--build", "build"], cwd=tree, capture_output=True).returncode:
        return False
    shutil.copy(tree / "build" / LIBRARY, tree / "vllm_dsv4_indexer")
    return True


def fate(tree: Path, mutant: Mutant) -> str:
    path = tree / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} does not have once: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        if not build(tree):
            return "NOT BUILT"
        return outcome(run(tree, vllm_ascend_of(mutant), mutant.test))
    finally:
        path.write_text(text)


def vllm_ascend_of(mutant: Mutant) -> str | None:
    """The version that a contract test runs with; None for another test."""
    if not mutant.test.startswith(CONTRACT):
        return None
    return next((v for part, v in FAMILIES.items() if part in mutant.file), max(FAMILIES.values()))


def run(tree: Path, vllm_ascend: str | None, *tests: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PYTEST, *(f"tests/{test}" for test in tests)]
    environment = {}
    if vllm_ascend:
        command += ["--confcutdir", f"tests/{CONTRACT}", "-o", "python_files=check_*.py"]
        environment = environment_of(vllm_ascend, "A2")
    environment = os.environ | environment
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def outcome(done: subprocess.CompletedProcess) -> str:
    if done.returncode == 1 and "CalledProcessError" in done.stdout:
        return "NOT BUILT"  # the emulation
    if done.returncode == 1 or done.returncode < 0:  # failed or crashed
        return "caught"
    return "SURVIVED" if done.returncode == 0 else f"NOT RUN\n{done.stdout}{done.stderr}"


def main(words: list[str]) -> int:
    every = [*MUTANTS, *SEAMS]
    chosen = [m for m in every if not words or any(word in m.file for word in words)]
    fates = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        build(tree)
        for version in {vllm_ascend_of(m) for m in chosen}:
            tests = {m.test for m in chosen if m.test and vllm_ascend_of(m) == version}
            without = run(tree, version, *tests)
            assert not without.returncode, f"a test fails without a fault: {without.stdout}"
        for mutant in chosen:
            found = "equivalent" if mutant.equivalent else fate(tree, mutant)
            fates.append(found)
            print(f"{found:10}  {mutant.file:38}  {mutant.old}  ->  {mutant.new}", flush=True)
    bad = sum(found not in ("caught", "equivalent") for found in fates)
    print(f"{len(fates)} faults, of which {bad} were not caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
