"""The command `vllm-dsv4-indexer accuracy`."""

import argparse
import json
import time
from pathlib import Path

ENGINES = ("cpu", "reference", "stock", "transformers")


def add_to(commands) -> None:
    """Adds `accuracy` to the subcommands."""
    accuracy = commands.add_parser(
        "accuracy", help="find needles in haystacks, by length and depth, with a checkpoint of make-checkpoint --task needle"
    )
    accuracy.add_argument("model", metavar="MODEL", help="the checkpoint")
    accuracy.add_argument(
        "--engine", choices=ENGINES, default="cpu",
        help="vLLM with an implementation of ours, with its own compressor (stock), or transformers (default: %(default)s)",
    )  # fmt: skip
    accuracy.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 4096, 8192, 16384, 32768],
        metavar="N,M", help="tokens of the documents, multiples of 4 (default: 2048 to 32768)",
    )  # fmt: skip
    accuracy.add_argument("--chunk", type=int, default=2039, help="tokens of a prefill step (default: %(default)s, a prime)")
    accuracy.add_argument("--seed", type=int, default=0, help="of the documents (default: %(default)s)")
    accuracy.add_argument("--output", type=Path, default=Path("build/accuracy"), metavar="DIR",
                          help="for accuracy.json and accuracy.svg (default: %(default)s)")  # fmt: skip
    accuracy.set_defaults(run=_accuracy)


def _accuracy(arguments: argparse.Namespace) -> None:
    from . import report
    from .document import make_document

    _check(arguments)
    engine = _engine(arguments)
    result = {"model": arguments.model, "engine": arguments.engine, "chunk": arguments.chunk, "documents": []}
    for length in arguments.lengths:
        start = time.monotonic()
        document = make_document(length, arguments.seed, arguments.chunk, spacing=max(8, length // 256))
        found = engine.found(document)
        entries = [needle.entry for needle in document.needles]
        result["documents"].append({"length": length, "entries": entries} | found)
        print(f"{length} tokens: {len(entries)} needles, {time.monotonic() - start:.0f} s", flush=True)

    print(report.table(result))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in {"accuracy.json": json.dumps(result), "accuracy.svg": report.svg(result)}.items():
        (arguments.output / name).write_text(text)
        print(f"wrote {arguments.output / name}")


def _check(arguments: argparse.Namespace) -> None:
    from ..checkpoint import RECORD
    from ..checkpoint.config import MAX_POSITIONS

    record = Path(arguments.model, RECORD)
    if not record.is_file() or json.loads(record.read_text()).get("task") != "needle":
        raise ValueError(
            f"{arguments.model} is no needle checkpoint: make one with `vllm-dsv4-indexer make-checkpoint DIR --task needle`"
        )
    for length in arguments.lengths:
        if length % 4 or not 64 <= length <= MAX_POSITIONS - 4:
            raise ValueError(f"--lengths: {length} is not a multiple of 4 from 64 to {MAX_POSITIONS - 4}")


def _engine(arguments: argparse.Namespace):
    from .engines import Transformers, VllmEngine

    if arguments.engine == "transformers":
        return Transformers(arguments.model)
    return VllmEngine(arguments.model, arguments.engine, max(arguments.lengths), arguments.chunk)
