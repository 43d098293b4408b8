"""`vllm-dsv4-indexer explain`: what vLLM would do with a model and flags of `vllm serve`, without
the model's weights."""

from typing import Any, NoReturn

from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.settings import NAMESPACE


class Refused(UserError):
    """vLLM, or our backend, refuses the configuration: the message is theirs."""


def explain(model: str, flags: list[str]) -> int:
    """Prints it; returns 0, or 1 if the configuration is refused."""
    try:
        told = explanation_of(model, flags)
    except Refused as error:
        print(f"refused        {error}")
        return 1
    for what, found in told:
        print(f"{what:14} {found}")
    return 0


def explanation_of(model: str, flags: list[str]) -> list[tuple[str, str]]:
    """What there is to say, each with what it is about. Raises Refused."""
    if current_platform.device_type != "cpu":
        device = current_platform.device_type
        raise UserError(f"explain reads vLLM's CPU engine; the platform is {device!r}")
    try:
        config = read_flags(model, flags).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except ValidationError as error:
        raise Refused(reason(error)) from error
    from vllm_dsv4_indexer.engines.vllm_cpu import explanation

    return list(explanation.explain(config))


def read_flags(model: str, flags: list[str]) -> EngineArgs:
    """As `vllm serve` reads them, with our backend unless they name one."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.error = _refuse
    arguments: Any = parser.parse_args([model, *flags])
    arguments.model, arguments.skip_tokenizer_init = model, True
    arguments.attention_backend = arguments.attention_backend or NAMESPACE
    return EngineArgs.from_cli_args(arguments)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (see `vllm serve --help`)")


def reason(error: ValidationError) -> str:
    first = error.errors()[0]
    return " ".join(str(first.get("ctx", {}).get("error", first["msg"])).split())
