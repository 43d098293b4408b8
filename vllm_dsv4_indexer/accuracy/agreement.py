"""Agreement with itself: the log-probabilities of one prompt under other schedules, in one engine.

The compressor gives the same bits whatever the schedule; the engine's matrix products need not. So what differs is
rounding, and an entry, an expert or a token that was a toss-up.
"""

from typing import NamedTuple

from .engines import VllmEngine
from .recall import random_prompt

WHOLE, PART, BESIDE = 512, 127, 251  # tokens of a step: what is compared with, smaller chunks, chunks of two prompts
DECODED = 8  # one token in so many is decoded too


class Agreement(NamedTuple):
    """schedule: what was different. positions: how many were compared. mean, largest: difference of the
    log-probabilities of a token. same: the share of positions with the same most likely token."""

    schedule: str
    positions: int
    mean: float
    largest: float
    same: float


def agreement(engine: VllmEngine, length: int, seed: int) -> list[Agreement]:
    """A prompt of `length` random tokens in other chunks, beside another, decoded, and from the prefix cache."""
    prompt, other = random_prompt(length, seed), random_prompt(length, seed + 1)
    start, tokens = prompt[: -(length // DECODED)], length // DECODED
    engine.set_chunk(WHOLE)
    whole = engine.prompt_logprobs([prompt])[0]
    decoded = engine.decoded_logprobs(start, tokens)
    again = engine.decoded_logprobs(start, tokens)
    said = [_most_likely(position)[0] for position in decoded]
    prefilled = engine.prompt_logprobs([start + said])[0][-tokens:]
    engine.set_chunk(PART)
    parts = engine.prompt_logprobs([prompt])[0]
    engine.set_chunk(BESIDE, abreast=2)
    beside = engine.prompt_logprobs([other, prompt])[1]
    return [
        _compare(f"in chunks of {PART}, not {WHOLE}", whole, parts),
        _compare(f"in chunks of {BESIDE}, beside another prompt", whole, beside),
        _compare("decoded, not prefilled", prefilled, decoded),
        _compare("decoded after a prefix-cache hit", decoded, again),
    ]


Logprobs = list[dict[int, float]]


def _compare(schedule: str, one: Logprobs, other: Logprobs) -> Agreement:
    """Of the tokens that both positions name."""
    pairs = list(zip(one, other, strict=True))
    differences = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    same = sum(_most_likely(a)[0] == _most_likely(b)[0] for a, b in pairs) / len(pairs)
    return Agreement(schedule, len(pairs), sum(differences) / len(differences), max(differences), same)


def _most_likely(position: dict[int, float]) -> tuple[int, float]:
    return max(position.items(), key=lambda item: item[1])
