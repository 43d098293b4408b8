"""`vllm-dsv4-indexer accuracy compare`: log-probabilities of one engine under other schedules, of
two engines or of two servers; and two servers' scores in lm-eval's tasks."""

import argparse
import json
from typing import Any

from ... import output
from ...errors import UserError
from ...options import Commands, Options, add_command, names, number
from ...packages import need
from .. import model
from .common import AGAINST, COMMON, MODEL, SETTINGS, SHORTEST, STOCK, given, sides

CONTEXT = 4096
OPTIONS: Options = {
    "--tokens": dict(
        type=number(0),
        default=2560,
        metavar="N",
        help="compare the log-probabilities of a prompt of N tokens, at least 16; 0: compare none "
        "(default: %(default)s)",
    ),
    "--servers": dict(
        nargs=2,
        metavar="URL",
        help="compare two servers that serve MODEL, instead of starting engines",
    ),
    "--tasks": dict(
        type=names,
        metavar="T,U",
        help="with --servers: also compare lm-eval's scores in these tasks (names or YAML files), "
        "e.g. gsm8k,niah_single_1",
    ),
    "--samples": dict(
        type=number(1), metavar="N", help="take the first N of each task (default: all)"
    ),
    "--context": dict(
        type=number(SHORTEST),
        metavar="N",
        help=f"tokens in a prompt of RULER's tasks (default: {CONTEXT})",
    ),
}
EXAMPLES = f"""\
examples:
  accuracy compare MODEL
      one engine with itself: in chunks of 1 to 2560 tokens, beside another prompt, decoded, and
      taken from the prefix cache
  accuracy compare MODEL --against '{STOCK}'
      the same, beside vLLM's own code
  accuracy compare MODEL --servers http://localhost:8000 http://localhost:8001 --tasks gsm8k
      two servers: log-probabilities and lm-eval's scores
"""


def add_to(commands: Commands) -> None:
    about = "compare log-probabilities under other schedules or settings, and two servers"
    add_command(
        commands,
        "compare",
        run,
        about,
        MODEL | OPTIONS | SETTINGS | AGAINST | COMMON,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(arguments: argparse.Namespace) -> None:
    need("rich", "accuracy")
    _check(arguments)
    output.check(arguments.output, ["compare.json"])
    measured = _servers(arguments) if arguments.servers else _engines(arguments)

    from .. import recall, report

    for title, agreements in measured["agreement"].items():
        output.show(report.agreement_table(title, agreements))
    if 0 < arguments.tokens <= recall.ALL_SELECTED:
        print(
            f"(Up to {recall.ALL_SELECTED} tokens all entries are selected, and a wrong compressor "
            "need not show.)"
        )
    if arguments.tasks:
        output.show(report.task_table(arguments.servers, measured["scores"]))
    output.write(arguments.output, {"compare.json": json.dumps(given(arguments) | measured)})


def _engines(arguments: argparse.Namespace) -> dict[str, Any]:
    from .. import agreement, process

    observed = []
    for settings in sides(arguments):
        print(f"{json.dumps(settings)}: a prompt of {arguments.tokens} tokens", flush=True)
        others = (arguments.model, arguments.tokens, arguments.seed)
        observed.append(process.with_settings(agreement.observe, settings, *others))
    return {"agreement": agreement.between_engines(observed)}


def _servers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities come first: a server that cannot give them says so before hours of
    tasks."""
    from .. import agreement, engines, tasks

    one, other = servers = [engines.Server(url) for url in arguments.servers]
    if one.model != other.model:
        raise UserError(
            f"{one.url} serves {one.model}, {other.url} serves {other.model}: name two servers of "
            "one model. If it only has two names, start both with one --served-model-name"
        )
    result: dict[str, Any] = {"agreement": {}}
    if arguments.tokens:
        agreements = agreement.between_servers(one, other, arguments.tokens, arguments.seed)
        result["agreement"]["two servers"] = agreements
    if arguments.tasks:
        result["scores"] = tasks.compare(
            arguments.model,
            servers,
            arguments.tasks,
            arguments.context or CONTEXT,
            arguments.samples,
            arguments.seed,
        )
    return result


def _check(arguments: argparse.Namespace) -> None:
    most = model.most_tokens(arguments.model)
    if arguments.tokens and not 16 <= arguments.tokens <= most:
        raise UserError(
            f"--tokens: {arguments.tokens} is not from 16 to {most}, which the model can take"
        )
    if arguments.servers and (arguments.settings or arguments.against is not None):
        raise UserError(
            "--settings and --against start engines, and --servers names servers that run already: "
            "leave one or the other out"
        )
    if arguments.tasks:
        if not arguments.servers:
            raise UserError("--tasks needs two servers: name them with --servers URL URL")
        need("lm_eval", "--tasks")
    elif arguments.samples or arguments.context:
        raise UserError("--samples and --context go with --tasks: leave them out, or name tasks")
    elif not arguments.tokens:
        raise UserError("there is nothing to compare: --tokens is 0, and no --tasks are named")
