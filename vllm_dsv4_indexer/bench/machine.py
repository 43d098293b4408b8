"""Where the benchmark runs: what a reader must know to judge a figure."""

import os
from pathlib import Path
from typing import Any

import torch

from .. import processor
from ..ops import cpu
from .contestants import vllm_version

_USUAL_LAST_LEVEL = 64 << 20  # where the kernel does not say


def describe() -> dict[str, Any]:
    """The machine and the software: model, cores, cache sizes in bytes, instruction set in use,
    load, versions."""
    return {
        "cpu": processor.model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches(),
        "isa": cpu.native().isa,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "vllm": vllm_version(),
    }


def caches() -> dict[str, int]:
    """Bytes of the data caches that the first core sees, e.g. {"L1": 32768, "L2": ..., "L3":
    ...}."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K")) << 10
    return sizes


def last_level_cache() -> int:
    """Bytes of the largest cache."""
    return max(caches().values(), default=_USUAL_LAST_LEVEL)
