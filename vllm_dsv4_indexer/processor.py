"""What Linux says of this machine's CPU."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_MATTER = ("avx2", "avx512", "amx", "fma", "asimd", "sve", "bf16", "i8mm")  # how their names begin


def model() -> str:
    """Its name, e.g. "AMD EPYC 9654"; where none is told, its architecture."""
    return _field("model name") or platform.machine()


def instruction_sets() -> list[str]:
    """Those that could matter to the op and to the projection in front of it."""
    told = _field("flags") or _field("Features")  # on x86; on Arm
    return [name for name in told.split() if name.startswith(_MATTER)]


def _field(name: str) -> str:
    """Of the first core; empty where there is none."""
    if not CPUINFO.exists():
        return ""
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
