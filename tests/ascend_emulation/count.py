"""Counts, in the emulation, what each kernel does, and writes it where cost_model.py reads it. From
the top of the checkout:

    python tests/ascend_emulation/count.py
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cost_model import ALGORITHMS, COUNTS, MAIN, PLANS
from vllm_dsv4_indexer.batches import Batch, make_batch
from vllm_dsv4_indexer.contract import GEOMETRIES, Extents
from vllm_dsv4_indexer.ops import ascend

LENGTHS = {  # by name, tokens
    name: (16, 128, 512) if "decode" in name else (128, 512, 2048, 8192)
    for name in (*ALGORITHMS, MAIN, *PLANS)
}
CORES = 48
START = 1024  # of a request: what lies before it is in the state
K_PAGE, STATE_PAGE = 128, 8  # vLLM Ascend's block size 128
INT8 = {"k_format": "int8_hadamard", "scale_dtype": torch.float16}
_, MAIN_4, _ = GEOMETRIES
BF16 = {"geometry": MAIN_4, "k_format": "bf16"}


def one_request(tokens: int) -> list[tuple[int, int]]:
    return [(START, tokens)]


def decode(tokens: int) -> list[tuple[int, int]]:
    """As many requests, at as many positions in a row: a quarter of them close a window. The
    benchmark's have random positions, and so a random number of windows."""
    return [(START + i, 1) for i in range(tokens)]


def make(requests: list[tuple[int, int]], options: dict = INT8) -> Batch:
    """In vLLM Ascend's layout for A2 and A3: pages of 128 entries, or of 8 rows."""
    return make_batch(
        requests,
        page=STATE_PAGE,
        k_page=K_PAGE,
        layout="ascend",
        **options,
        max_pos=max(start + length for start, length in requests),
    )


def count(emulator, name: str, tokens: int) -> list[dict]:
    """Of a name in LENGTHS, for each launch: its cores, what all of them did, and what the one that
    moved most (a plan: that read most scalars) did."""
    if name in ALGORITHMS:
        return count_layer(emulator, name, make(one_request(tokens)))
    if name == MAIN:
        return count_layer(emulator, "one_pass", make(one_request(tokens), BF16))
    requests = decode(tokens) if "decode" in name else one_request(tokens)
    return count_plan(emulator, name.removesuffix(", decode"), make(requests))


def count_layer(emulator, algorithm: str, batch: Batch) -> list[dict]:
    layer = batch.call.layer
    plan = ascend.plan(batch.call.step, Extents.of(layer), algorithm=algorithm)
    run = ascend.bind(layer, eps=1e-6, k_format=batch.k_format, algorithm=algorithm)
    emulator.use(cores=CORES)
    run(batch.kv_score, plan)
    return _launches(emulator, lambda core: core["read_bytes"] + core["write_bytes"])


def count_plan(emulator, kernel: str, batch: Batch) -> list[dict]:
    extents = Extents.of(batch.call.layer)
    emulator.use(cores=CORES)
    if kernel == "plan":
        ascend.plan(batch.call.step, extents)
    else:
        ascend.plan_requests(batch.requests, len(batch.positions), extents, K_PAGE)
    return _launches(emulator, lambda core: core["scalar_local"] + core["scalar_global"])


def _launches(emulator, work: Callable[[dict], int]) -> list[dict]:
    return [
        {"cores": len(cores), "all": _sum(cores), "busiest": max(cores, key=work)}
        for cores in emulator.counts()
    ]


def _sum(cores: list[dict]) -> dict:
    return {
        name: _sum_by_name([core[name] for core in cores])
        if isinstance(cores[0][name], dict)
        else sum(core[name] for core in cores)
        for name in cores[0]
    }


def _sum_by_name(vectors: list[dict]) -> dict:
    names = sorted({name for vector in vectors for name in vector})
    return {n: [sum(x) for x in zip(*(v[n] for v in vectors if n in v))] for n in names}


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
