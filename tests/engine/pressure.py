"""A stream of chats through a KV cache that is too small, by what state rows get pages: vLLM's own
scheduler and cache manager, no model. `python tests/engine/pressure.py [BLOCKS...]`
"""

import random
import sys
import tempfile
from collections import deque
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "op")]

from symbolic import MOST_REQUESTS, Case, begin, model_of, request, step_of, symbolic_core

from vllm_dsv4_indexer.settings import Settings

CHATS, SYSTEMS = 60, 6  # which share so many system prompts
STEP = 4096  # tokens
BLOCKS = (800, 1500)


def chats() -> list[dict]:
    """Two come in each step: 1024 tokens of a system prompt, 100 to 700 of their own."""
    draw = random.Random(1)
    systems = [draw.choices(range(900), k=1024) for _ in range(SYSTEMS)]
    return [
        dict(
            prompt=[*draw.choice(systems), *draw.choices(range(900), k=draw.randint(100, 700))],
            step=number // 2,
            max_tokens=draw.randint(8, 40),
        )
        for number in range(CHATS)
    ]


def serve(core, blocks: int) -> list[str]:
    """Steps until all are answered, share of prompt tokens from the cache, requests that run at
    once, and steps that half of the requests wait for their first token."""
    coming = chats()
    schedule = dict(requests=coming, budget=STEP, restart=0, name="chats")
    begin(core, Case(schedule, blocks, MOST_REQUESTS, 0, {}, 0, 1, True), Settings(impl="cpu"))
    core.scheduler.scheduler_reserve_full_isl = True
    queue, came, answered, running, step = deque(enumerate(coming)), {}, {}, [], 0
    while queue or core.scheduler.has_requests():
        while queue and queue[0][1]["step"] <= step:
            number, one = queue.popleft()
            core.add_request(request(core, number, one["prompt"], one))
            came[str(number)] = step
        for output in step_of(core):
            answered.setdefault(output.request_id, step)
        running.append(len(core.scheduler.running))
        step += 1
    cached = sum(model_of(core).starts.values()) / sum(len(one["prompt"]) for one in coming)
    waited = median(answered[name] - came[name] for name in came)
    return [str(step), f"{cached:.1%}", f"{sum(running) / step:.1f}", f"{waited:.0f}"]


def main() -> None:
    print("state_save  blocks  steps  cached  running  waited")
    for way in ("full", "readable"):
        settings = {"dsv4_indexer": {"state_save": way}}
        with (
            tempfile.TemporaryDirectory() as folder,
            symbolic_core(Path(folder), additional_config=settings) as core,
        ):
            for blocks in map(int, sys.argv[1:] or BLOCKS):
                print(f"{way:10}  {blocks:6}  {'  '.join(serve(core, blocks))}", flush=True)


if __name__ == "__main__":
    main()
