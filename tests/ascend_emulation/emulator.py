"""Builds the emulation with the host's compiler, and makes it impl "ascend" of `ops.compress`, on
CPU tensors."""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.ops import ascend

HERE = Path(__file__).parent
A2_NAME, A5_NAME = "Ascend910B1", "Ascend950PR_9589"
PRODUCTS = (A2_NAME, "Ascend910_9391", A5_NAME, "Ascend910B")  # emulation::kProducts
A5 = 3510  # architectures
A2 = 2201
COMPILER = os.environ.get("CXX", "c++")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
]


class Emulator:
    """The emulated machine. One at a time, and not for several threads."""

    def __init__(self, folder: Path, sources: Path = HERE):
        path = folder / "libdsv4_indexer_ascend_emulation.so"
        subprocess.run(
            [COMPILER, *FLAGS, f"-I{sources}", sources / "emulate.cpp", "-o", path], check=True
        )
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_configure.argtypes = (
            [ctypes.c_int64] * 2 + [ctypes.c_uint64] * 2 + [ctypes.c_int64] * 2
        )
        self.use()

    @staticmethod
    def with_mistake(folder: Path, file: str, mistakes: list[tuple[str, str]]) -> "Emulator":
        """An emulation of kernels whose `file` has other text in some places."""
        root = HERE.parents[1]
        for part in ("csrc", "tests/ascend_emulation"):
            shutil.copytree(root / part, folder / part)
        kernel = folder / "csrc" / "ascend" / file
        text = kernel.read_text()
        for right, wrong in mistakes:
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        kernel.write_text(text)
        return Emulator(folder, folder / "tests" / "ascend_emulation")

    def use(
        self,
        product: str = A2_NAME,
        cores: int = 48,
        noise: int = 0,
        order: int = 0,
        built_for: int | None = None,
        failing: bool = False,
    ) -> None:
        """The machine of the next calls. `noise`, if not 0, is the seed of the last-bit errors of
        Exp, Div and Sqrt, `order` that of the order in which the cores run, `built_for` the
        architecture of the library, by default the product's. If `failing`, every launch fails.
        Forgets the counts."""
        built_for = built_for or (A5 if product == A5_NAME else A2)
        self.library.emulation_configure(
            PRODUCTS.index(product), cores, noise, order, built_for, failing
        )

    def counts(self) -> list[list[dict]]:
        """What each core of each launch since `use` has done; see `Counts` in machine.h."""
        size = self.library.emulation_counts(None, 0) + 1
        text = ctypes.create_string_buffer(size)
        self.library.emulation_counts(text, size)
        return json.loads(text.value)

    def cut(self, tokens: int, vector_cores: int) -> tuple[int, int]:
        """csrc/ascend/tiling.h: the tokens of a core, and how many cores that takes."""
        per_core, cores = ctypes.c_int64(), ctypes.c_int64()
        arguments = (
            ctypes.c_int64(tokens),
            ctypes.c_int64(vector_cores),
            ctypes.byref(per_core),
            ctypes.byref(cores),
        )
        self.library.emulation_cut(*arguments)
        return per_core.value, cores.value

    def broken_rule(self, name: str, cores: int = 2) -> str:
        """Runs a kernel of rules.h; returns what it was refused for, or nothing."""
        message = ctypes.create_string_buffer(500)
        refused = self.library.emulation_run_rule(name.encode(), cores, message, len(message))
        return message.value.decode() if refused else ""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Meanwhile, impl "ascend" is this machine, and may be asked for on any device."""
        anywhere = ops.IMPLEMENTATIONS["ascend"]._replace(devices=())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ascend, "load_library", lambda *_: self.library)
            patch.setattr(ascend, "_stream", lambda device: 0)
            patch.setitem(ops.IMPLEMENTATIONS, "ascend", anywhere)
            _forget()
            yield
        _forget()


def _forget() -> None:
    ascend.native.cache_clear()
    ops._functions.cache_clear()
