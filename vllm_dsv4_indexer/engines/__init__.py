"""The engines, a folder for each; here what all of them refuse. account.py has what their workers
log, plans.py one plan a step."""

import inspect
from typing import Any, NoReturn

from vllm_dsv4_indexer.contract import RATIO
from vllm_dsv4_indexer.errors import UserError

# The parameters of functions of an engine, by their owner (a class or a module) and name.
Signatures = dict[tuple[Any, str], tuple[str, ...]]


def refuse(found: str, supported: str, remedy: str) -> NoReturn:
    """Raise the UserError of a selection that cannot be honoured."""
    raise UserError(
        f"--attention-backend dsv4_indexer: {found}; supported: {supported}. To go on, {remedy}."
    )


def require_indexer(vllm_config: Any) -> None:
    """Refuse a model that has no indexer, and the context parallelism that splits one request's
    pages over workers."""
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if str(config.model_type).startswith("deepseek_v41"):
        refuse(
            "DeepSeek V4.1 has no indexer compressor (its ratios are 1 and 2)",
            "DeepSeek V4 (Flash and Pro)",
            "leave the option out: vLLM's own attention serves this model",
        )
    if config.model_type != "deepseek_v4":
        refuse(
            f"the model is of type {config.model_type!r}",
            "deepseek_v4",
            "leave the option out for this model",
        )
    if RATIO not in compress_ratios(config)[: config.num_hidden_layers]:
        refuse(
            "no layer of this model has an indexer",
            f"layers of compress_ratio {RATIO}",
            "leave the option out",
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, option)) > 1:
            refuse(f"{option} is {size}", "1", "use tensor or pipeline parallelism")


def require_model_runner_v1(vllm_config: Any) -> None:
    """Refuse the model runner that our tests have not run on."""
    if vllm_config.use_v2_model_runner:
        refuse("Model Runner V2 is on", "Model Runner V1", "set VLLM_USE_V2_MODEL_RUNNER=0")


def require_impl(impl: str, *supported: str) -> None:
    """Refuse the setting `impl` of another engine."""
    if impl not in supported:
        refuse(
            f"dsv4_indexer.impl is {impl!r}",
            f"{', '.join(supported)} on this device",
            "set one of these",
        )


def require_signatures(engine: str, expected: Signatures) -> None:
    """Refuse an engine whose functions have other parameters than those we were written against,
    and name what differs."""
    for (owner, name), parameters in expected.items():
        function = getattr(owner, name, None)
        found = function and parameters_of(function)
        if found != parameters:
            raise UserError(
                f"--attention-backend dsv4_indexer: {owner.__name__}.{name} of {engine} takes "
                f"{found}, where the supported versions take {parameters}. Has another plugin "
                "replaced it? Disable that plugin, or leave the option out."
            )


def parameters_of(function: Any) -> tuple[str, ...]:
    """Of a function, or of a Triton kernel."""
    names = getattr(function, "arg_names", None) or inspect.signature(function).parameters
    return tuple(names)


def indexers_of_stage(vllm_config: Any) -> int:
    """How many layers of this worker's pipeline stage have an indexer."""
    model = vllm_config.model_config
    first, end = model.get_layers_start_end_indices(vllm_config.parallel_config)
    return compress_ratios(model.hf_config)[first:end].count(RATIO)


def compress_ratios(config: Any) -> list[int]:
    """Each layer's ratio, 0 for none, of vLLM's configuration of the model; or of transformers',
    which vLLM has from 0.33 on."""
    if (ratios := getattr(config, "compress_ratios", None)) is not None:
        return list(ratios)
    rates = getattr(config, "compress_rates", {})
    return [rates.get(kind, 0) for kind in getattr(config, "layer_types", [])]
