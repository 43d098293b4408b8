"""The command `vllm-dsv4-indexer`."""

import argparse
import sys
import time

from vllm_dsv4_indexer import __version__
from vllm_dsv4_indexer.accuracy import command as accuracy
from vllm_dsv4_indexer.bench import command as bench


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit status; a mistake of the user's is one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"vllm-dsv4-indexer {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Tools around the dsv4_indexer backend of vLLM."
    parser = argparse.ArgumentParser(prog="vllm-dsv4-indexer", description=about)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make-checkpoint", help="write a small DeepSeek-V4 checkpoint, to try the machinery on")
    make.add_argument("directory", metavar="DIR", help="where to; an earlier checkpoint of ours is replaced")
    make.add_argument(
        "--task", choices=["babble", "needle"], default="babble",
        help="babble: random weights; needle: finds needles in haystacks by its indexer alone (default: %(default)s)",
    )  # fmt: skip
    make.add_argument("--layers", type=int, metavar="N", help="of babble: layers, at least 3 (default: 4)")
    make.add_argument("--hidden", type=int, metavar="H", help="of babble: hidden size, a multiple of 32 (default: 512)")
    make.add_argument("--seed", type=int, default=0, metavar="S", help="of the weights (default: %(default)s)")
    make.set_defaults(run=_make_checkpoint)
    bench.add_to(commands)
    accuracy.add_to(commands)
    return parser


def _make_checkpoint(arguments: argparse.Namespace) -> None:
    from vllm_dsv4_indexer.checkpoint import make_checkpoint, make_needle_checkpoint

    start = time.monotonic()
    sizes = {name: getattr(arguments, name) for name in ("layers", "hidden") if getattr(arguments, name) is not None}
    if arguments.task == "babble":
        make_checkpoint(arguments.directory, seed=arguments.seed, report=print, **sizes)
    elif sizes:
        raise ValueError(f"--task needle has its own sizes; leave --{' and --'.join(sizes)} out")
    else:
        make_needle_checkpoint(arguments.directory, arguments.seed, report=print)
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
