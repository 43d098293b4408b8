"""The command `vllm-dsv4-indexer accuracy`."""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import output
from ..errors import UserError
from ..options import fill_in, numbers, refuse
from ..settings import NAMESPACE, Settings

if TYPE_CHECKING:  # they import torch, which takes longer than an error should
    from .agreement import Agreement, Observed
    from .recall import Recall

NEEDLES, RECALL, SERVERS = "needles", "recall", "two servers"
# The options that have no meaning everywhere, and where they have one.
MODES = {
    "engine": [NEEDLES],
    "url": [NEEDLES, SERVERS],
    "settings": [NEEDLES, RECALL],
    "chunk": [NEEDLES, RECALL],
    "against": [RECALL],
    "prompts": [RECALL],
    "schedules": [RECALL, SERVERS],
    "against_url": [SERVERS],
    "tasks": [SERVERS],
    "samples": [SERVERS],
}
DEFAULTS = {
    "lengths": [2048, 4096, 8192, 16384, 32768],
    "engine": "vllm",
    "settings": {},
    "chunk": 2039,
    "prompts": 1,
}
FILES = ("accuracy.json", "accuracy.svg")
EXAMPLES = """\
examples:
  accuracy NEEDLES
      of make-checkpoint --task needle: find needles at every length and depth
  accuracy NEEDLES --url http://localhost:8000
      the same of a server
  accuracy MODEL --lengths 4096 --prompts 4
      recall: the share of the exact top-k that the engine selects
  accuracy MODEL --lengths 4096 --schedules 2048 \\
      --against '{"impl": "stock", "projection": "engine"}'
      recall and log-probabilities, beside those of vLLM's own code
  accuracy MODEL --url http://localhost:8000 --against-url http://localhost:8001 \\
      --schedules 2048 --tasks gsm8k
      what two servers differ in: log-probabilities, lm-eval's scores
"""


def add_to(commands) -> None:
    """Adds `accuracy` to the subcommands."""
    accuracy = commands.add_parser(
        "accuracy",
        help="what the indexer finds, and what it changes in log-probabilities and in lm-eval's "
        "scores",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lengths = ",".join(map(str, DEFAULTS["lengths"]))
    stock = '{"impl": "stock", "projection": "engine"}'
    add = accuracy.add_argument
    add("model", metavar="MODEL", help="the checkpoint's directory")
    add(
        "--lengths",
        type=_lengths,
        metavar="N,M",
        help=f"of documents and prompts, in tokens (default: {lengths}); "
        "RULER is asked at the greatest",
    )
    add(
        "--settings",
        type=_settings,
        metavar="JSON",
        help='of our backend in vLLM, e.g. \'{"projection": "engine"}\'',
    )
    add(
        "--chunk",
        type=int,
        metavar="N",
        help="tokens of a prefill step; needles lie at its borders, too "
        f"(default: {DEFAULTS['chunk']})",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of documents, prompts and samples (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("build/accuracy"),
        metavar="DIR",
        help=f"for {' and '.join(FILES)} (default: %(default)s)",
    )

    add = accuracy.add_argument_group(
        "needles, if MODEL comes from make-checkpoint --task needle"
    ).add_argument
    add(
        "--engine",
        choices=("vllm", "transformers"),
        help=f"transformers: to about 4K tokens (default: {DEFAULTS['engine']})",
    )
    add("--url", help="a server that runs MODEL, instead of an engine")

    add = accuracy.add_argument_group("recall, of any other MODEL").add_argument
    add("--prompts", type=int, metavar="N", help=f"how many (default: {DEFAULTS['prompts']})")
    add(
        "--schedules",
        type=int,
        metavar="N",
        help="compare the log-probabilities of a prompt of N tokens, too: prefilled in chunks of "
        "1 to 8192, beside another, decoded, and taken from the prefix cache",
    )
    add(
        "--against",
        type=_settings,
        metavar="JSON",
        help=f"compare with other settings; '{stock}' is vLLM's own code",
    )

    add = accuracy.add_argument_group("two servers, --url and").add_argument
    add(
        "--against-url",
        metavar="URL",
        help="which runs MODEL, too; with --schedules, --tasks or both",
    )
    add(
        "--tasks",
        type=lambda text: text.split(","),
        metavar="T,U",
        help="compare the scores in these tasks of lm-eval (names, or YAML files), e.g. "
        "gsm8k,niah_single_1",
    )
    add("--samples", type=int, metavar="N", help="of each task, the first N (default: all)")
    accuracy.set_defaults(run=_accuracy)


def _settings(text: str) -> dict:
    try:
        settings = json.loads(text)
        if Settings.read({NAMESPACE: settings}).state_save == "tail":
            raise ValueError(
                "state_save 'tail' is refused with the prefix cache, which is asked here: leave it "
                "out"
            )
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return settings


def _lengths(text: str) -> list[int]:
    return sorted(numbers(text))


def _accuracy(arguments: argparse.Namespace) -> None:
    mode = _mode(arguments)
    _refuse_ignored(arguments, mode)
    fill_in(arguments, DEFAULTS)
    _check(arguments, mode)
    files = FILES if mode == NEEDLES else FILES[:1]
    output.check(arguments.output, files)

    options = [name for name, modes in MODES.items() if mode in modes]
    result = {name: getattr(arguments, name) for name in ("model", "lengths", "seed", *options)}
    measure = {NEEDLES: _find_needles, RECALL: _measure_recall, SERVERS: _compare_servers}[mode]
    result |= measure(arguments)
    _print(arguments, mode, result)
    output.write(arguments.output, {name: _text(name, result) for name in files})


def _print(arguments: argparse.Namespace, mode: str, result: dict) -> None:
    from . import recall, report

    if mode == NEEDLES:
        print(report.needle_table(result))
    if mode == RECALL:
        print(report.recall_table(result["recall"], arguments.lengths))
    if arguments.tasks:
        print(report.task_table(result))
    for title, agreements in result.get("agreement", {}).items():
        print("", report.agreement_table(title, agreements), sep="\n")
    if arguments.schedules and arguments.schedules <= recall.ALL_SELECTED:
        print(
            f"(Up to {recall.ALL_SELECTED} tokens all entries are selected, and a wrong compressor "
            "need not show.)"
        )


def _text(name: str, result: dict) -> str:
    from . import report

    return json.dumps(result) if name.endswith(".json") else report.heat_map(result)


def _find_needles(arguments: argparse.Namespace) -> dict:
    from .document import make_document

    engine = _engine(arguments)
    documents = []
    for length in arguments.lengths:
        start = time.monotonic()
        document = make_document(
            length, arguments.seed, arguments.chunk, spacing=max(8, length // 256)
        )
        entries = [needle.entry for needle in document.needles]
        documents.append({"length": length, "entries": entries} | engine.found(document))
        print(
            f"{length} tokens: {len(entries)} needles, {time.monotonic() - start:.0f} s", flush=True
        )
    return {"documents": documents}


def _engine(arguments: argparse.Namespace):
    from .engines import Server, Transformers, VllmEngine

    if arguments.url is not None:
        server = Server(arguments.url)
        print(f"{server.url} serves {server.model}, which should be {arguments.model}", flush=True)
        return server
    if arguments.engine == "transformers":
        return Transformers(arguments.model)
    return VllmEngine(arguments.model, arguments.settings, arguments.lengths[-1], arguments.chunk)


class _Measured(NamedTuple):
    recall: Recall
    observed: Observed | None


def _measure_recall(arguments: argparse.Namespace) -> dict:
    """With our settings, then with those that are compared with; each engine in a process of its
    own, which takes what it leaves behind with it."""
    sides = [arguments.settings] + ([] if arguments.against is None else [arguments.against])
    measured = [_measure_apart(arguments, settings) for settings in sides]
    result = {"recall": [one.recall for one in measured]}
    return result | ({"agreement": _agreements(measured)} if arguments.schedules else {})


def _measure_apart(arguments: argparse.Namespace, settings: dict) -> _Measured:
    from . import process

    try:
        return process.call(_measure_one, arguments, settings)
    except process.Died as death:
        why = f"the engine with the settings {json.dumps(settings)} {death}"
        if death.exitcode == -signal.SIGKILL:
            why += (
                ". Nothing in it sends that signal; the system does where memory ends (`dmesg` "
                "tells). Try fewer tokens: --schedules N takes about 1.4 MiB a token"
            )
        raise UserError(why) from None
    except Exception as error:
        error.add_note(f"with the settings {json.dumps(settings)}")
        raise


def _measure_one(arguments: argparse.Namespace, settings: dict) -> _Measured:
    from .agreement import observe
    from .engines import VllmEngine
    from .recall import recall

    longest = arguments.lengths[-1]
    engine = VllmEngine(
        arguments.model, settings, longest, max(arguments.chunk, arguments.schedules or 0)
    )
    engine.set_chunk(arguments.chunk)
    print(f"{json.dumps(settings)}: recall in {arguments.prompts} x {longest} tokens", flush=True)
    recalls = recall(
        engine, arguments.model, longest, range(arguments.seed, arguments.seed + arguments.prompts)
    )
    if not arguments.schedules:
        return _Measured(recalls, None)
    print(f"{json.dumps(settings)}: log-probabilities of {arguments.schedules} tokens", flush=True)
    return _Measured(recalls, observe(engine, arguments.schedules, arguments.seed))


def _agreements(measured: list[_Measured]) -> dict[str, list[Agreement]]:
    """By what is compared."""
    from .agreement import compare

    agreements = {
        who: one.observed.agreement
        for who, one in zip(("with itself", "the other with itself"), measured)
    }
    if len(measured) == 2:
        ours, others = (one.observed.prefilled for one in measured)
        agreements["with the other"] = [compare(name, ours[name], others[name]) for name in ours]
    return agreements


def _compare_servers(arguments: argparse.Namespace) -> dict:
    from .engines import Server

    servers = Server(arguments.url), Server(arguments.against_url)
    if servers[0].model != servers[1].model:
        raise UserError(
            f"{servers[0].url} serves {servers[0].model}, {servers[1].url} serves "
            f"{servers[1].model}: a difference would be that of the models. Serve one twice (with "
            "two paths to it: under one --served-model-name)"
        )
    result = {}
    if arguments.tasks:
        from . import tasks

        longest = arguments.lengths[-1]
        scores = tasks.compare(
            arguments.model, servers, arguments.tasks, longest, arguments.samples, arguments.seed
        )
        result["scores"] = scores
    if arguments.schedules:
        from .agreement import between

        result["agreement"] = {
            "two servers": between(*servers, arguments.schedules, arguments.seed)
        }
    return result


def _mode(arguments: argparse.Namespace) -> str:
    if not Path(arguments.model, "config.json").is_file():
        raise UserError(f"{arguments.model} is no checkpoint: it has no config.json")
    if arguments.against_url or arguments.tasks:
        return SERVERS
    from ..checkpoint import RECORD

    record = Path(arguments.model, RECORD)
    return NEEDLES if record.is_file() and _read(record).get("task") == "needle" else RECALL


def _read(path: Path) -> dict:
    """A JSON object of the checkpoint."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def _refuse_ignored(arguments: argparse.Namespace, mode: str) -> None:
    """Before the defaults are filled in."""
    for name, modes in MODES.items():
        if mode not in modes:
            refuse(arguments, [name], f"goes with {' and '.join(modes)}, and this is {mode}")
    if arguments.url is not None:
        refuse(
            arguments, ["engine"], "is one of this command's own, and --url names a server instead"
        )
    if arguments.url is not None or arguments.engine == "transformers":
        refuse(
            arguments,
            ["settings"],
            "are those of our backend in an engine of this command: give them to the server itself",
        )
    if not arguments.tasks:
        refuse(arguments, ["samples"], "are those of --tasks, which is not given")
        if mode == SERVERS:
            refuse(arguments, ["lengths"], "are those of --tasks, which is not given")


def _check(arguments: argparse.Namespace, mode: str) -> None:
    for name in ("chunk", "prompts", "samples"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; it is at least 1")
    _check_lengths(arguments, mode)
    asked = arguments.schedules or arguments.tasks
    if mode == SERVERS and not (arguments.url and arguments.against_url and asked):
        raise UserError(
            "two servers are compared with --url and --against-url together, by the "
            "log-probabilities of a prompt "
            "(--schedules N) or by lm-eval (--tasks T,U)"
        )
    if mode == RECALL:
        from .weights import Indexers

        Indexers(arguments.model)  # refuses now what recall could not read later


def _check_lengths(arguments: argparse.Namespace, mode: str) -> None:
    from ..contract import RATIO
    from .recall import ALL_SELECTED

    most = _read(Path(arguments.model, "config.json")).get("max_position_embeddings", 0) - RATIO
    for length in arguments.lengths if mode != SERVERS or arguments.tasks else []:
        if not 64 <= length <= most:
            raise UserError(
                f"--lengths: {length} is not from 64 to {most}, which is what the model can"
            )
        if mode == NEEDLES and length % RATIO:
            raise UserError(
                f"--lengths: {length} is no multiple of {RATIO}; a document with needles is made "
                "of groups"
            )
    if mode == RECALL and arguments.lengths[-1] <= ALL_SELECTED:
        raise UserError(
            f"recall needs a length above {ALL_SELECTED}: up to there all entries are selected"
        )
    longest = arguments.lengths[-1] if mode == RECALL else most
    if arguments.schedules is not None and not 16 <= arguments.schedules <= longest:
        raise UserError(
            f"--schedules is {arguments.schedules}; it goes from 16 to the greatest length, "
            f"{longest}"
        )
