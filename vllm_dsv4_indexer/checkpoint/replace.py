"""Replaces a directory by a new one, so that no interruption can lose the earlier one.

A directory cannot be renamed onto one that is not empty. So for a moment the earlier one is moved
into a hidden directory beside it. If the run ends in that moment, the earlier one is put back: by
this run, or by the next one if this was killed.
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
    """Gives an empty directory to write to. It becomes `target`, unless the block raises.

    Raises UserError if another process is writing the same target.
    """
    aside = target.with_name(f".{target.name}.make-checkpoint")
    new, earlier = aside / "new", aside / "earlier"
    aside.mkdir(parents=True, exist_ok=True)
    lock = _lock(aside, target)
    try:
        _put_back(earlier, target)
        for leftover in (new, earlier):  # of a run that was killed
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
    """Locks the directory. The lock ends when the descriptor is closed, or with this process."""
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
