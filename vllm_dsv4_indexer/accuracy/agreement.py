"""Agreement of log-probabilities: of one engine with itself under other schedules, and of two
engines.

The compressor gives the same bits whatever the schedule; the engine's matrix products need not. So
what differs in one engine is rounding, and an entry, an expert or a token that was a toss-up.
"""

from typing import Any, NamedTuple

from .engines import Engine, Logprobs, VllmEngine
from .recall import random_prompt

USUAL, SIZES = 512, (127, 8192)  # tokens of a step: what is compared with, others
BESIDE = 251  # of each of two prompts
SINGLE = 8  # one token in so many is computed in a step of its own


class Agreement(NamedTuple):
    """schedule: what was compared. positions: how many. mean, largest: difference of the
    log-probabilities of a token. same: the share of positions with the same most likely token."""

    schedule: str
    positions: int
    mean: float
    largest: float
    same: float


class Observed(NamedTuple):
    """prefilled: the log-probabilities of one prompt, by schedule. with_itself: how the engine
    agrees with itself."""

    prefilled: dict[str, Logprobs]
    with_itself: list[Agreement]


def observe(settings: dict[str, Any], model: str, length: int, seed: int) -> Observed:
    """An engine with these settings in this process computes a prompt of `length` random tokens:
    in chunks of several sizes, beside another one, its first eighth token by token, and the last
    one decoded, without the prefix cache and with it."""
    engine = VllmEngine(model, settings, length, chunk=length)
    prompt, other = random_prompt(length, seed), random_prompt(length, seed + 1)
    prefilled: dict[str, Logprobs] = {}
    for size in dict.fromkeys(min(size, length) for size in (USUAL, *SIZES)):
        engine.set_chunk(size)
        prefilled[f"in chunks of {size}"] = engine.prompt_logprobs([prompt])[0]
    engine.set_chunk(BESIDE, abreast=2)
    prefilled[f"in chunks of {BESIDE}, beside another prompt"] = engine.prompt_logprobs(
        [other, prompt]
    )[1]
    engine.set_chunk(1)
    prefilled["in chunks of 1"] = engine.prompt_logprobs([prompt[: length // SINGLE]])[0]
    usual, *others = prefilled
    agreement = [
        compare(f"{name}, not {usual}", prefilled[usual][: len(prefilled[name])], prefilled[name])
        for name in others
    ]
    engine.set_chunk(min(USUAL, length))
    if not engine.llm.reset_prefix_cache():
        raise RuntimeError(
            "vLLM did not empty its prefix cache: a request still holds a part of it"
        )
    agreement.append(_decoded("decoded, not prefilled", engine, engine, prompt))
    agreement.append(_decoded("the same from the prefix cache", engine, engine, prompt))
    return Observed(prefilled, agreement)


def between_engines(observed: list[Observed]) -> dict[str, list[Agreement]]:
    """By title: each engine with itself and, if there are two, under the same schedules with each
    other."""
    titles = ("with itself", "the other with itself")
    agreements = {title: one.with_itself for title, one in zip(titles, observed)}
    if len(observed) == 2:
        one, other = (engine.prefilled for engine in observed)
        agreements["with the other"] = [compare(name, one[name], other[name]) for name in one]
    return agreements


def between_servers(one: Engine, other: Engine, length: int, seed: int) -> list[Agreement]:
    """Their chunks are their own."""
    prompt, beside = random_prompt(length, seed), random_prompt(length, seed + 1)
    alone, batched = (
        compare(name, *(engine.prompt_logprobs(prompts)[-1] for engine in (one, other)))
        for name, prompts in (
            ("prefilled", [prompt]),
            ("prefilled beside another prompt", [beside, prompt]),
        )
    )
    return [
        alone,
        batched,
        _decoded("decoded by the first, prefilled by the second", one, other, prompt),
        _decoded("decoded by the second, prefilled by the first", other, one, prompt),
    ]


def _decoded(schedule: str, decoder: Engine, prefiller: Engine, prompt: list[int]) -> Agreement:
    """The end of the prompt gives way to what the decoder says instead."""
    tokens = len(prompt) // SINGLE
    start = prompt[:-tokens]
    said, decoded = decoder.decode(start, tokens)
    return compare(schedule, prefiller.prompt_logprobs([start + said])[0][-tokens:], decoded)


def compare(schedule: str, one: Logprobs, other: Logprobs) -> Agreement:
    """Of the tokens that both positions name."""
    pairs = list(zip(one, other, strict=True))
    differences = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    same = sum(_most_likely(a) == _most_likely(b) for a, b in pairs) / len(pairs)
    return Agreement(
        schedule, len(pairs), sum(differences) / len(differences), max(differences), same
    )


def _most_likely(position: dict[int, float]) -> int:
    return max(position, key=position.__getitem__)
