"""The command `vllm-dsv4-indexer`."""

import argparse
import sys
import time

from vllm_dsv4_indexer import __version__
from vllm_dsv4_indexer.accuracy import command as accuracy
from vllm_dsv4_indexer.bench import command as bench
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.options import fill_in, refuse

SIZES = {"layers": 4, "hidden": 512}  # of --task babble


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit status. What the user can mend is one line on stderr
    and status 2; any other error is a fault, and keeps its traceback."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"vllm-dsv4-indexer {arguments.command}: {line}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Tools around the dsv4_indexer backend of vLLM."
    parser = argparse.ArgumentParser(prog="vllm-dsv4-indexer", description=about)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_make_checkpoint(commands)
    bench.add_to(commands)
    accuracy.add_to(commands)
    return parser


def _add_make_checkpoint(commands) -> None:
    make = commands.add_parser(
        "make-checkpoint", help="write a small DeepSeek-V4 checkpoint, to try the machinery on"
    )
    add = make.add_argument
    add("directory", metavar="DIR", help="where to; an earlier checkpoint of ours is replaced")
    add(
        "--task",
        choices=["babble", "needle"],
        default="babble",
        help="babble: random weights; needle: finds needles in haystacks by its indexer alone "
        "(default: %(default)s)",
    )
    add(
        "--layers",
        type=int,
        metavar="N",
        help=f"of babble: layers, at least 3 (default: {SIZES['layers']})",
    )
    add(
        "--hidden",
        type=int,
        metavar="H",
        help=f"of babble: hidden size, a multiple of 32 (default: {SIZES['hidden']})",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the weights (default: %(default)s)")
    make.set_defaults(run=_make_checkpoint)


def _make_checkpoint(arguments: argparse.Namespace) -> None:
    from vllm_dsv4_indexer.checkpoint import make_checkpoint, make_needle_checkpoint

    start = time.monotonic()
    if arguments.task == "needle":
        refuse(arguments, SIZES, "goes with --task babble, and needle has its own sizes")
        make_needle_checkpoint(arguments.directory, arguments.seed, report=print)
    else:
        fill_in(arguments, SIZES)
        sizes = {name: getattr(arguments, name) for name in SIZES}
        make_checkpoint(arguments.directory, seed=arguments.seed, report=print, **sizes)
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
