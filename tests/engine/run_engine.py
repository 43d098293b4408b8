"""Runs one engine in a process of its own: `python run_engine.py JOB.json RESULT.json`.

JOB: {"options": arguments of LLM, "rounds": [{"prompts": [[token, ...], ...], "sampling": arguments
of SamplingParams}], "caches", "entries", "projections": whether to save, beside RESULT, as .npz,
the indexers' caches, what each call of the op stored, and what goes into and comes out of the
projections in front of them, "without": functions of engines/vllm_cpu/configuration.py that do
nothing in this process}. RESULT: {"rounds": [[answer, ...], ...], "metrics": vLLM's counters,
"native": whether our native library is in this process}; an answer has the generated tokens, for
each of them the log-probabilities of the most likely ones, the same for the prompt if asked for,
and how many prompt tokens came from the prefix cache.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.v1.metrics.reader import Counter

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import FP8_ENTRY_BYTES, FP8_PAGE_ENTRIES, FP8_SCALE_OFFSET, Plan
from vllm_dsv4_indexer.engines.vllm_cpu import configuration


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    for function in job["without"]:
        setattr(configuration, function, lambda *_: None)
    llm = LLM(**job["options"])
    calls = record_calls() if job["entries"] else []
    projections = record_projections(llm) if job["projections"] else {}
    rounds, entries = [], {}
    for number, one in enumerate(job["rounds"]):
        rounds.append([answer(output) for output in generate(llm, **one)])
        entries |= {f"entries {number} {call}": array for call, array in enumerate(calls)}
        calls.clear()
    metrics = {
        metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)
    }
    arrays = {name: np.concatenate(calls) for name, calls in projections.items()}
    arrays |= indexer_caches(llm) if job["caches"] else {}
    np.savez(Path(result_file).with_suffix(".npz"), **arrays, **entries)
    native = "libdsv4_indexer" in Path("/proc/self/maps").read_text()
    Path(result_file).write_text(
        json.dumps({"rounds": rounds, "metrics": metrics, "native": native})
    )


def generate(llm: LLM, prompts: list[list[int]], sampling: dict) -> list[RequestOutput]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(requests, SamplingParams(**sampling), use_tqdm=False)


def answer(output: RequestOutput) -> dict:
    completion = output.outputs[0]
    return {
        "tokens": completion.token_ids,
        "logprobs": [logprobs(position) for position in completion.logprobs],
        "prompt_logprobs": [logprobs(position) for position in (output.prompt_logprobs or [])[1:]],
        "cached": output.num_cached_tokens,
    }


def logprobs(position: dict) -> dict[int, float]:
    return {token: entry.logprob for token, entry in position.items()}


def record_calls() -> list[np.ndarray]:
    """A list that grows by each call of an indexer's op: the entries [entries, 132] that it stored,
    in the order of its tokens.

    They can be compared between engines that lay out their caches differently; the worker runs in
    this process.
    """
    calls, run = [], ops.BoundLayer.run

    def recording(bound, kv_score, plan) -> None:
        run(bound, kv_score, plan)
        if bound.layer.k_cache.shape[-1] != FP8_ENTRY_BYTES:  # a main compressor's
            return
        slots, pages = Plan.of(plan).k_slots, bound.layer.k_cache.flatten(1)
        slots = slots[slots >= 0]
        page, entry = slots // FP8_PAGE_ENTRIES, slots % FP8_PAGE_ENTRIES
        parts = (pages[:, :FP8_SCALE_OFFSET], pages[:, FP8_SCALE_OFFSET:])
        stored = [part.unflatten(1, (FP8_PAGE_ENTRIES, -1))[page, entry] for part in parts]
        calls.append(torch.cat(stored, dim=1).numpy())

    ops.BoundLayer.run = recording
    return calls


def indexers(llm: LLM) -> dict[str, Any]:
    """The indexers by name; the worker runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {name: module for name, module in model.named_modules() if name.endswith("indexer")}


def indexer_caches(llm: LLM) -> dict[str, np.ndarray]:
    """State and K cache of every indexer."""
    caches = {}
    for name, indexer in indexers(llm).items():
        caches[f"{name}.state"] = indexer.compressor.state_cache.kv_cache.numpy().copy()
        caches[f"{name}.k"] = indexer.k_cache.kv_cache.numpy().copy()
    return caches


def record_projections(llm: LLM) -> dict[str, list[np.ndarray]]:
    """What every indexer's projection takes and gives from now on, call by call, in fp32."""
    calls = defaultdict(list)
    for name, indexer in indexers(llm).items():

        def record(_, arguments, kv_score, name=name):
            calls[f"{name}.x"].append(arguments[0].float().numpy().copy())
            calls[f"{name}.kv_score"].append(kv_score.float().numpy().copy())

        indexer.compressor.fused_wkv_wgate.register_forward_hook(record)
    return calls


if __name__ == "__main__":
    main(*sys.argv[1:])
