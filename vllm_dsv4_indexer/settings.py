"""What a user may set, and where: the key `dsv4_indexer` of `--additional-config`.

    vllm serve MODEL --attention-backend dsv4_indexer --additional-config '{"dsv4_indexer": {"impl": "reference"}}'

The environment shares the namespace as the prefix `DSV4_INDEXER_`. Whatever stands in either and is not
listed here is an error: a misspelt setting that is silently ignored is worse than none.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

NAMESPACE = "dsv4_indexer"
ENVIRONMENT_VARIABLES = frozenset({"DSV4_INDEXER_ISA"})  # ops/cpu.py reads it


@dataclass(frozen=True)
class Settings:
    """impl: the implementation of the op that the engine calls, `auto` for the native one of its device. `stock` leaves
    the engine's own compressor in place, so that the two can be compared in otherwise equal engines.

    projection: what computes kv_score, whatever compresses it. `exact` is ours, in fp32; `engine` leaves the engine's
    own in place, which rounds to bfloat16; `auto` is `exact` unless the CPU has a matrix unit for bfloat16.

    state_save: which state rows a step writes: those of all its tokens, or the `tail` of each request (ops/tail.py),
    where the engine is sure that nobody asks for the others."""

    impl: Literal["auto", "ascend", "cpu", "reference", "stock"] = "auto"
    projection: Literal["auto", "exact", "engine"] = "auto"
    state_save: Literal["full", "tail"] = "full"

    @staticmethod
    def read(additional_config: Mapping[str, Any] | Any) -> "Settings":
        """Check and return the user's settings. Raises ValueError that names the setting and what is allowed."""
        for name in os.environ:
            if name.startswith(f"{NAMESPACE.upper()}_") and name not in ENVIRONMENT_VARIABLES:
                raise ValueError(
                    f"unknown environment variable {name}: unset it; {NAMESPACE} knows {sorted(ENVIRONMENT_VARIABLES)}"
                )
        additional_config = additional_config if isinstance(additional_config, Mapping) else {}
        for key in additional_config:
            if key != NAMESPACE and re.sub("[^a-z0-9]", "", key.lower()) == NAMESPACE.replace("_", ""):
                raise ValueError(f"--additional-config: unknown key {key!r}; settings of ours stand under {NAMESPACE!r}")
        given = additional_config.get(NAMESPACE, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"--additional-config: {NAMESPACE} must be an object of settings, not {given!r}")
        choices = {name: list(get_args(kind)) for name, kind in get_type_hints(Settings).items()}
        for key, value in given.items():
            if key not in choices:
                raise ValueError(f"--additional-config: unknown key {NAMESPACE}.{key}; known keys are {list(choices)}")
            if value not in choices[key]:
                raise ValueError(f"--additional-config: {NAMESPACE}.{key} is {value!r}; choose one of {choices[key]}")
        settings = Settings(**given)
        if settings.impl == "stock" and settings.state_save == "tail":
            raise ValueError(
                f"--additional-config: {NAMESPACE}.state_save is 'tail', but impl 'stock' reads every row back from "
                "the state; leave one of the two out"
            )
        return settings

    def on(self, native: str) -> "Settings":
        """The same on a device with the native implementation `native`, which takes the place of `auto`."""
        return replace(self, impl=native) if self.impl == "auto" else self
