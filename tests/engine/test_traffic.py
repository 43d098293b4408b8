"""Random traffic in an engine whose cache is too small for it: who waits is answered as if nobody
else were there.

Other traffic, or one again: TRAFFIC_SEED=7 pytest tests/engine/test_traffic.py. The same for
minutes, on a server that is ill-treated: `make soak`.
"""

import json
import os
from dataclasses import dataclass

import pytest
from engine import CHECKED, SHAPE_TOLERANCE, complete, largest_difference, launch

SEED = int(os.environ.get("TRAFFIC_SEED", "0"))
VISITS = 20
AGAIN = f"again: TRAFFIC_SEED={SEED} pytest tests/engine/test_traffic.py"


@dataclass
class Served:
    answers: list[tuple[int, dict]]  # to questions
    alone: dict[str, dict]
    lost: int
    metrics: dict[str, int]


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory) -> Served:
    """Small steps, so that a client leaves in the middle of its prompt; and vLLM starts what it
    cannot be sure to finish."""
    options = dict(max_model_len=640, max_num_batched_tokens=127)
    options |= dict(max_num_seqs=16, kv_cache_memory_bytes=5 << 20)
    options |= dict(scheduler_reserve_full_isl=False, additional_config=CHECKED)
    job = dict(
        options=complete(checkpoint, options), seed=SEED, questions=10, longest=600, visits=VISITS
    )
    folder = tmp_path_factory.mktemp("traffic")
    launch("run_traffic.py", folder, job, folder / "result", None)
    return Served(**json.loads((folder / "result").read_text()))


def test_every_answer_is_the_one_that_the_question_gets_alone(served):
    for question, answer in served.answers:
        difference = largest_difference(answer, served.alone[str(question)])
        assert difference <= SHAPE_TOLERANCE, f"question {question}; {AGAIN}"


def test_when_all_have_gone_every_block_is_free(served):
    assert served.lost == 0, AGAIN


def test_the_traffic_has_prefix_hits_preemption_and_clients_that_leave(served):
    """Else the tests above would show nothing."""
    assert 0 < len(served.answers) < VISITS, AGAIN
    assert served.metrics["vllm:num_preemptions"] > 0, AGAIN
    assert served.metrics["vllm:prefix_cache_hits"] > 0, AGAIN
