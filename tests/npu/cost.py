"""What the three algorithms cost on this NPU: device time of their kernels, from torch_npu's
profiler, for the requests that the cost model (tests/ascend_emulation) counts."""

import csv
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import machine
import torch
import torch_npu

sys.path.insert(0, str(Path(__file__).parents[1] / "op"))

from paged import PAGES, paged_batch

from vllm_dsv4_indexer.contract import Extents
from vllm_dsv4_indexer.ops import ascend

ALGORITHMS = ("overlay_scan", "scatter_pool", "one_pass")
TOKENS = (128, 512, 2048, 8192)
START = 1024  # of the request: what lies before it is in the state
CALLS = 20


def kernel_times(call) -> dict[str, list[float]]:
    """The microseconds of each kernel that `call` launches, CALLS times."""
    profiler = torch_npu.profiler
    for _ in range(3):
        call()
    torch.npu.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        with profiler.profile(
            activities=[profiler.ProfilerActivity.NPU],
            on_trace_ready=profiler.tensorboard_trace_handler(folder),
        ):
            for _ in range(CALLS):
                call()
            torch.npu.synchronize()
        times = defaultdict(list)
        for details in Path(folder).rglob("kernel_details.csv"):
            for row in csv.DictReader(details.open()):
                duration = next(
                    value for column, value in row.items() if column.startswith("Duration")
                )
                times[row["Name"]].append(float(duration))
    if not times:
        raise SystemExit(
            "torch_npu's profiler wrote no kernel_details.csv with a kernel of ours: no cost to "
            "report"
        )
    return times


def main() -> None:
    k_format = "fp8_amax" if machine.product() == "A5" else "int8_hadamard"
    print(
        f"{'tokens':>6}  {'algorithm':<13} {'us a call':>9}  kernels: median us x launches a call"
    )
    for tokens in TOKENS:
        for algorithm in ALGORITHMS:
            request = [(START, tokens)]
            batch = paged_batch(request, PAGES[0], k_format, max_pos=START + tokens).to("npu")
            call = batch.call
            plan = ascend.plan(call.step, Extents.of(call.layer), algorithm=algorithm)
            run = ascend.bind(call.layer, eps=1e-6, k_format=k_format, algorithm=algorithm)
            times = kernel_times(lambda: run(call.kv_score, plan))
            total = sum(map(sum, times.values())) / CALLS
            kernels = ", ".join(
                f"{name} {statistics.median(t):.1f} x {len(t) / CALLS:g}"
                for name, t in times.items()
            )
            print(f"{tokens:>6}  {algorithm:<13} {total:>9.1f}  {kernels}")


if __name__ == "__main__":
    main()
