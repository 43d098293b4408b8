"""`make venv`, with a stand-in for Python whose pip downloads nothing and does what a test says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Real Python, except that it makes an empty environment, fakes pip, and fails if its arguments have
# {denied} in them. The fake pip writes its arguments to pip.calls, then does what {answers}, the body
# of a shell `case`, says.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"-m venv --clear"*) rm -rf .venv && mkdir -p .venv/bin .venv/lib/python3/site-packages && ln -s "{fake}" .venv/bin/python && exit ;;
*"-m pip "*)
    echo "$*" >> "{here}/pip.calls"
    install_torch() {{ mkdir -p "{here}/site/torch" && : > "{here}/site/torch/__init__.py" && echo "cuda = $1" > "{here}/site/torch/version.py"; }}
    case "$*" in
    {answers}
    esac
    exit 0 ;;
*"{denied}"*) exit 1 ;;
esac
PYTHONPATH="{here}/site" exec "{python}" "$@"
"""

CPU_TORCH = "*torch==*) install_torch None ;;"


class Checkout:
    """A copy of the set-up's files, without the package."""

    def __init__(self, path):
        self.path, self.here = path / "checkout with a space", path
        shutil.copytree(ROOT / "requirements", self.path / "requirements")
        shutil.copy(ROOT / "Makefile", self.path)
        (self.path / "csrc").mkdir()
        (self.path / "csrc" / "op.cpp").touch()
        (self.path / "pyproject.toml").touch()

    def make_venv(self, answers=CPU_TORCH, denied="nothing is denied", **env):
        """Runs `make venv`; returns the process and the calls of pip that it made."""
        fake, calls = self.here / "python", self.here / "pip.calls"
        fake.write_text(
            FAKE_PYTHON.format(
                fake=fake, here=self.here, answers=answers, denied=denied, python=sys.executable
            )
        )
        fake.chmod(0o755)
        calls.write_text("")
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("MAKE", "MFLAGS", "TORCH_INDEX_URL"))
        }
        done = subprocess.run(
            ["make", "venv", f"PYTHON={fake}"],
            cwd=self.path,
            env=clean | env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        return done, calls.read_text().splitlines()

    def stamps(self):
        return sorted(p.name for p in (self.path / ".venv").glob("*.done"))

    def touch(self, name):
        later = (self.path / ".venv" / "package.done").stat().st_mtime + 10
        os.utime(self.path / name, (later, later))


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_torch_from_configured_sources(checkout):
    done, calls = checkout.make_venv()
    assert done.returncode == 0, done.stdout
    torch, locked, package = calls
    assert "torch==2.13.0+cpu" in torch and "--no-deps" in torch and "--index-url" not in torch
    assert "--no-deps" in locked and locked.endswith("-r requirements/cpu.lock")
    assert "--no-deps" in package and package.endswith("-e .")
    assert checkout.stamps() == ["dependencies.done", "package.done"]
    assert "[1/4]" in done.stdout and "[4/4]" in done.stdout


@pytest.mark.parametrize(
    "env, url",
    [
        ({}, "https://download.pytorch.org/whl/cpu"),
        ({"TORCH_INDEX_URL": "https://mirror.example/cpu"}, "https://mirror.example/cpu"),
    ],
)
def test_torch_from_the_index_when_configured_sources_lack_it(checkout, env, url):
    done, calls = checkout.make_venv(
        "*--index-url*) install_torch None ;; *torch==*) exit 1 ;;", **env
    )
    assert done.returncode == 0, done.stdout
    assert calls[1].endswith(f"torch==2.13.0+cpu --index-url {url}")


def test_no_cpu_torch_anywhere_stops_with_the_remedy(checkout):
    done, calls = checkout.make_venv("*torch==*) echo 'no such wheel'; exit 1 ;;")
    assert done.returncode != 0
    assert "no such wheel" in done.stdout  # pip's own words
    assert "TORCH_INDEX_URL=" in done.stdout and "PIP_FIND_LINKS=" in done.stdout
    assert len(calls) == 2 and all(
        "torch==2.13.0+cpu" in call for call in calls
    )  # never a plain torch
    assert checkout.stamps() == []


def test_a_torch_built_for_cuda_is_refused(checkout):
    done, calls = checkout.make_venv("*torch==*) install_torch '\"13.0\"' ;;")
    assert done.returncode != 0
    assert "built for CUDA 13.0" in done.stdout and "TORCH_INDEX_URL=" in done.stdout
    assert len(calls) == 1 and checkout.stamps() == []


def test_a_second_run_does_only_what_changed(checkout):
    checkout.make_venv()
    assert checkout.make_venv()[1] == []
    checkout.touch("csrc/op.cpp")
    assert [call.split()[-1] for call in checkout.make_venv()[1]] == ["."]
    checkout.touch("requirements/cpu.lock")
    assert len(checkout.make_venv()[1]) == 3


@pytest.mark.parametrize(
    "moment, stamps", [("*torch==*", []), ("*cpu.lock*", []), ('*"-e ."', ["dependencies.done"])]
)
def test_a_killed_run_never_looks_finished(checkout, moment, stamps):
    done, _ = checkout.make_venv(
        f"{moment}) : > .venv/half-installed; kill -9 $PPID ;; {CPU_TORCH}"
    )
    assert done.returncode != 0 and checkout.stamps() == stamps
    done, calls = checkout.make_venv()
    assert done.returncode == 0 and calls[-1].endswith("-e .")
    # Dependencies start again from an empty environment; the package is simply installed again.
    assert (checkout.path / ".venv" / "half-installed").exists() == bool(stamps)


def test_a_failed_update_does_not_leave_the_old_stamp(checkout):
    checkout.make_venv()
    checkout.touch("requirements/cpu.lock")
    done, _ = checkout.make_venv(f"*cpu.lock*) exit 1 ;; {CPU_TORCH}")
    assert done.returncode != 0 and checkout.stamps() == []


@pytest.mark.parametrize(
    "denied, remedy",
    [("version_info", "make venv PYTHON="), ("ensurepip", "python3-venv"), ("libnuma", "libnuma1")],
)
def test_an_unfit_machine_is_told_first(checkout, denied, remedy):
    done, calls = checkout.make_venv(denied=denied)
    assert done.returncode != 0 and remedy in done.stdout and calls == []


@pytest.mark.parametrize(
    "lacking, remedy", [("lscpu", "util-linux"), ("c++", "apt-get install g++")]
)
def test_a_missing_tool_is_told_first(checkout, lacking, remedy):
    tools = checkout.here / "tools"
    tools.mkdir()
    for name in {"make", "sh", "mkdir", "sed", "dirname", "find", "lscpu", "c++"} - {lacking}:
        (tools / name).symlink_to(shutil.which(name))
    done, calls = checkout.make_venv(PATH=str(tools), CXX="")
    assert done.returncode != 0 and remedy in done.stdout and calls == []
