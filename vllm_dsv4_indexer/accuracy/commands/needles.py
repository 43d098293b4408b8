"""`vllm-dsv4-indexer accuracy needles`: find needles at every length and depth."""

import argparse
import json
from typing import TYPE_CHECKING

from ... import output
from ...errors import UserError
from ...options import Commands, Options, add_command, add_options
from ...packages import need
from .. import model
from .common import COMMON, MODEL, PROMPTS, SETTINGS, check_lengths, given

if TYPE_CHECKING:  # it imports torch, which takes longer than an error should
    from ..engines import Finder

FILES = ("needles.json", "needles.svg")
ASKED: Options = {  # instead of starting an engine
    "--url": dict(metavar="URL", help="ask a server that serves MODEL"),
    "--transformers": dict(
        action="store_true", help="ask transformers' implementation; to about 4K tokens"
    ),
}


def add_to(commands: Commands) -> None:
    about = "find needles at every length and depth; MODEL comes from make-checkpoint --task needle"
    parser = add_command(commands, "needles", run, about, MODEL | PROMPTS | COMMON)
    add_options(parser.add_mutually_exclusive_group(), SETTINGS | ASKED)


def run(arguments: argparse.Namespace) -> None:
    need("rich", "accuracy")
    need("matplotlib", "needles.svg")
    _check(arguments)
    output.check(arguments.output, FILES)

    from .. import needles, plot, report

    finder, lengths = _finder(arguments), sorted(arguments.lengths)
    documents = needles.find(finder, lengths, arguments.seed, arguments.chunk)
    output.show(report.needle_table(documents))
    result = json.dumps(given(arguments) | {"documents": documents})
    picture = output.svg(plot.heat_map(documents, _who(arguments)))
    output.write(arguments.output, dict(zip(FILES, (result, picture))))


def _check(arguments: argparse.Namespace) -> None:
    from ...contract import RATIO

    most = model.most_tokens(arguments.model)
    if not model.finds_needles(arguments.model):
        raise UserError(
            f"{arguments.model} is no needle checkpoint: make one with `make-checkpoint DIR --task "
            "needle`, or measure this one with `accuracy recall`"
        )
    check_lengths(arguments.lengths, most)
    for length in arguments.lengths:
        if length % RATIO:
            raise UserError(
                f"--lengths: {length} is no multiple of {RATIO}, the tokens of a group; a document "
                "is made of groups"
            )


def _finder(arguments: argparse.Namespace) -> "Finder":
    from ..engines import Server, Transformers, VllmEngine

    if arguments.url is not None:
        server = Server(arguments.url)
        print(f"{server.url} serves {server.model}, which should be {arguments.model}", flush=True)
        return server
    if arguments.transformers:
        return Transformers(arguments.model)
    longest = max(arguments.lengths)
    return VllmEngine(arguments.model, arguments.settings, longest, arguments.chunk)


def _who(arguments: argparse.Namespace) -> str:
    if arguments.transformers:
        return "transformers"
    return arguments.url or f"vLLM, dsv4_indexer {json.dumps(arguments.settings)}"
