"""Runs one engine in a process of its own: `python run_engine.py JOB.json RESULT.json`.

JOB: {"options": arguments of LLM, "rounds": [{"prompts": [[token, ...], ...], "sampling": arguments of SamplingParams}],
"caches": whether to save the indexers' caches beside RESULT, as .npz}. RESULT: {"rounds": [[answer, ...], ...],
"preemptions": how many}; an answer has the generated tokens, for each of them the log-probabilities of the most likely
ones, the same for the prompt if asked for, and how many prompt tokens came from the prefix cache.
"""

import json
import sys
from pathlib import Path

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    llm = LLM(**job["options"])
    rounds = [[answer(output) for output in generate(llm, **one)] for one in job["rounds"]]
    preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    if job["caches"]:
        np.savez(Path(result_file).with_suffix(".npz"), **indexer_caches(llm))
    Path(result_file).write_text(json.dumps({"rounds": rounds, "preemptions": preemptions}))


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


def indexer_caches(llm: LLM) -> dict[str, np.ndarray]:
    """State and K cache of every indexer; the worker runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    caches = {}
    for name, module in model.named_modules():
        if name.endswith("indexer"):
            caches[f"{name}.state"] = module.compressor.state_cache.kv_cache.numpy().copy()
            caches[f"{name}.k"] = module.k_cache.kv_cache.numpy().copy()
    return caches


if __name__ == "__main__":
    main(*sys.argv[1:])
