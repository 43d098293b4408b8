"""Agreement of log-probabilities: of one engine with itself under other schedules, and of two engines.

The compressor gives the same bits whatever the schedule; the engine's matrix products need not. So what differs in one
engine is rounding, and an entry, an expert or a token that was a toss-up.
"""

from typing import NamedTuple

from .engines import Engine, Logprobs, VllmEngine
from .recall import random_prompt

USUAL = 512  # tokens of a step: what other sizes are compared with
SIZES = (1, 127, 8192)
BESIDE = 251  # of each of two prompts
DECODED = 8  # one token in so many is decoded too


class Agreement(NamedTuple):
    """schedule: what was compared. positions: how many. mean, largest: difference of the log-probabilities of a token.
    same: the share of positions with the same most likely token."""

    schedule: str
    positions: int
    mean: float
    largest: float
    same: float


class Observed(NamedTuple):
    """prefilled: the log-probabilities of one prompt, by schedule. agreement: of the engine with itself."""

    prefilled: dict[str, Logprobs]
    agreement: list[Agreement]


def observe(engine: VllmEngine, length: int, seed: int) -> Observed:
    """A prompt of `length` random tokens in chunks of several sizes, beside another one, decoded, and from the prefix
    cache. The engine was made for steps of `length` tokens."""
    prompt, other = random_prompt(length, seed), random_prompt(length, seed + 1)
    prefilled = {}
    for size in (USUAL, *SIZES):
        engine.set_chunk(min(size, length))
        prefilled[f"in chunks of {size}"] = engine.prompt_logprobs([prompt])[0]
    engine.set_chunk(BESIDE, abreast=2)
    prefilled[f"in chunks of {BESIDE}, beside another prompt"] = engine.prompt_logprobs([other, prompt])[1]
    usual, *others = prefilled
    agreement = [compare(f"{name}, not {USUAL}", prefilled[usual], prefilled[name]) for name in others]
    engine.set_chunk(min(USUAL, length))
    engine.llm.reset_prefix_cache()
    for name in ("decoded, not prefilled", "decoded after a prefix-cache hit, not prefilled"):
        agreement.append(_decoded(name, engine, engine, prompt))
    return Observed(prefilled, agreement)


def between(one: Engine, other: Engine, length: int, seed: int) -> list[Agreement]:
    """Of two engines, such as servers, whose chunks are their own."""
    prompt, beside = random_prompt(length, seed), random_prompt(length, seed + 1)
    alone, batched = (
        compare(name, *(engine.prompt_logprobs(prompts)[-1] for engine in (one, other)))
        for name, prompts in (("prefilled", [prompt]), ("prefilled beside another prompt", [beside, prompt]))
    )
    return [
        alone,
        batched,
        _decoded("decoded by the first, prefilled by the second", one, other, prompt),
        _decoded("decoded by the second, prefilled by the first", other, one, prompt),
    ]


def _decoded(schedule: str, decoder: Engine, prefiller: Engine, prompt: list[int]) -> Agreement:
    """The end of the prompt gives way to what the decoder says instead."""
    tokens = len(prompt) // DECODED
    start = prompt[:-tokens]
    said, decoded = decoder.decode(start, tokens)
    return compare(schedule, prefiller.prompt_logprobs([start + said])[0][-tokens:], decoded)


def compare(schedule: str, one: Logprobs, other: Logprobs) -> Agreement:
    """Of the tokens that both positions name."""
    pairs = list(zip(one, other, strict=True))
    differences = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    same = sum(_most_likely(a) == _most_likely(b) for a, b in pairs) / len(pairs)
    return Agreement(schedule, len(pairs), sum(differences) / len(differences), max(differences), same)


def _most_likely(position: dict[int, float]) -> int:
    return max(position, key=position.get)
