"""What a user may set: under the key `dsv4_indexer` of `--additional-config`.

    --additional-config '{"dsv4_indexer": {"impl": "reference"}}'

Environment variables of ours begin with `DSV4_INDEXER_`. An unknown name in either place is an
error, because a misspelt setting must not be ignored.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from vllm_dsv4_indexer.errors import UserError

NAMESPACE = "dsv4_indexer"
ENVIRONMENT_VARIABLES = frozenset({"DSV4_INDEXER_ISA"})  # ops/cpu.py reads it


@dataclass(frozen=True)
class Settings:
    """The settings, with their defaults.

    impl: the implementation of the op that the engine calls. `auto` is the native one of the
    device. `stock` leaves the engine's own compressor in place, to compare with.

    projection: what computes kv_score, whatever `impl` is. `exact` is ours, in fp32. `engine` is
    the engine's own, which rounds to bfloat16. `auto` is `exact`, unless the CPU has a matrix unit
    for bfloat16.

    state_save: which state rows a step writes, and which get memory. `full`: those of all tokens.
    `readable`: those that a later step or a prefix hit can read. `auto` is `readable` where the
    engine lets us choose the pages, else `full`.

    check: `on` holds every step against the invariants (ops/invariants.py) before a layer writes.

    capture: a folder. A worker saves the inputs of a layer's step there (capture.py), at most eight
    in all. capture_when: `error`, when the op refuses a step; `not_finite`, when an entry is not
    finite; or N, in the first layer of each kind of compressor in the N-th step.

    account: a file. Every worker adds a line of JSON to it, every ten seconds of work and when it
    stops: its `rank`, and the numbers of `ops.Work` since it started.

    untested: what to do with a version of the engine that nobody has tested and that is newer than
    those that were. `verify` lets it in, and has every worker compare our keys with those of the
    engine's own compressor before it serves, whatever the version.
    """

    impl: Literal["auto", "ascend", "cpu", "reference", "stock"] = "auto"
    projection: Literal["auto", "exact", "engine"] = "auto"
    state_save: Literal["auto", "full", "readable"] = "auto"
    check: Literal["off", "on"] = "off"
    capture: str | None = None
    capture_when: Literal["error", "not_finite"] | int = "error"
    account: str | None = None
    untested: Literal["refuse", "verify"] = "refuse"

    @staticmethod
    def read(additional_config: Mapping[str, Any] | Any) -> "Settings":
        """Returns the user's settings. Raises UserError, which names the setting and what is
        allowed."""
        for name in os.environ:
            if name.startswith(f"{NAMESPACE.upper()}_") and name not in ENVIRONMENT_VARIABLES:
                raise UserError(
                    f"unknown environment variable {name}: unset it; {NAMESPACE} knows "
                    f"{sorted(ENVIRONMENT_VARIABLES)}"
                )
        keys = keys_of_ours(additional_config)
        for key in keys:
            if key != NAMESPACE:
                _refuse(f"unknown key {key!r}; our settings go under {NAMESPACE!r}")
        given = additional_config[NAMESPACE] if keys else {}
        if not isinstance(given, Mapping):
            _refuse(f"{NAMESPACE} must be an object of settings, not {given!r}")
        kinds = get_type_hints(Settings)
        for key, value in given.items():
            if key not in kinds:
                _refuse(f"unknown key {NAMESPACE}.{key}; known keys are {list(kinds)}")
            if key == "account":
                _check_account(value)
            elif key == "capture":
                _check_folder(value)
            elif key == "capture_when":
                _check_when(value, "capture" in given)
            elif value not in (choices := list(get_args(kinds[key]))):
                _refuse(f"{NAMESPACE}.{key} is {value!r}; choose one of {choices}")
        settings = Settings(**given)
        for key in ("check", "capture"):
            if settings.impl == "stock" and getattr(settings, key) not in ("off", None):
                _refuse(
                    f"{NAMESPACE}.{key} is {getattr(settings, key)!r}, but impl 'stock' leaves our "
                    "op out; leave out one of the two"
                )
        return settings

    def on(self, native: Literal["ascend", "cpu"]) -> "Settings":
        """The same settings with `native` in the place of impl `auto`."""
        return replace(self, impl=native) if self.impl == "auto" else self


def _check_account(file: Any) -> None:
    """Refuses a file that cannot be written. Makes none: every process reads the settings."""
    if not isinstance(file, str):
        _refuse(f"{NAMESPACE}.account is {file!r}; it is the name of a file")
    folder = Path(file).absolute().parent
    if Path(file).is_dir() or not os.access(folder, os.W_OK):
        _refuse(f"{NAMESPACE}.account is {file!r}; name a file in a folder that can be written")


def _check_folder(folder: Any) -> None:
    if not isinstance(folder, str) or not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        _refuse(f"{NAMESPACE}.capture is {folder!r}; name a folder that can be written")


def _check_when(when: Any, captures: bool) -> None:
    known = when in ("error", "not_finite") or (type(when) is int and when > 0)
    if not known:
        _refuse(
            f"{NAMESPACE}.capture_when is {when!r}; choose 'error', 'not_finite' or the number of "
            "a step, from 1 on"
        )
    if not captures:
        _refuse(f"{NAMESPACE}.capture_when is {when!r}; name a folder in {NAMESPACE}.capture, too")


def keys_of_ours(additional_config: Mapping[str, Any] | Any) -> list[str]:
    """The keys of `additional_config` that are meant for us, correctly spelt or not."""
    keys = additional_config if isinstance(additional_config, Mapping) else ()
    plain = NAMESPACE.replace("_", "")
    return [key for key in keys if re.sub("[^a-z0-9]", "", str(key).lower()) == plain]


def _refuse(what: str) -> NoReturn:
    raise UserError(f"--additional-config: {what}")
