"""`vllm-dsv4-indexer accuracy recall`: the share of the exact top-k that the engine selects."""

import argparse
import json

from ... import output
from ...errors import UserError
from ...options import Commands, Options, add_command, number
from ...packages import need
from .. import model
from .common import AGAINST, COMMON, MODEL, PROMPTS, SETTINGS, check_lengths, given, sides

COUNT: Options = {
    "--prompts": dict(
        type=number(1), default=1, metavar="N", help="how many prompts (default: %(default)s)"
    )
}


def add_to(commands: Commands) -> None:
    about = "measure the share of the exact top-k that the engine selects in random prompts"
    options = MODEL | PROMPTS | COUNT | SETTINGS | AGAINST | COMMON
    add_command(commands, "recall", run, about, options)


def run(arguments: argparse.Namespace) -> None:
    need("rich", "accuracy")
    if arguments.against is not None:
        need("scipy", "--against")
    _check(arguments)
    output.check(arguments.output, ["recall.json"])

    from .. import process, recall, report

    longest = max(arguments.lengths)
    seeds = range(arguments.seed, arguments.seed + arguments.prompts)
    recalls = []
    for settings in sides(arguments):
        print(f"{json.dumps(settings)}: {arguments.prompts} x {longest} tokens", flush=True)
        others = (arguments.model, longest, arguments.chunk, seeds)
        recalls.append(process.with_settings(recall.measure, settings, *others))
    output.show(report.recall_table(recalls, sorted(arguments.lengths)))
    result = given(arguments) | {"recall": recalls}
    output.write(arguments.output, {"recall.json": json.dumps(result)})


def _check(arguments: argparse.Namespace) -> None:
    most = model.most_tokens(arguments.model)
    if model.finds_needles(arguments.model):
        raise UserError(
            f"{arguments.model} is a needle checkpoint, whose recall says nothing about text: "
            "measure it with `accuracy needles`"
        )
    check_lengths(arguments.lengths, most)

    from .. import recall, weights

    if max(arguments.lengths) <= recall.ALL_SELECTED:
        raise UserError(
            f"recall needs a length above {recall.ALL_SELECTED}: up to there all entries are "
            "selected"
        )
    weights.Indexers(arguments.model)  # raises now what recall would raise after starting an engine
