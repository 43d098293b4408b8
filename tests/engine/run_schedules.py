"""Runs schedules in one engine: `python run_schedules.py JOB.json RESULT.pickle`.

JOB: {"options": arguments of LLM, "schedules": as in schedules.py}. Each schedule meets an empty
prefix cache, and the engine core is in this process, so that the steps are the same every time.
Pages that nobody may read are NaN before each step.

RESULT: {"schedules": [[by request, what each worker stored], ...], "alone": [what each worker
stored, ...], "metrics": vLLM's counters}. "alone" has every sequence of tokens that the model took,
computed again with no other request and nothing cached.
"""

import json
import pickle
import sys
from pathlib import Path

from schedules import due
from stored import Stored, forget, poison, take, watch
from vllm import LLM, SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.metrics.reader import Counter


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    llm = LLM(**job["options"])
    llm.collective_rpc(watch)
    schedules = [run(llm, **schedule) for schedule in job["schedules"]]
    counters = [metric for metric in llm.get_metrics() if isinstance(metric, Counter)]
    metrics = {counter.name: counter.value for counter in counters}
    sequences = {tuple(workers[0].tokens) for requests in schedules for workers in requests}
    budget = job["options"]["max_num_batched_tokens"]
    alone = [run(llm, "alone", [request], budget)[0] for request in unlike(sequences)]
    result = dict(schedules=schedules, alone=alone, metrics=metrics)
    Path(result_file).write_bytes(pickle.dumps(result))


def run(
    llm: LLM, name: str, requests: list[dict], budget: int, restart: int = 0
) -> list[list[Stored]]:
    """By request, what each worker stored."""
    print(f"schedule: {name}", flush=True)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens = budget
    llm.reset_prefix_cache()
    llm.collective_rpc(forget)  # a row that was there before could be the right one by chance
    coming, tokens, step = dict(enumerate(requests)), {}, 0
    while coming or engine.has_unfinished_requests():
        if step == restart > 0:
            llm.reset_prefix_cache(reset_running_requests=True)
        for number, prompt in due(coming, tokens, step).items():
            most = coming.pop(number)["max_tokens"]
            sampling = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        llm.collective_rpc(poison, args=(unused(scheduler.kv_cache_manager.block_pool),))
        for output in engine.step():
            (answer,) = output.outputs
            tokens[int(output.request_id)] = [*output.prompt_token_ids, *answer.token_ids]
        step += 1
    workers = [by_number(stored) for stored in llm.collective_rpc(take)]
    return [[stored[number] for stored in workers] for number in range(len(requests))]


def unused(pool: BlockPool) -> list[int]:
    """The null page, and the pages that belong to no request and that no prefix hit can find: what
    they hold is never read."""
    return [0, *(b.block_id for b in pool.blocks if b.ref_cnt == 0 and b.block_hash is None)]


def by_number(stored: dict[str, Stored]) -> dict[int, Stored]:
    """vLLM's names are ours and something random."""
    return {int(name.split("-")[0]): one for name, one in stored.items()}


def unlike(sequences: set[tuple[int, ...]]) -> list[dict]:
    """A request for every sequence that is not the beginning of another one."""
    kept = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if not any(longer[: len(sequence)] == sequence for longer in kept):
            kept.append(sequence)
    return [dict(prompt=list(sequence), step=0, max_tokens=1) for sequence in kept]


if __name__ == "__main__":
    main(*sys.argv[1:])
