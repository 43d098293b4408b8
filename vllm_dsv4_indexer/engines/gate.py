"""Which versions are let in, by the table of those that were tested."""

from typing import NoReturn

from packaging.version import Version

from vllm_dsv4_indexer.engines.versions import TESTED, Engine
from vllm_dsv4_indexer.errors import NotInstalled

DEVICES = {"cpu": "a CPU", "npu": "an NPU"}


def public(version: str) -> str:
    """Without the local part: vLLM's is "+cpu" or "+empty", by what it was built for."""
    return Version(version).public


def is_tested(device: str, found: Engine) -> bool:
    return found in TESTED[device]


def is_older(device: str, found: Engine) -> bool:
    """Whether a part of `found` is older than any that was tested."""
    return any(
        Version(part) < min(map(Version, tested))
        for part, tested in zip(found, zip(*TESTED[device]))
        if part
    )


def refuse_untested(device: str, found: Engine, remedy: str = "") -> NoReturn:
    """remedy: what can be done beside an installation, such as "set ..., "."""
    tested = ", ".join(map(str, TESTED[device]))
    raise NotInstalled(
        f"--attention-backend dsv4_indexer: this is {found}; on {DEVICES[device]} the backend "
        f"supports {tested}. Install one of these, {remedy}or leave the option out."
    )
