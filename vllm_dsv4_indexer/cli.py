"""The command `vllm-dsv4-indexer`."""

import argparse
import sys
import time
from pathlib import Path

from vllm_dsv4_indexer import __version__, doctor, options
from vllm_dsv4_indexer.accuracy import commands as accuracy
from vllm_dsv4_indexer.bench import command as bench
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.packages import need

PROGRAM = "vllm-dsv4-indexer"
MAKE_CHECKPOINT: options.Options = {
    "directory": dict(metavar="DIR", help="to write; an earlier checkpoint of ours is replaced"),
    "--task": dict(
        choices=["babble", "needle"],
        default="babble",
        help="babble: random weights; needle: weights that find needles in haystacks by the "
        "indexer alone (default: %(default)s)",
    ),
    "--layers": dict(type=int, metavar="N", help="of babble: layers, at least 3 (default: 4)"),
    "--hidden": dict(
        type=int,
        metavar="H",
        help="of babble: hidden size, a multiple of 32 (default: 512)",
    ),
    "--seed": dict(type=int, default=0, metavar="S", help="of the weights (default: %(default)s)"),
}

REPLAY: options.Options = {
    "file": dict(type=Path, metavar="FILE", help="a capture, as the setting `capture` makes it"),
    "--impl": dict(
        default="cpu",
        metavar="NAME",
        help="compared with the reference: an implementation of the op for CPUs (default: "
        "%(default)s)",
    ),
}

EXPLAIN: options.Options = {
    "model": dict(metavar="MODEL", help="its folder or name; only config.json is read"),
    "flags": dict(
        nargs=argparse.REMAINDER,
        metavar="FLAGS",
        help="those of vllm serve, such as --max-model-len 65536 --max-num-batched-tokens 2048",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status. A UserError, which the user can mend, is one
    line on stderr and status 2. Any other exception is a bug and keeps its traceback."""
    prog = PROGRAM
    try:
        arguments = _parser().parse_args(argv)
        prog = arguments.prog
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> options.Parser:
    about = "Tools around the dsv4_indexer backend of vLLM."
    parser = options.Parser(prog=PROGRAM, description=about)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    options.add_command(
        commands,
        "make-checkpoint",
        _make_checkpoint,
        "write a small DeepSeek-V4 checkpoint to try the backend with",
        MAKE_CHECKPOINT,
    )
    options.add_command(
        commands,
        "doctor",
        doctor.run,
        "say what is installed and whether the backend would start; paste it into your issue",
        doctor.OPTIONS,
    )
    options.add_command(
        commands,
        "explain",
        _explain,
        "say what the caches of a model take with flags of vllm serve, and what is refused",
        EXPLAIN,
    )
    options.add_command(
        commands,
        "replay",
        _replay,
        "run a captured step and compare it with the reference; status 1 if it differs",
        REPLAY,
    )
    bench.add_to(commands)
    accuracy.add_to(commands)
    return parser


def _make_checkpoint(arguments: argparse.Namespace) -> None:
    sizes = {
        name: size
        for name in ("layers", "hidden")
        if (size := getattr(arguments, name)) is not None
    }
    if arguments.task == "needle" and sizes:
        given = " and ".join(f"--{name}" for name in sizes)
        raise UserError(f"the needle checkpoint has its own sizes: leave {given} out")

    from vllm_dsv4_indexer.checkpoint import make_checkpoint, make_needle_checkpoint

    start = time.monotonic()
    if arguments.task == "needle":
        make_needle_checkpoint(arguments.directory, arguments.seed, report=print)
    else:
        make_checkpoint(arguments.directory, seed=arguments.seed, report=print, **sizes)
    print(f"done in {time.monotonic() - start:.0f} s")


def _explain(arguments: argparse.Namespace) -> int:
    need("vllm", "explain")
    from vllm_dsv4_indexer.explain import explain

    return explain(arguments.model, arguments.flags)


def _replay(arguments: argparse.Namespace) -> int:
    need("torch", "replay")
    need("safetensors", "replay")
    from vllm_dsv4_indexer.replay import replay

    return replay(arguments.file, arguments.impl)


if __name__ == "__main__":
    sys.exit(main())
