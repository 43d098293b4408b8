"""Where the native libraries are."""

import importlib.metadata
from pathlib import Path


def library_path(library: str) -> Path:
    """A native library: beside this package, or where the installed distribution has it (an editable one)."""
    candidates = [Path(__file__).parents[2] / library]
    try:
        candidates.append(Path(importlib.metadata.distribution("vllm-dsv4-indexer").locate_file(library)))
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ImportError(
        f"the native library is missing: looked for {' and '.join(map(str, candidates))}; install the package with "
        "`pip install .` (for an NPU: with CANN's set_env.sh sourced, else that library is left out), or build it with "
        "`cmake -S csrc -B build && cmake --build build` and copy it there"
    )
