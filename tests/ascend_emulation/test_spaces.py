"""Pointers to global memory and to the unified buffer do not mix: clang reads the kernels with each
in an address space of its own. To g++ both are plain pointers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import HERE

CLANG = Path(sys.prefix, "tools/bin/clang-tidy")  # `make lint` installs it; here it only parses
SPACES = [
    f"-D{name}=__attribute__((address_space({n})))" for n, name in ((1, "__gm__"), (2, "__ubuf__"))
]
MISTAKES = {
    "a plain pointer for one to global memory": (
        "kv_score_gm_.SetGlobalBuffer((__gm__ float*)a.kv_score)",
        "kv_score_gm_.SetGlobalBuffer((float*)a.kv_score)",
    ),
    "a pointer to the unified buffer for one to global memory": (
        "gm.SetGlobalBuffer((__gm__ float*)args_.ape,",
        "gm.SetGlobalBuffer(bias_.GetPhyAddr(),",
    ),
}


def errors(emulation: Path) -> str:
    parse = [CLANG, "--quiet", "--allow-no-checks", "--checks=-*", emulation / "emulate.cpp"]
    done = subprocess.run(
        [*parse, "--", "-std=c++17", f"-I{emulation}", *SPACES], text=True, capture_output=True
    )
    assert bool(done.returncode) == ("error:" in done.stdout), done.stderr
    return done.stdout


def test_every_pointer_is_to_the_space_that_is_meant():
    assert errors(HERE) == ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_pointer_to_another_space_is_reported_where_it_stands(tmp_path, mistake):
    right, wrong = MISTAKES[mistake]
    for part in ("csrc", "tests/ascend_emulation"):
        shutil.copytree(HERE.parents[1] / part, tmp_path / part)
    tile = tmp_path / "csrc/ascend/tile.h"
    before, behind = tile.read_text().split(right)
    tile.write_text(before + wrong + behind)
    line = before.count("\n") + 1
    assert re.search(rf"tile\.h:{line}:\d+: error:", errors(tmp_path / "tests/ascend_emulation"))
