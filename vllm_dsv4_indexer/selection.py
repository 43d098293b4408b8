"""Whether a configuration of vLLM selects our backend.

vLLM takes the name of an attention backend in several places, and ignores it silently in some. So
our name is honoured, or refused where it would be ignored. A configuration of any other shape, as
another version of vLLM may have, does not select us.
"""

from functools import reduce
from typing import Any

from vllm_dsv4_indexer import BACKEND
from vllm_dsv4_indexer.engines import refuse
from vllm_dsv4_indexer.settings import NAMESPACE, keys_of_ours

KIND = "mla_attention"  # vLLM's name for the kind of cache that the indexer's keys lie in
REMEDY = f"pass --attention-backend {NAMESPACE} and name no backend elsewhere"
# Backends that are not of the model that is served: {place in the configuration: option}.
ELSEWHERE = {
    "speculative_config.attention_backend": "attention_backend in --speculative-config",
    "model_config.multimodal_config.mm_encoder_attn_backend": "--mm-encoder-attn-backend",
}


def is_selected(vllm_config: Any) -> bool:
    """Whether `vllm_config` selects our backend: by `--attention-backend`, or for the kind of cache
    that has the indexer's keys. The second is changed into the first.

    Raises UserError if our name stands where vLLM would ignore it, or beside another name.
    """
    for path, option in ELSEWHERE.items():
        if _is_ours(_look_up(vllm_config, path)):
            refuse(f"{option} names it", "it for the model that is served", REMEDY)
    backend = _look_up(vllm_config, "attention_config.backend")
    kinds = _look_up(vllm_config, "attention_config.backend_per_kind") or {}
    for kind, named in kinds.items():
        if _is_ours(named) and kind != KIND:
            refuse(f"backend_per_kind names it for {kind!r}", f"{KIND!r}", REMEDY)
    if not _is_ours(backend) and not _is_ours(kinds.get(KIND)):
        return False

    names = [named.name for named in (backend, *kinds.values()) if named is not None]
    if set(names) != {BACKEND}:
        refuse(f"--attention-config names {' and '.join(names)}", "one backend for all", REMEDY)
    if kinds:
        vllm_config.attention_config.backend = kinds[KIND]
        vllm_config.attention_config.backend_per_kind = {}
    return True


def idle_settings(vllm_config: Any) -> str | None:
    """A warning if there are settings of ours and our backend is not selected; else None."""
    keys = keys_of_ours(_look_up(vllm_config, "additional_config"))
    worker = _look_up(vllm_config, "parallel_config.worker_cls")
    # vLLM checks a configuration again, after vllm-ascend has dropped our name: the worker tells.
    if not keys or str(worker).startswith(f"{__package__}."):
        return None
    return (
        f"--additional-config has {', '.join(map(repr, keys))}, which does nothing: the backend is "
        f"not selected. To select it, pass --attention-backend {NAMESPACE}."
    )


def _look_up(config: Any, path: str) -> Any:
    """The attribute at `path`; None if there is none."""
    return reduce(lambda owner, name: getattr(owner, name, None), path.split("."), config)


def _is_ours(backend: Any) -> bool:
    return getattr(backend, "name", None) == BACKEND
