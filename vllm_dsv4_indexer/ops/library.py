"""Finds the native libraries, and refuses one that was built from other sources."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
from pathlib import Path

from ..errors import NotInstalled

PACKAGE = Path(__file__).parents[1]
_INSTALL = (
    "install the package with `pip install .` (for an NPU: with CANN's set_env.sh sourced, else "
    "that library is left out), or build it with `cmake -S csrc -B build && cmake --build build` "
    "and copy it there"
)


def load_library(library: str, folder: str) -> ctypes.CDLL:
    """Loads the native library that was built from this package's sources.

    It is beside the package, or where an editable installation has it. `folder`: its sources in
    csrc. Raises NotInstalled if there is none, or only one that was built from other sources.
    """
    unfit = []
    for path in filter(Path.exists, _candidates(library)):
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:  # cut short, or of another architecture
            unfit.append(str(error))
            continue
        if _sources(folder) in (None, _built_from(loaded)):
            return loaded
        unfit.append(f"{path} was built from other sources than csrc has now")
    if unfit:
        raise NotInstalled(f"{'; '.join(unfit)}: {_INSTALL}")
    looked_for = " and ".join(map(str, _candidates(library)))
    raise NotInstalled(f"the native library is missing: looked for {looked_for}; {_INSTALL}")


def _candidates(library: str) -> list[Path]:
    candidates = [PACKAGE.parent / library]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        ours = importlib.metadata.distribution("vllm-dsv4-indexer")
        candidates.append(Path(str(ours.locate_file(library))))
    return candidates


def _built_from(library: ctypes.CDLL) -> str:
    try:
        digest = library.dsv4_indexer_sources
    except AttributeError:  # older than the digest
        return "unknown"
    digest.restype = ctypes.c_char_p
    return digest().decode()


@functools.cache
def _sources(folder: str) -> str | None:
    """The digest of this checkout's sources, as csrc/CMakeLists.txt makes it. None if there are no
    sources: then the package was installed with its library."""
    csrc = PACKAGE.parent / "csrc"
    if not (csrc / "CMakeLists.txt").exists():
        return None
    sources = sorted(
        path.relative_to(csrc).as_posix()
        for pattern in ("*.h", "CMakeLists.txt", f"{folder}/**/*.*")
        for path in csrc.glob(pattern)
        if path.suffix != ".md"
    )
    digests = "".join(
        hashlib.sha256((csrc / source).read_bytes()).hexdigest() for source in sources
    )
    return hashlib.sha256(digests.encode()).hexdigest()
