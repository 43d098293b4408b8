"""Counts, in the emulation, what each kernel does, and writes it where `vllm-dsv4-indexer bench
--model ascend` reads it. From the top of the checkout:

    python tests/ascend_emulation/count.py
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_dsv4_indexer.bench.ascend_model import COUNTS
from vllm_dsv4_indexer.contract import (
    HEAD_DIM,
    KV_WIDTH,
    RATIO,
    ROPE_DIM,
    ROW_WIDTH,
    Extents,
    Layer,
    Requests,
)
from vllm_dsv4_indexer.ops import ascend
from vllm_dsv4_indexer.ops.requests import step_of

ALGORITHMS = ("overlay_scan", "scatter_pool", "one_pass")  # a layer of one request of T tokens
PLANS = ("plan", "plan_requests")  # a step of one request of T tokens, told in either way
DECODE = tuple(f"{name}, decode" for name in PLANS)  # a step of T requests of one token
LENGTHS = dict.fromkeys(ALGORITHMS + PLANS, (128, 512, 2048, 8192))
LENGTHS |= dict.fromkeys(DECODE, (16, 128, 512))
CORES = 48
START = 1024  # of a request: what lies before it is in the state
K_PAGE, STATE_PAGE = 128, 8  # vLLM Ascend's block size 128


def one_request(tokens: int) -> tuple[Requests, Extents]:
    """Positions START and on."""
    return _requests(torch.tensor([START]), torch.tensor([tokens]))


def decode(requests: int) -> tuple[Requests, Extents]:
    """One token each, at as many positions in a row: a quarter of them close a window."""
    return _requests(START + torch.arange(requests), torch.ones(requests, dtype=torch.int64))


def _requests(start: torch.Tensor, length: torch.Tensor) -> tuple[Requests, Extents]:
    count, end = len(start), int((start + length).max())
    columns, k_columns = end // STATE_PAGE + 1, end // RATIO // K_PAGE + 1
    table, k_table = (
        1 + torch.arange(count * n, dtype=torch.int32).view(count, n) for n in (columns, k_columns)
    )
    starts = torch.cat([torch.zeros(1), length.cumsum(0)]).int()
    extents = Extents(count * columns + 1, STATE_PAGE, (count * k_columns + 1) * K_PAGE, end)
    return Requests(starts, start.int(), table, k_table), extents


def layer(extents: Extents) -> Layer:
    """In vLLM Ascend's layout for A2 and A3: pages of 128 entries with scales, or of 8 rows."""
    numbers = torch.Generator().manual_seed(0)
    page_bytes = K_PAGE * (HEAD_DIM + 2)
    state = torch.zeros(extents.state_pages, page_bytes // 4)[:, : STATE_PAGE * ROW_WIDTH]
    k_storage = torch.zeros(extents.k_entries // K_PAGE, page_bytes, dtype=torch.int8)
    return Layer(
        torch.randn(RATIO, KV_WIDTH, generator=numbers),
        torch.ones(HEAD_DIM, dtype=torch.bfloat16),
        torch.randn(extents.max_pos, ROPE_DIM, generator=numbers),
        state.unflatten(1, (STATE_PAGE, ROW_WIDTH)),
        k_storage[:, : K_PAGE * HEAD_DIM].unflatten(1, (K_PAGE, HEAD_DIM)),
        k_storage.view(torch.float16)[:, K_PAGE * HEAD_DIM // 2 :],
    )


def count(emulator, name: str, tokens: int) -> list[dict]:
    """Of a name in LENGTHS, for each launch: its cores, what all of them did, and what the one that
    moved most (a plan: that read most scalars) did."""
    if name in ALGORITHMS:
        return count_layer(emulator, name, tokens)
    kernel, *decodes = name.split(", ")
    return count_plan(emulator, kernel, *(decode if decodes else one_request)(tokens), tokens)


def count_layer(emulator, algorithm: str, tokens: int) -> list[dict]:
    requests, extents = one_request(tokens)
    plan = ascend.plan(step_of(requests, tokens, STATE_PAGE, K_PAGE), extents, algorithm=algorithm)
    kv_score = torch.randn(tokens, ROW_WIDTH, generator=torch.Generator().manual_seed(0))
    run = ascend.bind(layer(extents), eps=1e-6, k_format="int8_hadamard", algorithm=algorithm)
    emulator.use(cores=CORES)
    run(kv_score, plan)
    return _launches(emulator, lambda core: core["read_bytes"] + core["write_bytes"])


def count_plan(
    emulator, kernel: str, requests: Requests, extents: Extents, tokens: int
) -> list[dict]:
    emulator.use(cores=CORES)
    if kernel == "plan":
        ascend.plan(step_of(requests, tokens, STATE_PAGE, K_PAGE), extents)
    else:
        ascend.plan_requests(requests, tokens, extents, K_PAGE)
    return _launches(emulator, lambda core: core["scalar_local"] + core["scalar_global"])


def _launches(emulator, work: Callable[[dict], int]) -> list[dict]:
    return [
        {"cores": len(cores), "all": _sum(cores), "busiest": max(cores, key=work)}
        for cores in emulator.counts()
    ]


def _sum(cores: list[dict]) -> dict:
    total = {name: sum(core[name] for core in cores) for name in cores[0] if name != "vector"}
    names = sorted({name for core in cores for name in core["vector"]})
    vector = {
        n: [sum(core["vector"].get(n, (0, 0))[i] for core in cores) for i in (0, 1)] for n in names
    }
    return total | {"vector": vector}


def main() -> None:
    from emulator import Emulator

    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(Path(folder))
        with emulator.installed():
            counts = {
                name: {str(t): count(emulator, name, t) for t in lengths}
                for name, lengths in LENGTHS.items()
            }
    text = json.dumps(counts)
    for part in ("all", "busiest"):
        text = text.replace(f'"{part}": ', f'\n"{part}": ')
    COUNTS.write_text(text + "\n")
    print(f"wrote {COUNTS}")


if __name__ == "__main__":
    main()
