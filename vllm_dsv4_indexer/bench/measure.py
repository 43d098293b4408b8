"""How the times are taken.

One process for each number of threads, since libraries keep the number that they see first. In it
every round calls each contestant once, in a new order, on the same inputs and caches, and brings
the caches of the CPU into the same state before each call:

    warm   all bytes that the call must read and write have just been touched
    cold   the state and the K cache are in DRAM, as after the other layers of a step; kv_score and
           the slots, which the step has just made, and the code, which has just run on a small
           call, are not

Before anything is timed, all contestants must have stored the same state and entries. Where they
project first they differ by how they round: then ours must have stored what a float64 projection
would, and the result tells what share of the codes each of them changes.
"""

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..batches import PER_TOKEN
from ..contract import DS_MLA_DATA_BYTES, HEAD_DIM, INDEXER, ROPE_DIM, Call
from ..ops.cpu import FLOORS
from .cases import Case, make_layers, make_projection, mix
from .contestants import WHOLE, Contestant, contestants, geometry_of, projected
from .machine import last_level_cache
from .result import Cell

LEAST_ROUNDS, MOST_ROUNDS = 3, 500
# Of the codes, by an exact projection; in a short call one that ties may be more.
_MOST_CHANGED, _MOST_TIES = 2e-4, 4
_FLOAT64_ROWS = 512  # at a time
_STORE_NOTHING = (*FLOORS, "plan")
Prepare = Callable[[str], None]  # brings the CPU's caches into a state, before that contestant


def measure(
    cases: list[Case], names: list[str], threads: list[int], kv_dtype: torch.dtype, seconds: float
) -> Iterator[list[Cell]]:
    """Yields the cells of one case after the other, for each number of threads. `seconds` is the
    time for all."""
    each = seconds / len(cases) / len(threads)
    for n in threads:
        # spawn: a forked child would inherit this process's threads and libraries
        with ProcessPoolExecutor(1, get_context("spawn"), _start, (n,)) as process:
            for case in cases:
                yield process.submit(measure_case, case, names, kv_dtype, each).result()


def _start(threads: int) -> None:
    """In the process that measures: vLLM's log would run through the progress bar."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(threads)


def measure_case(case: Case, names: list[str], kv_dtype: torch.dtype, seconds: float) -> list[Cell]:
    """The cells of one case on this process's threads, within `seconds` or LEAST_ROUNDS."""
    end = time.monotonic() + seconds
    calls = make_layers(case, kv_dtype)
    measured = _contestants(case, names, calls)
    changed: dict[str, float] = {}
    if case.hidden:
        changed = codes_changed(case, calls[0], measured)
    else:
        check_equal(calls, measured)
    states = _states(case, names, calls[0], measured, kv_dtype)
    cells: list[Cell] = []
    for i, (cache, prepare) in enumerate(states.items()):
        share = (end - time.monotonic()) / (len(states) - i)
        cells.append(
            {
                "case": case.name,
                "kind": case.kind,
                "tokens": case.tokens,
                "context": case.context,
                "bytes": case.same_bytes(kv_dtype),
                "threads": torch.get_num_threads(),
                "cache": cache,
                "flops": case.flops,
                "codes_changed": changed,
                "nanoseconds": _rounds(measured, prepare, share),
            }
        )
    return cells


def _contestants(case: Case, names: list[str], calls: list[Call]) -> dict[str, Contestant]:
    return projected(names, case, calls[0]) if case.hidden else contestants(names, calls)


def _states(
    case: Case,
    names: list[str],
    call: Call,
    measured: dict[str, Contestant],
    kv_dtype: torch.dtype,
) -> dict[str, Prepare]:
    """How the caches of the CPU become warm, and cold."""
    few = replace(
        mix("short", 8),
        hidden=case.hidden,
        layers=min(case.layers, 2),
        geometry=case.geometry,
    )
    small = _contestants(few, names, make_layers(few, kv_dtype))

    def warm(name: str) -> None:
        measured["floor"]()

    def cold(name: str) -> None:
        _chill(call)
        small[name]()

    return {"warm": warm, "cold": cold}


def _rounds(
    measured: dict[str, Contestant], prepare: Prepare, seconds: float
) -> dict[str, list[int]]:
    end = time.monotonic() + seconds
    times: dict[str, list[int]] = {name: [] for name in measured}
    order = list(measured)
    for count in range(MOST_ROUNDS):
        if count >= LEAST_ROUNDS and time.monotonic() > end:
            break
        random.shuffle(order)
        for name in order:
            prepare(name)
            start = time.perf_counter_ns()
            measured[name]()
            times[name].append(time.perf_counter_ns() - start)
    return times


def _chill(call: Call) -> None:
    _larger_than_the_caches().add_(1)
    for name in PER_TOKEN:  # the step has just made them
        getattr(call, name).sum()


@functools.cache
def _larger_than_the_caches() -> Tensor:
    return torch.zeros(2 * last_level_cache() // 8, dtype=torch.int64)


def check_equal(calls: list[Call], measured: dict[str, Contestant]) -> None:
    """Calls every contestant that stores a result. Raises RuntimeError unless they store the same
    state (but for `readable`) and scales, and values at most one code, or one bfloat16, apart
    (vLLM's fp32 arithmetic differs in the last bit, which shows at a rounding tie)."""
    expected: tuple[str, list[Stored]] | None = None
    for name, contestant in measured.items():
        if name in _STORE_NOTHING:
            continue
        measured["floor"]()  # leaves rows and entries that are nobody's result
        contestant()
        result = [_stored(call) for call in calls]
        if expected is None or expected[0] == "readable":
            expected = name, result
        for ours, theirs in zip(result, expected[1]):
            same_rows = ours.state.equal(theirs.state) or name == "readable"
            close = (ours.codes - theirs.codes).abs().max() <= 1
            close &= torch.allclose(
                ours.rotated, theirs.rotated, rtol=2**-7, atol=1e-5, equal_nan=True
            )
            if not (same_rows and ours.scales.equal(theirs.scales) and close):
                raise RuntimeError(
                    f"{name} and {expected[0]} store different results: not comparable, not "
                    "measured"
                )


def codes_changed(case: Case, call: Call, measured: dict[str, Contestant]) -> dict[str, float]:
    """The shares of the call's fp8 codes that are not those of a projection in float64. Raises
    RuntimeError if ours is more than an exact one can have."""
    x, weight = make_projection(case)
    blocks = torch.split(x, _FLOAT64_ROWS)
    exact = torch.cat([rows.double() @ weight.double().T for rows in blocks])
    ops.compress(*call._replace(kv_score=exact.float()))
    expected = _stored(call).codes
    stored = max(case.entries, 1) * HEAD_DIM
    changed: dict[str, float] = {}
    for name in WHOLE:
        if name in measured:
            measured[name]()
            changed[name] = int((_stored(call).codes != expected).sum()) / stored
    if changed.get("ours", 0) > max(_MOST_CHANGED, _MOST_TIES / stored):
        raise RuntimeError(
            f"our projection changes {changed['ours']:.3%} of the codes: not exact, not measured"
        )
    return changed


class Stored(NamedTuple):
    state: Tensor
    scales: Tensor
    codes: Tensor
    rotated: Tensor  # what is in bfloat16


def _stored(call: Call) -> Stored:
    """Copies of the state's bits, of the K scales, of the K codes in the order of the values they
    stand for, and of the channels beside them."""
    indexer = geometry_of(call) == INDEXER
    pages, per_page = call.k_cache.flatten(1), call.k_cache.shape[1]
    width, beside = (HEAD_DIM, 0) if indexer else (DS_MLA_DATA_BYTES, 2 * ROPE_DIM)
    values, scales = pages[:, : per_page * width], pages[:, per_page * width :].clone()
    codes, rotated = values.unflatten(1, (per_page, width)).split([width - beside, beside], dim=2)
    codes = codes.int()
    codes = torch.where(codes < 128, codes, 128 - codes)
    state = call.inner_state_cache.view(torch.int32).clone()
    return Stored(state, scales, codes, rotated.contiguous().view(torch.bfloat16))
