"""The command `vllm-dsv4-indexer bench`."""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

from .. import output
from ..errors import UserError
from ..options import fill_in, numbers, refuse

# Of the options of measuring; None where it depends on others, or on the machine.
DEFAULTS = {
    "preset": "standard",
    "requests": None,
    "lengths": None,
    "threads": None,
    "implementations": None,
    "hidden": None,
    "kv_dtype": "bfloat16",
    "seconds": 120.0,
    "output": Path("build/bench"),
}
_MOST_TOKENS = 1 << 20  # DeepSeek-V4's longest context
_MOST_HIDDEN = 1 << 16  # several times DeepSeek-V4 Pro's


def add_to(commands) -> None:
    """Adds `bench`, `bench compare` and `bench cost` to the subcommands."""
    bench = commands.add_parser(
        "bench",
        help="measure every implementation, vLLM's own code and the floor; two minutes by default",
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    counts = {"type": numbers, "metavar": "N,M"}
    add = bench.add_argument
    add(
        "--preset",
        choices=("standard", "step", "traffic"),
        help="standard (the default): calls of several lengths and mixes; step: whole steps of "
        "Flash's 21 layers; traffic: chunks of chats and long documents",
    )
    add("--requests", **listed, help="mixes: one, mixed, short, decode (default: all)")
    add("--lengths", **counts, help="tokens of a call (default: some for each mix)")
    add("--threads", **counts, help="at most the number of cores (default: 1 and that number)")
    add(
        "--implementations",
        **listed,
        help="default: all but reference, tail; for traffic and step: cpu, vLLM",
    )
    add(
        "--hidden",
        **counts,
        help="measure calls that project hidden states of these sizes first, as 4096 (Flash) and "
        "7168 (Pro) do; implementations cpu and vllm",
    )
    add(
        "--kv-dtype",
        choices=("bfloat16", "float32"),
        help="of kv_score; vLLM's CPU engine projects to bfloat16 "
        f"(default: {DEFAULTS['kv_dtype']})",
    )
    add(
        "--seconds",
        type=float,
        help=f"about how long to measure (default: {DEFAULTS['seconds']:g})",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"for bench.json and bench.svg (default: {DEFAULTS['output']})",
    )
    add(
        "--model",
        choices=("ascend",),
        help="measure nothing; print what the kernels for Ascend NPUs would cost, from counts of "
        "an emulation",
    )
    bench.set_defaults(run=_bench)
    others = bench.add_subparsers(metavar="[compare A.json B.json | cost]")
    compare = others.add_parser("compare", help="what changed between two runs")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(run=_compare)
    cost = others.add_parser(
        "cost", help="bytes moved and held, on paper and counted on the op; takes seconds"
    )
    cost.set_defaults(run=_cost)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.model is not None:
        from . import ascend_model

        refuse(arguments, DEFAULTS, "goes with measuring, and --model measures nothing")
        return print(ascend_model.report())
    fill_in(arguments, DEFAULTS)
    import torch

    from ..ops.cpu import ALGORITHMS
    from . import contestants, machine, measure, plot, report

    _check(arguments)
    cases = _cases(arguments)
    special = [
        "reference",
        *contestants.TAILS,
        *(ALGORITHMS if arguments.preset == "traffic" else ()),
    ]
    whole = arguments.hidden or arguments.preset == "step"
    available = [n for n in contestants.available() if n in contestants.WHOLE or not whole]
    names = _chosen(arguments.implementations, available, special)
    threads = arguments.threads or sorted({1, _cores()})
    files = ["bench.json"] if whole else ["bench.json", "bench.svg"]  # the plot's subject is the op
    output.check(arguments.output, files)
    options = {
        name: getattr(arguments, name) for name in ("preset", "hidden", "kv_dtype", "seconds")
    }
    result = {"machine": machine.describe(), "options": options, "cells": []}
    steps = len(cases) * len(threads)
    start = time.monotonic()
    _progress(0, steps, start, "starting")
    kv_dtype = getattr(torch, arguments.kv_dtype)
    for done, cells in enumerate(
        measure.measure(cases, names, threads, kv_dtype, arguments.seconds), 1
    ):
        result["cells"] += cells
        _progress(done, steps, start, f"{cells[0]['case']}, threads: {cells[0]['threads']}")
    print(file=sys.stderr)

    print(report.table(result))
    texts = {"bench.json": json.dumps, "bench.svg": plot.svg}
    output.write(arguments.output, {name: texts[name](result) for name in files})


def _check(arguments: argparse.Namespace) -> None:
    for option, most in {
        "lengths": _MOST_TOKENS,
        "threads": _cores(),
        "hidden": _MOST_HIDDEN,
    }.items():
        for number in getattr(arguments, option) or ():
            if not 1 <= number <= most:
                raise UserError(f"--{option}: {number} is not from 1 to {most}")
    if not 0 <= arguments.seconds < math.inf:  # nor NaN
        raise UserError(
            f"--seconds is {arguments.seconds:g}; it is at least 0, for the fewest rounds, and "
            "finite"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _cases(arguments: argparse.Namespace) -> list:
    from . import cases

    if arguments.preset != "standard":
        if arguments.lengths or arguments.requests:
            raise UserError(
                f"--preset {arguments.preset} has its own lengths and requests; leave --lengths "
                "and --requests out"
            )
        found = cases.traffic() if arguments.preset == "traffic" else cases.steps()
    else:
        mixes = _chosen(arguments.requests, list(cases.LENGTHS))
        found = [
            cases.mix(mix, length)
            for mix in mixes
            for length in arguments.lengths or cases.LENGTHS[mix]
        ]
    if arguments.hidden and arguments.preset == "step":
        raise UserError("--preset step gives the layers their kv_score; leave --hidden out")
    if arguments.hidden:
        return [cases.projected(case, hidden) for hidden in arguments.hidden for case in found]
    return found


def _chosen(asked: list[str] | None, known: list[str], not_by_default: list[str] = ()) -> list[str]:
    """What was asked for, or everything; a name that is not known is an error."""
    for name in asked or ():
        if name not in known:
            raise UserError(f"{name!r} is not one of {', '.join(known)}")
    return asked or [name for name in known if name not in not_by_default]


def _progress(done: int, steps: int, start: float, what: str) -> None:
    bar = ("#" * (30 * done // steps)).ljust(30, ".")
    line = f"\r\033[K[{bar}] {done}/{steps} {time.monotonic() - start:4.0f} s  {what}"
    print(line, end="", file=sys.stderr, flush=True)


def _compare(arguments: argparse.Namespace) -> None:
    from . import report

    refuse(arguments, (*DEFAULTS, "model"), "goes with measuring, and `compare` measures nothing")
    print(report.compare(_read(arguments.before), _read(arguments.after)))


def _read(path: Path) -> dict:
    """The result in a file, which may be of another version."""
    from . import report

    try:
        result = json.loads(path.read_text())
        report.table(result)  # looks at everything
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError):  # ValueError: no text, or no JSON
        raise UserError(f"{path} was not written by `vllm-dsv4-indexer bench`") from None
    except KeyError as key:
        raise UserError(
            f"{path}, of another version, has no {key}; run `vllm-dsv4-indexer bench` again"
        ) from None
    return result


def _cost(arguments: argparse.Namespace) -> None:
    from . import cost

    refuse(arguments, (*DEFAULTS, "model"), "goes with measuring, and `cost` measures nothing")
    print(cost.report())
