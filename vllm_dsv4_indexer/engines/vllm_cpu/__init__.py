"""vLLM's CPU engine, with our compressors in the place of its own.

`configure` runs where vLLM checks its configuration and names our worker. Everything else happens
inside that worker, so an engine that uses another backend meets none of it:

    configuration.py   what is accepted, and what is refused with which remedy
    worker.py          loads the model, replaces what follows, logs the account
    compressor.py      a layer's compressors: one call of the op each, with the step's plan
    state.py           where they keep their state: pages for rows that are read later
    checks.py          a checked engine: the step's invariants, before a layer writes
    projection.py      the fp32 projection in front of it
    metadata.py        a step's metadata, in plain torch
    patches.py         where vLLM's own functions give way to those, during a step
    signatures.py      whether vLLM's functions are those that we were written against
    verification.py    whether the engine's own compressor stores what ours does
    explanation.py     what a model's caches take, in the engine's own numbers
"""

from collections.abc import Callable
from typing import Any

from vllm_dsv4_indexer.engines.gate import is_older, is_tested, public, refuse_untested
from vllm_dsv4_indexer.engines.versions import Engine
from vllm_dsv4_indexer.settings import Settings


def configure(vllm_config: Any, check_and_update_config: Callable[[Any], None]) -> None:
    """Check that this vLLM and its configuration can be served, then name our worker.

    vllm_config: the VllmConfig, complete but for what the platform sets.
    check_and_update_config: the platform's own function, called in between.
    Raises UserError that says what was found, what is supported and what to do.
    """
    import vllm

    found = Engine(public(vllm.__version__))
    if not is_tested("cpu", found):
        _admit_untested(found, vllm_config)
    from vllm_dsv4_indexer.engines.vllm_cpu import configuration

    configuration.configure(vllm_config, check_and_update_config)


def _admit_untested(found: Engine, vllm_config: Any) -> None:
    """Refuse what is older, what differs from what we call and replace, and what the user has not
    asked to be verified when its model is loaded (verification.py)."""
    if is_older("cpu", found):
        refuse_untested("cpu", found)
    try:
        from vllm_dsv4_indexer.engines.vllm_cpu.signatures import check_signatures
    except (ImportError, AttributeError) as error:
        refuse_untested("cpu", found, f"since this one differs ({error}), ")
    check_signatures()
    if Settings.read(vllm_config.additional_config).untested != "verify":
        setting = '{"dsv4_indexer": {"untested": "verify"}}'
        refuse_untested(
            "cpu",
            found,
            f"or have the keys of this one verified when its model is loaded (--additional-config "
            f"'{setting}'), ",
        )


def projects_exactly(settings: Settings) -> bool:
    """Whether our projection takes the place of the engine's: as set, else where the engine's would
    not be faster.

    A matrix unit (AMX on x86, bfloat16 matrix multiply-adds on Arm) does several times as many
    products of bfloat16 as anything else on its core.
    """
    import torch

    if settings.projection == "auto":
        has = torch.cpu.get_capabilities()
        return not (has.get("amx_bf16") or has.get("bf16"))
    return settings.projection == "exact"
