"""How far log-probabilities agree: of one engine under several schedules, and of two engines.

The compressor gives the same bits under every schedule. The engine's matrix products do not. So one
engine differs from itself by rounding, and where rounding decides between two nearly equal entries,
experts or tokens.
"""

from typing import Any, NamedTuple

from .engines import Engine, Logprobs, VllmEngine
from .recall import random_prompt

USUAL = 512  # tokens of a step, with which the other schedules are compared
SIZES = (127, 8192)  # tokens of a step
BESIDE = 251  # tokens of a step of each of two prompts
SINGLE = 8  # one in so many tokens is computed in a step of its own


class Agreement(NamedTuple):
    """schedule: what was compared. positions: how many. mean, largest: the difference between two
    log-probabilities of one token. same: the share of positions with the same most likely token."""

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
    """Starts an engine with these settings in this process and has it compute a prompt of `length`
    random tokens under every schedule."""
    engine = VllmEngine(model, settings, length, chunk=length)
    prompt = random_prompt(length, seed)
    prefilled = _prefill(engine, prompt, beside=random_prompt(length, seed + 1))
    usual, *others = prefilled
    with_itself = [
        compare(f"{name}, not {usual}", prefilled[usual][: len(prefilled[name])], prefilled[name])
        for name in others
    ]
    engine.set_chunk(min(USUAL, length))
    if not engine.llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not empty its prefix cache: a request still holds part of it")
    for schedule in ("decoded, not prefilled", "the same from the prefix cache"):
        with_itself.append(_decoded(schedule, engine, engine, prompt))
    return Observed(prefilled, with_itself)


def _prefill(engine: VllmEngine, prompt: list[int], beside: list[int]) -> dict[str, Logprobs]:
    """By schedule: in chunks of several sizes, beside another prompt, and the first part of the
    prompt token by token."""
    prefilled: dict[str, Logprobs] = {}
    for size in dict.fromkeys(min(size, len(prompt)) for size in (USUAL, *SIZES)):
        engine.set_chunk(size)
        prefilled[f"in chunks of {size}"] = engine.prompt_logprobs([prompt])[0]
    engine.set_chunk(BESIDE, abreast=2)
    _, logprobs = engine.prompt_logprobs([beside, prompt])
    prefilled[f"in chunks of {BESIDE}, beside another prompt"] = logprobs
    engine.set_chunk(1)
    first = prompt[: len(prompt) // SINGLE]
    prefilled["in chunks of 1"] = engine.prompt_logprobs([first])[0]
    return prefilled


def between_engines(observed: list[Observed]) -> dict[str, list[Agreement]]:
    """By title: each engine with itself, and two engines under the same schedules."""
    titles = ("with itself", "the other with itself")
    agreements = {title: one.with_itself for title, one in zip(titles, observed)}
    if len(observed) == 2:
        one, other = (engine.prefilled for engine in observed)
        agreements["with the other"] = [compare(name, one[name], other[name]) for name in one]
    return agreements


def between_servers(one: Engine, other: Engine, length: int, seed: int) -> list[Agreement]:
    """Compares two servers, which choose their chunks themselves."""
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
    """Compares what the decoder says instead of the prompt's end with the prefill of the same
    tokens."""
    tokens = len(prompt) // SINGLE
    start = prompt[:-tokens]
    said, decoded = decoder.decode(start, tokens)
    return compare(schedule, prefiller.prompt_logprobs([start + said])[0][-tokens:], decoded)


def compare(schedule: str, one: Logprobs, other: Logprobs) -> Agreement:
    """Compares, at each position, the tokens that both name."""
    pairs = list(zip(one, other, strict=True))
    differences = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    same = sum(_most_likely(a) == _most_likely(b) for a, b in pairs) / len(pairs)
    return Agreement(
        schedule, len(pairs), sum(differences) / len(differences), max(differences), same
    )


def _most_likely(position: dict[int, float]) -> int:
    return max(position, key=position.__getitem__)
