"""The command `vllm-dsv4-indexer bench`: run, compare, cost."""

import argparse
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import output
from ..errors import UserError
from ..options import Commands, Options, add_command, names, numbers
from ..packages import need

if TYPE_CHECKING:  # they import torch, which takes longer than an error should
    import torch

    from .cases import Case
    from .result import Result

CORES = len(os.sched_getaffinity(0))


def seconds(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:  # nor NaN
        raise argparse.ArgumentTypeError(
            f"{value:g} is not a finite number, 0 or more (0: as few rounds as possible)"
        )
    return value


RUN: Options = {
    "--preset": dict(
        choices=("standard", "step", "traffic"),
        default="standard",
        help="standard: calls of several lengths and mixes; step: whole steps of Flash's 21 "
        "layers; traffic: chunks of chats and long documents (default: %(default)s)",
    ),
    "--requests": dict(
        type=names,
        metavar="A,B",
        help="of standard, its mixes: one, mixed, short, decode (default: all)",
    ),
    "--geometry": dict(
        choices=("128/4", "512/4", "512/128"),
        default="128/4",
        help="of standard, whose calls: head dimension and ratio of the indexer's compressor or of "
        "a main one (default: %(default)s)",
    ),
    "--lengths": dict(
        type=numbers(1, 1 << 20),  # DeepSeek-V4's longest context
        metavar="N,M",
        help="of standard, tokens of a call (default: some for each mix)",
    ),
    "--threads": dict(
        type=numbers(1, CORES),
        metavar="N,M",
        default=sorted({1, CORES}),
        help="at most the number of cores (default: 1 and that number)",
    ),
    "--contestants": dict(
        type=names,
        metavar="A,B",
        help="who is measured, beside the floor: ours, layer, plan, reference, checked, readable, "
        "one_pass, overlay_scan, scatter_pool, vllm, vllm_ops (default: all but reference, checked "
        "and readable; for traffic, not the algorithms; for step and --hidden: ours, vllm)",
    ),
    "--hidden": dict(
        type=numbers(1, 1 << 16),  # several times DeepSeek-V4 Pro's
        metavar="N,M",
        help="measure calls that project hidden states of these sizes first, as 4096 (Flash) and "
        "7168 (Pro) do",
    ),
    "--kv-dtype": dict(
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of kv_score; vLLM's CPU engine projects to bfloat16 (default: %(default)s)",
    ),
    "--seconds": dict(
        type=seconds,
        default=120.0,
        help="about how long to measure (default: %(default)g)",
    ),
    "--output": dict(
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help="for bench.json and bench.svg (default: %(default)s)",
    ),
}
COMPARE: Options = {
    "before": dict(type=Path, metavar="A.json"),
    "after": dict(type=Path, metavar="B.json"),
}


def add_to(commands: Commands) -> None:
    """Adds `bench` to the subcommands."""
    about = "measure the op, vLLM's own code and the floor; compare two runs; count bytes"
    bench = commands.add_parser("bench", help=about, description=about)
    subcommands = bench.add_subparsers(required=True, metavar="COMMAND")
    add_command(subcommands, "run", _run, "measure; two minutes by default", RUN)
    add_command(subcommands, "compare", _compare, "say what changed between two runs", COMPARE)
    about = "count the bytes moved and held, on paper and on the op; takes seconds"
    add_command(subcommands, "cost", _cost, about, {})


def _run(arguments: argparse.Namespace) -> None:
    whole = arguments.hidden or arguments.preset == "step"
    files = ["bench.json"] if whole else ["bench.json", "bench.svg"]  # the plot's subject is the op
    need("rich", "bench")
    if "bench.svg" in files:
        need("matplotlib", "bench.svg")
    import torch

    from . import report

    cases, contestants = _cases(arguments), _contestants(arguments)
    output.check(arguments.output, files)
    result = _measure(arguments, cases, contestants, getattr(torch, arguments.kv_dtype))
    output.show(*report.tables(result))
    output.write(arguments.output, {name: _file(name, result) for name in files})


def _file(name: str, result: "Result") -> str:
    if name == "bench.json":
        return json.dumps(result)
    from . import plot

    return output.svg(plot.figure(result))


def _measure(
    arguments: argparse.Namespace,
    cases: list["Case"],
    contestants: list[str],
    kv_dtype: "torch.dtype",
) -> "Result":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import machine, measure

    options = {
        name: getattr(arguments, name) for name in ("preset", "hidden", "kv_dtype", "seconds")
    }
    result: Result = {"machine": machine.describe(), "options": options, "cells": []}
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=len(cases) * len(arguments.threads))
        for cells in measure.measure(
            cases, contestants, arguments.threads, kv_dtype, arguments.seconds
        ):
            result["cells"] += cells
            what = f"{cells[0]['case']}, threads: {cells[0]['threads']}"
            progress.update(bar, advance=1, description=what)
    return result


def _cases(arguments: argparse.Namespace) -> list["Case"]:
    from . import cases

    if arguments.geometry != "128/4" and (arguments.preset != "standard" or arguments.hidden):
        raise UserError(
            f"--geometry {arguments.geometry} is for the standard calls: leave --preset and "
            "--hidden out"
        )
    if arguments.preset != "standard" and (arguments.lengths or arguments.requests):
        raise UserError(
            f"--preset {arguments.preset} has its own lengths and requests: leave --lengths and "
            "--requests out"
        )
    if arguments.preset == "step":
        if arguments.hidden:
            raise UserError("--preset step gives the layers their kv_score: leave --hidden out")
        return cases.steps()
    found = cases.traffic() if arguments.preset == "traffic" else _standard(arguments)
    if arguments.hidden:
        return [cases.projected(case, hidden) for hidden in arguments.hidden for case in found]
    return found


def _standard(arguments: argparse.Namespace) -> list["Case"]:
    from ..contract import INDEXER, Geometry
    from . import cases

    geometry = Geometry(*map(int, arguments.geometry.split("/")))
    found = [
        cases.mix(mix, length)
        for mix in _chosen(arguments.requests, list(cases.LENGTHS))
        for length in arguments.lengths or cases.LENGTHS[mix]
    ]
    if geometry == INDEXER:
        return found
    return [cases.of_compressor(case, geometry) for case in found]


def _contestants(arguments: argparse.Namespace) -> list[str]:
    from ..ops.cpu import ALGORITHMS
    from . import contestants

    available = contestants.available()
    if arguments.hidden or arguments.preset == "step":
        able = contestants.WHOLE if arguments.hidden else contestants.STEPS
        available = [name for name in available if name in able]
    if arguments.geometry != "128/4":
        available = [name for name in available if name in contestants.EVERY_COMPRESSOR]
    if_asked = {"reference", "checked", "readable"}
    if arguments.preset == "traffic":
        if_asked |= {*ALGORITHMS}
    return _chosen(arguments.contestants, available, if_asked)


def _chosen(
    asked: list[str] | None, known: Sequence[str], if_asked: Collection[str] = ()
) -> list[str]:
    """What was asked for, or all that is known but `if_asked`; an unknown name is an error."""
    for name in asked or ():
        if name not in known:
            raise UserError(f"{name!r} is not one of {', '.join(known)}")
    return asked or [name for name in known if name not in if_asked]


def _compare(arguments: argparse.Namespace) -> None:
    need("rich", "bench compare")
    from . import report

    before, after = report.read(arguments.before), report.read(arguments.after)
    output.show(*report.compare(before, after))


def _cost(arguments: argparse.Namespace) -> None:
    need("rich", "bench cost")
    from . import cost

    output.show(*cost.tables())
