"""Counts, in the emulation, what each algorithm does for one request of T tokens, and writes it where
`vllm-dsv4-indexer bench --model ascend` reads it. From the top of the checkout:

    python tests/ascend_emulation/count.py
"""

import json
import tempfile
from pathlib import Path

import torch

from vllm_dsv4_indexer.bench.ascend_model import COUNTS
from vllm_dsv4_indexer.contract import HEAD_DIM, KV_WIDTH, RATIO, ROPE_DIM, ROW_WIDTH
from vllm_dsv4_indexer.ops import ascend

ALGORITHMS = ("overlay_scan", "scatter_pool", "one_pass")
LENGTHS = (128, 512, 2048, 8192)
CORES = 48
START = 1024  # of the request: what lies before it is in the state
K_PAGE, STATE_PAGE = 128, 8  # vLLM Ascend's block size 128


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """One request, positions START and on, in vLLM Ascend's layout for A2 and A3: pages of 128 entries and scales."""
    numbers = torch.Generator().manual_seed(0)
    end = START + tokens
    page_bytes = K_PAGE * (HEAD_DIM + 2)
    state_pages, k_pages = end // STATE_PAGE + 1, end // RATIO // K_PAGE + 2
    state = torch.zeros(state_pages, page_bytes // 4)[:, : STATE_PAGE * ROW_WIDTH].unflatten(1, (STATE_PAGE, ROW_WIDTH))
    k_storage = torch.zeros(k_pages, page_bytes, dtype=torch.int8)
    k_cache = k_storage[:, : K_PAGE * HEAD_DIM].unflatten(1, (K_PAGE, HEAD_DIM))
    k_scale = k_storage.view(torch.float16)[:, K_PAGE * HEAD_DIM // 2 :]
    positions = torch.arange(START, end)
    table = torch.arange(1, end // STATE_PAGE + 1, dtype=torch.int32)[None]
    closes = positions % RATIO == RATIO - 1
    return (
        torch.randn(tokens, ROW_WIDTH, generator=numbers), torch.randn(RATIO, KV_WIDTH, generator=numbers),
        torch.ones(HEAD_DIM, dtype=torch.bfloat16), torch.randn(end, ROPE_DIM, generator=numbers),
        positions, torch.zeros(tokens, dtype=torch.int32), positions + STATE_PAGE, table, state,
        torch.where(closes, positions // RATIO + K_PAGE, -1), k_cache, k_scale,
    )  # fmt: skip


def count(emulator, algorithm: str, tokens: int) -> list[dict]:
    """For each launch: its cores, what all of them did, and what the one that moved most did."""
    emulator.use(cores=CORES)
    ascend.compress(*inputs(tokens), eps=1e-6, k_format="int8_hadamard", algorithm=algorithm)
    return [
        {
            "cores": len(cores),
            "all": _sum(cores),
            "busiest": max(cores, key=lambda core: core["read_bytes"] + core["write_bytes"]),
        }
        for cores in emulator.counts()
    ]


def _sum(cores: list[dict]) -> dict:
    total = {name: sum(core[name] for core in cores) for name in cores[0] if name != "vector"}
    names = sorted({name for core in cores for name in core["vector"]})
    vector = {n: [sum(core["vector"].get(n, (0, 0))[i] for core in cores) for i in (0, 1)] for n in names}
    return total | {"vector": vector}


def main() -> None:
    from emulator import Emulator

    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(Path(folder))
        with emulator.installed():
            counts = {a: {str(t): count(emulator, a, t) for t in LENGTHS} for a in ALGORITHMS}
    text = json.dumps(counts).replace('"all": ', '\n"all": ').replace('"busiest": ', '\n"busiest": ')
    COUNTS.write_text(text + "\n")
    print(f"wrote {COUNTS}")


if __name__ == "__main__":
    main()
