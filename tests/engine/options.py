"""What the options of `vllm serve` do with our backend: the lists of docs/options.md.

    python tests/engine/options.py [WORD...]    of those alone that have one of the words in them
    python tests/engine/options.py --together 60 [--seed 0]    some at a time, of those that work

Each option gets an engine in a process of its own, so that a crash is a row as well. It works if
the answers are those without the option.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
from itertools import chain
from pathlib import Path
from typing import NamedTuple

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported

import run_engine
from engine import GREEDY, SHAPE_TOLERANCE, largest_difference, prompt
from pydantic import ValidationError
from vllm import LLM

from vllm_dsv4_indexer import explain

SECONDS = 300  # that an engine may take
OUR_NAME = "--attention-backend dsv4_indexer"  # what our refusals begin with
LONGEST = 150  # characters of a message in the table
# Prompts take more than one step, and one comes again, with most of it in the prefix cache.
BASE = "--max-model-len 4096 --max-num-batched-tokens 512 --kv-cache-memory-bytes 256M"
PROMPTS = [prompt(length, seed=9) for length in (1, 6, 129, 700)]
ROUNDS = [dict(prompts=some, sampling=GREEDY) for some in (PROMPTS, PROMPTS[-1:])]

CACHES = """
--block-size 64
--prefix-match-unit 64
--prefix-match-unit 4
--num-gpu-blocks-override 400
--gpu-memory-utilization 0.5
--kv-cache-memory-bytes 5M
--kv-cache-dtype fp8
--kv-cache-dtype fp8_e4m3
--kv-cache-dtype fp8_e5m2
--kv-cache-dtype fp8_inc
--kv-cache-dtype fp8_ds_mla
--kv-cache-dtype fp8_per_token_head
--kv-cache-dtype bfloat16
--kv-cache-dtype float16
--kv-cache-dtype nvfp4
--kv-cache-dtype nvfp4_ds_mla
--kv-cache-dtype int8_per_token_head
--kv-cache-dtype turboquant_k8v4
--kv-cache-dtype-skip-layers 0
--no-enable-prefix-caching
--prefix-caching-hash-algo sha256_cbor
--prefix-caching-hash-algo xxhash
--prefix-caching-hash-algo xxhash_cbor
--prefix-cache-retention-interval 256
--kv-sharing-fast-prefill
--no-swa-bounded-replay
--disable-sliding-window
--disable-hybrid-kv-cache-manager
--no-disable-hybrid-kv-cache-manager
--kv-offloading-size 1
--kv-transfer-config {"kv_connector":"ExampleConnector","kv_role":"kv_both"}
--kv-events-config {"enable_kv_cache_events":true,"publisher":"null"}
--ec-transfer-config {"ec_connector":"ECExampleConnector","ec_role":"ec_both"}
--kv-cache-metrics
--cpu-offload-gb 1
--offload-backend prefetch --offload-group-size 2
--enable-sleep-mode
--enable-cumem-allocator
--mamba-cache-mode align
--mamba-cache-dtype float32
--mamba-block-size 64
--use-replayssm
--attention-config {"indexer_kv_dtype":"bf16"}
--attention-config {"indexer_kv_dtype":"fp8"}
--attention-config {"indexer_kv_dtype":"mxfp4"}
--attention-config {"indexer_sparse_logits":true}
--attention-config {"sparse_mla_force_mqa":true}
"""
SCHEDULING = """
--max-num-batched-tokens 2048
--max-num-batched-tokens 37 --max-num-seqs 5
--max-num-batched-tokens 1 --max-num-seqs 1
--max-num-scheduled-tokens 301
--max-num-seqs 1
--max-num-active-seqs 2
--long-prefill-token-threshold 101
--long-prefill-token-threshold 101 --long-prefill-token-threshold-adaptive
--no-enable-chunked-prefill
--no-enable-chunked-prefill --max-num-batched-tokens 4096
--scheduling-policy priority
--scheduler-cls vllm.v1.core.sched.scheduler.Scheduler
--scheduler-cls vllm.v1.core.sched.async_scheduler.AsyncScheduler
--no-scheduler-reserve-full-isl
--watermark 0.1
--prefill-schedule-interval 2
--async-scheduling
--stream-interval 4
--disable-cascade-attn
--performance-mode interactivity
--performance-mode throughput
--enable-dbo
--ubatch-size 2
--enable-trace-replay
--enable-return-routed-experts
--aggregate-engine-logging
"""
WEIGHTS = """
--dtype bfloat16
--dtype float16
--dtype float32
--quantization fp8
--quantization bitsandbytes
--load-format fastsafetensors
--load-format runai_streamer
--load-format tensorizer
--safetensors-load-strategy eager
--safetensors-load-strategy prefetch
--safetensors-load-strategy torchao
--model-loader-extra-config {"enable_multithread_load":true}
--model-impl transformers
--hf-overrides {"index_topk":256}
--enable-prompt-embeds
--enable-lora
--weight-transfer-config {"backend":"nccl"}
"""
KERNELS = """
--enforce-eager
--optimization-level 0
--compilation-config {"mode":3}
--compilation-config {"cudagraph_mode":"FULL"}
--moe-backend triton
--moe-backend emulation
--linear-backend torch
--linear-backend triton
--sparse-indexer-topk-backend torch
--sparse-indexer-topk-backend persistent
"""
PARALLELISM = """
--distributed-executor-backend mp
--worker-extension-cls builtins.object
--enable-expert-parallel
--enable-eplb
--enable-ep-weight-filter
--expert-placement-strategy round_robin
--all2all-backend naive
--enable-elastic-ep
--enable-hc-sp
--enable-batch-sharded-sampling
--enable-shm-tensor-arena
--enable-fault-tolerance
--dcp-comm-backend a2a
--numa-bind
--device-ids 0
"""
DRAFTS = """
--spec-method ngram --spec-tokens 3
--speculative-config {"method":"ngram","num_speculative_tokens":1}
--speculative-config {"method":"ngram","num_speculative_tokens":3,"prompt_lookup_min":1}
--speculative-config {"method":"ngram_gpu","num_speculative_tokens":3}
--speculative-config {"method":"suffix","num_speculative_tokens":3}
"""
OPTIONS = {
    "Caches": CACHES,
    "Scheduling": SCHEDULING,
    "Data types and weights": WEIGHTS,
    "Kernels and compilation": KERNELS,
    "Parallelism": PARALLELISM,
    "Speculative decoding": DRAFTS,
}
# Of ours, which options are tried with.
SETTINGS = (
    {"check": "on"},
    {"state_save": "full"},
    {"state_save": "full", "check": "on"},
    {"projection": "engine"},
    {"untested": "verify"},
)
AT_A_TIME = 5
PAGE = Path(__file__).parents[2] / "docs" / "options.md"

WORKS, OURS, VLLMS = "works", "refused by us", "vLLM does not start"


class Outcome(NamedTuple):
    option: str
    what: str
    message: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--together", type=int, metavar="N", help="how many random combinations")
    parser.add_argument("--seed", type=int, default=0, help="of the combinations (default: 0)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        # By another process: what has used torch's threads cannot be forked.
        subprocess.run(["vllm-dsv4-indexer", "make-checkpoint", model], check=True)
        expected = run(model, "")["rounds"]
        for section, options in chosen(asked).items():
            show(section, [tried(model, one, expected) for one in options])


def tried(model: Path, option: str, expected: list[list[dict]]) -> Outcome:
    seen = outcome(option, run(model, option), expected)
    print(*seen, sep=": ", file=sys.stderr, flush=True)
    return seen


def chosen(asked: argparse.Namespace) -> dict[str, list[str]]:
    """The options to try, by section."""
    if asked.together:
        draw = random.Random(asked.seed)
        return {"Together": [together(draw) for _ in range(asked.together)]}
    return {
        section: [
            one
            for one in lines.split("\n")
            if one and (not asked.words or any(word in one for word in asked.words))
        ]
        for section, lines in OPTIONS.items()
    }


def together(draw: random.Random) -> str:
    """Some options that work alone, none of them twice, and a setting of ours."""
    combined, names = [], set()
    works = [line for line in PAGE.read_text().split("\n") if line.startswith("These work:")]
    options = re.findall("`([^`]+)`", "".join(works))
    for option in draw.sample(options, len(options)):
        flags = {word for word in option.split() if word.startswith("--")}
        if len(combined) < AT_A_TIME and not flags & names:
            combined, names = [*combined, option], names | flags
    settings = json.dumps({"dsv4_indexer": draw.choice(SETTINGS)}, separators=(",", ":"))
    return " ".join([*combined, "--additional-config", settings])


def run(model: Path, option: str) -> dict:
    """What `answer` says of an engine with this option."""
    result = model.with_name("result.json")
    result.unlink(missing_ok=True)
    # A fork has vLLM's modules already, whose import takes longer than an engine's start.
    process = multiprocessing.get_context("fork").Process(
        target=answer, args=(model, result, option)
    )
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return {"died": f"no answer after {SECONDS} s"}
    if not result.exists():
        return {"died": f"the process ended with {process.exitcode}"}
    return json.loads(result.read_text())


def outcome(option: str, said: dict, expected: list[list[dict]]) -> Outcome:
    if "refused" in said:
        ours = OUR_NAME in said["refused"]
        return Outcome(option, OURS if ours else VLLMS, said["refused"])
    if "died" in said:
        return Outcome(option, "DIES", said["died"])
    try:
        same = difference(said["rounds"], expected) <= SHAPE_TOLERANCE
    except AssertionError as error:
        return Outcome(option, "ANSWERS OTHERWISE", str(error))
    return Outcome(option, WORKS if same else "ANSWERS OTHERWISE")


def difference(rounds: list[list[dict]], expected: list[list[dict]]) -> float:
    pairs = zip(chain(*rounds), chain(*expected), strict=True)
    return max(largest_difference(one, other) for one, other in pairs)


def show(section: str, outcomes: list[Outcome]) -> None:
    """As Markdown: what works in one line, the others in a table."""
    works = [f"`{one.option}`" for one in outcomes if one.what == WORKS]
    others = [one for one in outcomes if one.what != WORKS]
    print(f"\n## {section}\n\nThese work: {', '.join(works) or 'none'}.", flush=True)
    if others:
        print("\n| option | state | message |\n|---|---|---|")
    for option, what, message in others:
        said = message.removeprefix(f"{OUR_NAME}: ").replace("|", "/")
        said = textwrap.shorten(said, LONGEST, placeholder=" ...", break_on_hyphens=False)
        print(f"| `{option}` | {what} | {said} |", flush=True)


def answer(model: Path, result: Path, option: str) -> None:
    """Starts an engine as `vllm serve` would with this option, asks it, and writes to the file what
    it answered, or why it was refused or died."""
    with model.with_name("log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    engine, said = None, {}
    try:
        arguments = explain.read_flags(str(model), [*BASE.split(), *option.split()])
        engine = LLM.from_engine_args(arguments)
        said["rounds"] = [
            [run_engine.answer(output) for output in run_engine.generate(engine, **one)]
            for one in ROUNDS
        ]
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        said["died" if engine else "refused"] = said_by(error)
    result.write_text(json.dumps(said))


def said_by(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return explain.reason(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    main()
