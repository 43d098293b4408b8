"""The command `vllm-dsv4-indexer accuracy`."""

import argparse
import json
import time
from pathlib import Path

from ..settings import NAMESPACE, Settings


def add_to(commands) -> None:
    """Adds `accuracy` to the subcommands."""
    accuracy = commands.add_parser(
        "accuracy",
        help="what the indexer finds, by context length: needles in haystacks, if MODEL comes from make-checkpoint --task "
        "needle, else the share of the exact top-k that it selects",
    )
    lengths = [2048, 4096, 8192, 16384, 32768]
    accuracy.add_argument("model", metavar="MODEL", help="the checkpoint's directory")
    accuracy.add_argument("--engine", choices=("vllm", "transformers"), default="vllm",
                          help="transformers: needles only, to about 4K tokens (default: %(default)s)")
    accuracy.add_argument("--url", help="needles only: a server that runs MODEL, e.g. http://localhost:8000")
    accuracy.add_argument("--settings", type=json.loads, default={}, metavar="JSON",
                          help="of our backend in vLLM: '{\"impl\": \"stock\"}' is vLLM's own compressor")
    accuracy.add_argument("--lengths", type=lambda text: sorted(map(int, text.split(","))), default=lengths, metavar="N,M",
                          help="in tokens, multiples of 4 (default: 2048 to 32768)")
    accuracy.add_argument("--schedules", type=int, metavar="N",
                          help="with recall: also compare the log-probabilities of a prompt of N tokens when it is "
                          "prefilled in other chunks, beside another, decoded, and taken from the prefix cache")
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
    if _finds_needles(arguments.model):
        result["documents"] = _find_needles(arguments)
        print(report.needle_table(result))
        files = {"accuracy.svg": report.heat_map(result)}
    else:
        result |= _measure_recall(arguments)
        print(report.recall_table(result, arguments.lengths))
        if "agreement" in result:
            print(report.agreement_table(result))
        files = {}
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


def _measure_recall(arguments: argparse.Namespace) -> dict:
    from .agreement import agreement
    from .recall import recall

    engine = _engine(arguments)
    measured = {"recall": recall(engine, arguments.model, arguments.lengths[-1], arguments.seed)}
    if arguments.schedules:
        measured["agreement"] = agreement(engine, arguments.schedules, arguments.seed)
    return measured


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
    if Settings.read({NAMESPACE: arguments.settings}).state_save == "tail":
        raise ValueError("accuracy asks through the prefix cache, and state_save 'tail' is refused with it: leave it out")
    if arguments.chunk < 1:
        raise ValueError(f"--chunk is {arguments.chunk}; it is at least 1")
    if arguments.schedules is not None and not 16 <= arguments.schedules <= arguments.lengths[-1]:
        raise ValueError(f"--schedules is {arguments.schedules}; it goes from 16 to the greatest of --lengths")
    for length in arguments.lengths:
        if length % 4 or not 64 <= length <= MAX_POSITIONS - 4:
            raise ValueError(f"--lengths: {length} is not a multiple of 4 from 64 to {MAX_POSITIONS - 4}")
    if (arguments.url or arguments.engine == "transformers") and not _finds_needles(arguments.model):
        raise ValueError(
            f"{arguments.model} is no needle checkpoint, and recall is measured inside vLLM: leave --url and --engine out, "
            "or make one with `vllm-dsv4-indexer make-checkpoint DIR --task needle`"
        )


def _finds_needles(model: str) -> bool:
    from ..checkpoint import RECORD

    record = Path(model, RECORD)
    return record.is_file() and json.loads(record.read_text()).get("task") == "needle"
