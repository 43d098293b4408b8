"""vllm-ascend's engine, with our op in the place of its indexer's compressor.

`configure` runs where vLLM checks its configuration and names our worker. What subclasses
vllm-ascend is imported by worker processes alone: vllm-ascend's worker module loads its device
library, and a process that does not own an NPU must not.

    configuration.py   what is accepted, and what is refused with which remedy
    carried.py         how the settings reach the workers
    worker.py          loads the model with our keys, logs the account
    loading.py         how the model gets our keys, and what is checked of vllm-ascend
    family1.py         where they go in vllm-ascend before 0.27
    family2.py         where they go from 0.27 on
    indexer.py         an indexer's keys: the projection and the op
    step.py            a step's requests, from vllm-ascend's metadata
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from vllm_dsv4_indexer.engines.gate import is_tested, public, refuse_untested
from vllm_dsv4_indexer.engines.versions import Engine

# Why no other version is let in, not even with the setting `untested`.
NOT_VERIFIED = (
    "keys cannot be verified on an NPU, where those of vllm-ascend's own compressor differ from "
    "ours by roundings that nobody has measured"
)


def found() -> Engine:
    """The versions here."""
    import vllm

    return Engine(public(vllm.__version__), public(version("vllm-ascend")))


def configure(vllm_config: Any, check_and_update_config: Callable[[Any], None]) -> None:
    """Check that these versions and this configuration can be served, then name our worker.

    vllm_config: the VllmConfig, complete but for what the platform sets.
    check_and_update_config: the platform's own function, called in between.
    Raises UserError that says what was found, what is supported and what to do.
    """
    if not is_tested("npu", found()):
        refuse_untested("npu", found(), f"since {NOT_VERIFIED}, ")
    from vllm_dsv4_indexer.engines.vllm_ascend import configuration

    configuration.configure(vllm_config, check_and_update_config)
