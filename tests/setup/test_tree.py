"""What the checkout contains, what `make clean` takes away again, and what CI runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MADE = re.search(r"^MADE = (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
IGNORED = [
    line.strip("/")
    for line in (ROOT / ".gitignore").read_text().splitlines()
    if not line.startswith("#")
]

# Written apart, so that this file does not name them itself.
REGISTRY_HOST = re.compile(
    "|".join(
        [r"pypi\." + "org", "pythonhosted" + r"\.", r"deb\." + "debian", r"npmjs\." + "(org|com)"]
    )
)


def test_gitignore_names_what_clean_removes():
    assert sorted(IGNORED) == sorted([*MADE, "__pycache__"])


def test_clean_leaves_the_checkout_as_cloned(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["vllm_dsv4_indexer/plugin.py", "csrc/cpu/op.cpp", "examples/a.py"]
    made = [f"{pattern.replace('*', 'lib')}" for pattern in IGNORED] + [
        "tests/op/__pycache__/a.pyc",
        "build/deepseek-v4/b",
    ]
    for name in kept + made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if "." in Path(name).name[1:]:
            (tmp_path / name).touch()
        else:
            (tmp_path / name).mkdir(exist_ok=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(["Makefile", *kept])


def test_bare_make_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    listed = subprocess.run(["make"], cwd=ROOT, check=True, text=True, capture_output=True).stdout
    assert re.findall(r"^  make ([\w-]+)", listed, re.M) == phony


def test_no_file_names_a_package_registry_host():
    made = [p for pattern in MADE for p in ROOT.glob(pattern)]
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            f for f in folders if f not in (".git", "__pycache__") and Path(folder, f) not in made
        ]
        for name in files:
            path = Path(folder, name)
            if path not in made and not path.is_symlink():
                found = REGISTRY_HOST.search(path.read_text(errors="ignore"))
                assert not found, f"{path} names {found.group()}"


def test_ci_runs_make_test(tmp_path):
    (tmp_path / "make").write_text('#!/bin/sh\necho "make $*, in $PWD"; exit 7\n')
    (tmp_path / "make").chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run"],
        cwd="/",
        text=True,
        capture_output=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert (done.stdout, done.returncode) == (f"make test, in {ROOT}\n", 7)


def test_tests_of_one_group_run_in_one_process(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for folder in ("engine", "op"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_{folder}.py").write_text(
            "import os, pathlib, pytest\n\n\n"
            "@pytest.mark.parametrize('case', range(8))\n"
            "def test_where(case):\n"
            "    (pathlib.Path(__file__).parent / f'{os.getpid()}.process').touch()\n"
        )
    flags = re.search(r"^IN_TWO_PROCESSES = (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    subprocess.run([sys.executable, "-m", "pytest", *flags.split()], cwd=tmp_path, check=True)
    assert [len(list((tmp_path / f).glob("*.process"))) for f in ("engine", "op")] == [1, 1]
