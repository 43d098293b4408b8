"""What the three commands share: options, checks, and the options in their results."""

import argparse
import json
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...options import Options, number, numbers
from ...settings import NAMESPACE, Settings

STOCK = '{"impl": "stock", "projection": "engine"}'
SHORTEST = 64  # tokens


def _settings(text: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(text)
        Settings.read({NAMESPACE: settings})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return settings


MODEL: Options = {"model": dict(metavar="MODEL", help="the checkpoint's directory")}
PROMPTS: Options = {
    "--lengths": dict(
        type=numbers(SHORTEST),
        default="2048,4096,8192,16384,32768",
        metavar="N,M",
        help="of the documents or prompts, in tokens (default: %(default)s)",
    ),
    "--chunk": dict(
        type=number(1),
        default=2039,
        metavar="N",
        help="how many tokens a step prefills; some needles lie at these borders "
        "(default: %(default)s)",
    ),
}
SETTINGS: Options = {
    "--settings": dict(
        type=_settings,
        default={},
        metavar="JSON",
        help='of our backend in the engine that is started, e.g. \'{"projection": "engine"}\'',
    )
}
AGAINST: Options = {
    "--against": dict(
        type=_settings,
        metavar="JSON",
        help=f"compare with an engine with these settings; '{STOCK}' is vLLM's own code",
    )
}
COMMON: Options = {
    "--seed": dict(
        type=int,
        default=0,
        metavar="N",
        help="of documents, prompts and samples (default: %(default)s)",
    ),
    "--output": dict(
        type=Path,
        default=Path("build/accuracy"),
        metavar="DIR",
        help="folder for the result (default: %(default)s)",
    ),
}


def check_lengths(lengths: list[int], most: int) -> None:
    for length in lengths:
        if length > most:
            raise UserError(
                f"--lengths: {length} is not from {SHORTEST} to {most}, which the model can take"
            )


def sides(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of the engines to start. Each runs in a process of its own, so that nothing is
    left of it for the next one."""
    return [arguments.settings] + ([] if arguments.against is None else [arguments.against])


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options, as they go into the result."""
    left_out = ("run", "prog", "output")
    return {name: value for name, value in vars(arguments).items() if name not in left_out}
