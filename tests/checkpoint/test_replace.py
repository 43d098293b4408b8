"""An earlier checkpoint is replaced by a complete one or stays, wherever the run is interrupted."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsv4_indexer.checkpoint.replace import replacing
from vllm_dsv4_indexer.errors import UserError


@pytest.fixture
def target(tmp_path) -> Path:
    """An earlier directory."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "file").write_text("earlier")
    return path


def replace(target: Path, text: str) -> None:
    with replacing(target) as new:
        (new / "file").write_text(text)


def assert_only(target: Path, text: str) -> None:
    assert (target / "file").read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_directory_is_replaced_and_nothing_else_is_left(target):
    replace(target, "new")
    assert_only(target, "new")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("which", ["model", "new"])
def test_an_interruption_at_either_rename_leaves_the_earlier_directory(
    target, monkeypatch, which, error
):
    rename = Path.rename

    def interrupted(self, to):
        if self.name == which:
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        replace(target, "new")
    assert_only(target, "earlier")


KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_dsv4_indexer.checkpoint.replace import replacing

def die(self, to):
    if self.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)

rename, Path.rename = Path.rename, die
with replacing(Path(sys.argv[1])) as new:
    (new / "file").write_text("new")
"""


def kill_at_the_rename_of(which: str, target: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), which], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert len(list(target.parent.iterdir())) > target.exists()  # it could not clean up


def test_a_run_killed_between_the_renames_loses_nothing(target):
    """The next run finds the earlier directory again, even if it fails itself."""
    kill_at_the_rename_of("new", target)
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt), replacing(target) as new:
        assert not list(new.iterdir())
        raise KeyboardInterrupt
    assert_only(target, "earlier")


def test_what_a_killed_run_left_is_cleaned_up_by_the_next(target):
    kill_at_the_rename_of("model", target)
    replace(target, "next")
    assert_only(target, "next")


def test_two_runs_do_not_write_the_same_directory(target):
    aside = target.with_name(".model.make-checkpoint")
    aside.mkdir()
    other = os.open(aside, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another make-checkpoint is writing .*model"):
        replace(target, "new")
    assert aside.exists() and (target / "file").read_text() == "earlier"
    os.close(other)
    replace(target, "new")
    assert_only(target, "new")
