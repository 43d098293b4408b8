"""The command `vllm-dsv4-indexer accuracy`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..settings import NAMESPACE, Settings

if TYPE_CHECKING:  # they import torch, which takes longer than an error should
    from .agreement import Agreement, Observed
    from .recall import Recall


def add_to(commands) -> None:
    """Adds `accuracy` to the subcommands."""
    accuracy = commands.add_parser(
        "accuracy",
        help="what the indexer finds, by context length: needles in haystacks, if MODEL comes from make-checkpoint --task "
        "needle, else the share of the exact top-k that it selects; or what two servers differ in",
    )
    lengths = [2048, 4096, 8192, 16384, 32768]
    accuracy.add_argument("model", metavar="MODEL", help="the checkpoint's directory")
    accuracy.add_argument("--engine", choices=("vllm", "transformers"), default="vllm",
                          help="transformers: needles only, to about 4K tokens (default: %(default)s)")
    accuracy.add_argument("--url", help="a server that runs MODEL, e.g. http://localhost:8000: asked for needles, or compared")
    accuracy.add_argument("--settings", type=json.loads, default={}, metavar="JSON",
                          help="of our backend in vLLM: '{\"impl\": \"stock\"}' is vLLM's own compressor")
    accuracy.add_argument("--lengths", type=lambda text: sorted(map(int, text.split(","))), default=lengths, metavar="N,M",
                          help="in tokens, multiples of 4 (default: 2048 to 32768)")
    accuracy.add_argument("--schedules", type=int, metavar="N",
                          help="also compare the log-probabilities of a prompt of N tokens when it is prefilled in chunks "
                          "of 1 to 8192, beside another, decoded, and taken from the prefix cache; or those of two servers")
    accuracy.add_argument("--against", type=json.loads, metavar="JSON",
                          help="with recall: other settings to compare with; vLLM's own code throughout is "
                          "'{\"impl\": \"stock\", \"projection\": \"engine\"}'")
    accuracy.add_argument("--against-url", metavar="URL", help="another server that runs MODEL, to compare --url with")
    accuracy.add_argument("--tasks", type=lambda text: text.split(","), metavar="T,U",
                          help="with --against-url: compare the scores in these tasks of lm-eval (names, or YAML files), "
                          "e.g. gsm8k,niah_single_1; RULER's are asked at the greatest of --lengths")
    accuracy.add_argument("--samples", type=int, metavar="N", help="of each of --tasks, the first N (default: all)")
    accuracy.add_argument("--prompts", type=int, default=1, metavar="N", help="of recall (default: %(default)s)")
    accuracy.add_argument("--chunk", type=int, default=2039, help="tokens of a prefill step (default: %(default)s)")
    accuracy.add_argument("--seed", type=int, default=0, help="of documents and prompts (default: %(default)s)")
    accuracy.add_argument("--output", type=Path, default=Path("build/accuracy"), metavar="DIR",
                          help="for accuracy.json and accuracy.svg (default: %(default)s)")  # fmt: skip
    accuracy.set_defaults(run=_accuracy)


def _accuracy(arguments: argparse.Namespace) -> None:
    from . import report

    _check(arguments)
    settings = f"vLLM {json.dumps(arguments.settings)}"
    who = arguments.url or {"vllm": settings, "transformers": "transformers"}[arguments.engine]
    result = {"model": arguments.model, "engine": who, "chunk": arguments.chunk, "seed": arguments.seed}
    files = {}
    if arguments.against_url:
        result |= {"against": arguments.against_url} | _compare_servers(arguments)
        if arguments.tasks:
            print(report.task_table(result))
    elif _finds_needles(arguments.model):
        result["documents"] = _find_needles(arguments)
        print(report.needle_table(result))
        files = {"accuracy.svg": report.heat_map(result)}
    else:
        measured = _measure(arguments)
        result["recall"] = [one.recall for one in measured]
        print(report.recall_table(result["recall"], arguments.lengths))
        if arguments.schedules:
            result["agreement"] = _agreements(measured)
    for title, agreements in result.get("agreement", {}).items():
        print("", report.agreement_table(title, agreements), sep="\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in {"accuracy.json": json.dumps(result), **files}.items():
        (arguments.output / name).write_text(text)
        print(f"wrote {arguments.output / name}")


def _find_needles(arguments: argparse.Namespace) -> list[dict]:
    from .document import make_document

    engine = _engine(arguments)
    documents = []
    for length in arguments.lengths:
        start = time.monotonic()
        document = make_document(length, arguments.seed, arguments.chunk, spacing=max(8, length // 256))
        entries = [needle.entry for needle in document.needles]
        documents.append({"length": length, "entries": entries} | engine.found(document))
        print(f"{length} tokens: {len(entries)} needles, {time.monotonic() - start:.0f} s", flush=True)
    return documents


class _Measured(NamedTuple):
    recall: Recall
    observed: Observed | None


def _measure(arguments: argparse.Namespace) -> list[_Measured]:
    """With our settings, then with those that are compared with; each engine in a process of its own, which takes
    what it leaves behind with it."""
    sides = [arguments.settings] + ([] if arguments.against is None else [arguments.against])
    measured = []
    for settings in sides:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured.append(process.submit(_measure_one, arguments, settings).result())
    return measured


def _measure_one(arguments: argparse.Namespace, settings: dict) -> _Measured:
    from .agreement import observe
    from .engines import VllmEngine
    from .recall import recall

    engine = VllmEngine(arguments.model, settings, arguments.lengths[-1], max(arguments.chunk, arguments.schedules or 0))
    engine.set_chunk(arguments.chunk)
    seeds = range(arguments.seed, arguments.seed + arguments.prompts)
    recalls = recall(engine, arguments.model, arguments.lengths[-1], seeds)
    return _Measured(recalls, arguments.schedules and observe(engine, arguments.schedules, arguments.seed))


def _agreements(measured: list[_Measured]) -> dict[str, list[Agreement]]:
    """By what is compared."""
    from .agreement import compare

    agreements = {who: one.observed.agreement for who, one in zip(("with itself", "the other with itself"), measured)}
    if len(measured) == 2:
        ours, others = (one.observed.prefilled for one in measured)
        agreements["with the other"] = [compare(name, ours[name], others[name]) for name in ours]
    return agreements


def _compare_servers(arguments: argparse.Namespace) -> dict:
    compared = {}
    if arguments.schedules:
        from .agreement import between
        from .engines import Server

        one, other = Server(arguments.url), Server(arguments.against_url)
        compared["agreement"] = {"two servers": between(one, other, arguments.schedules, arguments.seed)}
    if arguments.tasks:
        from . import tasks

        urls, length = (arguments.url, arguments.against_url), arguments.lengths[-1]
        compared["tasks"] = tasks.compare(
            arguments.model, urls, arguments.tasks, length, arguments.samples, arguments.seed
        )
    return compared


def _engine(arguments: argparse.Namespace):
    from .engines import Server, Transformers, VllmEngine

    if arguments.url:
        return Server(arguments.url)
    if arguments.engine == "transformers":
        return Transformers(arguments.model)
    return VllmEngine(arguments.model, arguments.settings, arguments.lengths[-1], arguments.chunk)


def _check(arguments: argparse.Namespace) -> None:
    from ..checkpoint.config import MAX_POSITIONS

    if not Path(arguments.model, "config.json").is_file():
        raise ValueError(f"{arguments.model} is no checkpoint: it has no config.json")
    for name in ("chunk", "prompts", "samples"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; it is at least 1")
    if arguments.schedules is not None and not 16 <= arguments.schedules <= arguments.lengths[-1]:
        raise ValueError(f"--schedules is {arguments.schedules}; it goes from 16 to the greatest of --lengths")
    for length in [] if arguments.tasks else arguments.lengths:
        if length % 4 or not 64 <= length <= MAX_POSITIONS - 4:
            raise ValueError(f"--lengths: {length} is not a multiple of 4 from 64 to {MAX_POSITIONS - 4}")
    for settings in (arguments.settings, arguments.against or {}):
        if Settings.read({NAMESPACE: settings}).state_save == "tail":
            raise ValueError(
                "accuracy asks through the prefix cache, and state_save 'tail' is refused with it: leave it out"
            )
    if arguments.against_url or arguments.tasks:
        _check_servers(arguments)
    elif _finds_needles(arguments.model):
        if arguments.against is not None or arguments.schedules:
            raise ValueError(f"{arguments.model} is a needle checkpoint: leave --against and --schedules out")
    elif arguments.url or arguments.engine == "transformers":
        raise ValueError(
            f"{arguments.model} is no needle checkpoint, and recall is measured inside vLLM: leave --url and --engine out, "
            "compare the server with another (--against-url), or make a needle checkpoint with `vllm-dsv4-indexer "
            "make-checkpoint DIR --task needle`"
        )


def _check_servers(arguments: argparse.Namespace) -> None:
    if not arguments.url or not arguments.against_url or not (arguments.schedules or arguments.tasks):
        raise ValueError(
            "two servers are compared with --url and --against-url together, by the log-probabilities of a prompt "
            "(--schedules N) or by lm-eval (--tasks T,U)"
        )


def _finds_needles(model: str) -> bool:
    from ..checkpoint import RECORD

    record = Path(model, RECORD)
    return record.is_file() and json.loads(record.read_text()).get("task") == "needle"
