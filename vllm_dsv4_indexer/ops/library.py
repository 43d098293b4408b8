"""Where the native libraries are."""

import importlib.metadata
from pathlib import Path


def library_path(library: str) -> Path:
    """A native library: where the installed distribution has it (also an editable one), or beside this package."""
    candidates = [Path(__file__).parents[2] / library]
    try:
        candidates.insert(0, Path(importlib.metadata.distribution("vllm-dsv4-indexer").locate_file(library)))
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ImportError(
        f"the native library is missing: looked for {' and '.join(map(str, candidates))}; install the package with "
        "`pip install .`, or build it with `cmake -S csrc -B build && cmake --build build` and copy it there"
    )
