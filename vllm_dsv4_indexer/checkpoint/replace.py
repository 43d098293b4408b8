"""A directory that is written aside and then takes the place of an earlier one, which no
interruption can lose.

A directory cannot be renamed onto one that is not empty, so the earlier one must step aside for a
moment. It does so into a hidden directory beside it. Whatever ends the run in that moment, the
earlier one is put back: by this run, or, if it was killed, by the next.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty directory to write to, which becomes `target` unless an error leaves the context.

    Raises UserError if another process is writing the same target.
    """
    aside = target.with_name(f".{target.name}.make-checkpoint")
    new, earlier = aside / "new", aside / "earlier"
    aside.mkdir(parents=True, exist_ok=True)
    lock = _lock(aside, target)
    try:
        _put_back(earlier, target)
        for leftover in (new, earlier):  # of a run that was killed; what was replaced is not needed
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        yield new
        if target.exists():
            target.rename(earlier)
        new.rename(target)
    finally:
        _put_back(earlier, target)
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def _put_back(earlier: Path, target: Path) -> None:
    if earlier.exists() and not target.exists():
        earlier.rename(target)


def _lock(directory: Path, target: Path) -> int:
    """A descriptor that holds the directory until it is closed, at the latest when this process
    ends."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"another make-checkpoint is writing {target}: let it end, then try again"
        ) from None
    except OSError:
        pass  # a file system without locks
    return lock
