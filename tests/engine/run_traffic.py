"""Random traffic in one engine of this process: `python run_traffic.py JOB.json RESULT.json`.

JOB: {"options": arguments of LLM, "seed", "questions", "longest": of traffic.py, "visits": how many
clients come}. A tick is a step of the engine.

RESULT: {"answers": [[question, its answer], ...] of the clients that waited, "alone": {question:
answer of the same engine with nothing else to do and nothing cached}, "lost": how many blocks are
not free in the end, "metrics": vLLM's counters}. An answer is that of run_engine.py.
"""

import json
import sys
from collections import deque
from itertools import islice
from pathlib import Path

from run_engine import answer, generate
from traffic import Question, Visit, make_questions, make_visits
from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    questions = make_questions(job["seed"], job["questions"], job["longest"])
    visits = [*islice(make_visits(job["seed"], len(questions)), job["visits"])]
    llm = LLM(**job["options"])
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    answers = serve(llm, questions, visits)
    lost = free - pool.get_num_free_blocks()
    counters = [metric for metric in llm.get_metrics() if isinstance(metric, Counter)]
    result = dict(
        answers=answers,
        alone={asked: alone(llm, questions[asked]) for asked in {number for number, _ in answers}},
        lost=lost,
        metrics={counter.name: counter.value for counter in counters},
    )
    Path(result_file).write_text(json.dumps(result))


def serve(llm: LLM, questions: list[Question], visits: list[Visit]) -> list[tuple[int, dict]]:
    engine, coming, there, answers, step = llm.llm_engine, deque(visits), {}, [], 0
    while coming or engine.has_unfinished_requests():
        while coming and coming[0].comes <= step:
            visit = coming.popleft()
            asked, sampling = questions[visit.question]
            name = str(len(visits) - len(coming))
            engine.add_request(name, {"prompt_token_ids": asked}, SamplingParams(**sampling))
            there[name] = visit
        gone = [name for name, visit in there.items() if visit.leaves == step]
        engine.abort_request(gone)
        there = {name: visit for name, visit in there.items() if name not in gone}
        finished = [output for output in engine.step() if output.finished]
        answers += [(there.pop(one.request_id).question, answer(one)) for one in finished]
        step += 1
    return answers


def alone(llm: LLM, question: Question) -> dict:
    llm.reset_prefix_cache()
    (output,) = generate(llm, [question.prompt], question.sampling)
    return answer(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
