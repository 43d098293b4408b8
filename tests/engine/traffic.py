"""Random traffic: what is asked, when, and who does not wait for the answer.

The same seed gives the same traffic. soak.py sends it to a server, run_traffic.py to an engine of
its process.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from engine import GREEDY, prompt

BLOCK = 256  # tokens: what prompts share is whole blocks, so that prefixes hit
SHORT, LONG = (1, 2, 3, 4, 5, 7, 8, 64, 127, 129), (255, 256, 257, 511, 700, 1024)


class Question(NamedTuple):
    prompt: list[int]
    sampling: dict  # arguments of SamplingParams


class Visit(NamedTuple):
    """A client's. Times are in ticks: steps of an engine, or what the sender takes them for."""

    question: int
    comes: int
    leaves: int | None  # it goes away then, in mid-prefill or in mid-answer; None: it waits


def make_questions(seed: int, count: int, longest: int) -> list[Question]:
    """Of 1 token up to the longest; every other one begins as an earlier one does."""
    draw = random.Random(f"questions {seed}")
    made: list[Question] = []
    for number in range(count):
        own = prompt(min(draw.choice(SHORT + LONG + (longest,)), longest), seed=number)
        earlier = draw.choice(made).prompt if made and number % 2 else []
        shared = earlier[: BLOCK * draw.randint(0, len(earlier) // BLOCK)]
        sampling = GREEDY | dict(max_tokens=draw.choice((1, 4, 9, 14)))
        made.append(Question([*shared, *own][:longest], sampling))
    return made


def make_visits(seed: int, questions: int, impatient: float = 0.2) -> Iterator[Visit]:
    """Without end: bursts of clients, and pauses between them."""
    draw, tick = random.Random(f"visits {seed}"), 0
    while True:
        for _ in range(draw.choice((1, 1, 2, 5, 12))):
            leaves = tick + draw.randint(1, 12) if draw.random() < impatient else None
            yield Visit(draw.randrange(questions), tick, leaves)
            tick += draw.choice((0, 0, 0, 1))
        tick += draw.choice((1, 5, 20))
