"""Schedules: which requests come when, with prefixes that they share.

A request is a dict: `prompt`, `max_tokens`, and `step`, before which it comes. A fork has `of` and
`at` instead: it comes when request number `of` is `at` tokens long, and its prompt stands behind
these.

A schedule is a dict: `name`, `requests`, `budget`, the tokens that a step takes, and `restart`, the
step before which all that runs is preempted and the prefix cache emptied (0: never). Then all of it
begins again at once.
"""

import random

from engine import prompt

BLOCK = 256  # tokens: what requests share is whole blocks
WHOLE, MIXED = 8192, 1009  # all prompts in one step; a prime, so that steps end anywhere
LONGEST = 3 * BLOCK  # of what a random schedule shares
ANSWER = 6  # tokens: at least one entry is of these


def burst(common: int, *tails: int, budget: int = WHOLE) -> dict:
    """Requests that come at once, with `common` tokens in common and `tails` of their own.

    Those with tails of the same length are identical."""
    prefix = prompt(common, seed=5)
    requests = [_request([*prefix, *prompt(tail, seed=6)]) for tail in tails]
    return _schedule(f"burst of {common}, {budget} a step", requests, budget)


def forks() -> dict:
    """Requests that come while another one fills the block that they share, with a token that it
    says."""
    lengths = BLOCK - 3, 2 * BLOCK - 4
    first = [_request(prompt(length, seed=7), max_tokens=9) for length in lengths]
    later = [_fork(of, (of + 1) * BLOCK, tail) for of in (0, 1) for tail in (1, 4, 61)]
    return _schedule("forks", [*first, *later])


def random_schedule(name: str, draw: random.Random, requests: int = 8) -> dict:
    """Arrivals that nobody wrote by hand: some share blocks with an earlier request, which may
    itself share them, and some are forks of one that runs."""
    seed = draw.randint(0, 1 << 20)
    first = prompt(BLOCK * draw.randint(1, 3) - draw.randint(1, 20), seed=seed)
    second = prompt(BLOCK + 1, seed=seed)
    chosen = [_request(first, max_tokens=24), _request(second, max_tokens=8)]
    while len(chosen) < requests:
        number = draw.choice([i for i, one in enumerate(chosen) if "of" not in one])
        tail = draw.choice([0, 1, 2, 3, 4, 5, 60, 130, BLOCK])
        length, answer = len(chosen[number]["prompt"]), chosen[number]["max_tokens"]
        filled = BLOCK * (length // BLOCK + 1)
        if draw.random() < 0.4 and filled < min(length + answer, LONGEST):
            chosen.append(_fork(number, filled, tail))
        elif length >= BLOCK:
            shared = chosen[number]["prompt"][
                : BLOCK * draw.randint(1, min(length, LONGEST) // BLOCK)
            ]
            step = chosen[number]["step"] + draw.choice([0, 0, 1, 4])
            tokens = [*shared, *prompt(tail, seed=len(chosen))]
            chosen.append(_request(tokens, step, draw.randint(1, 12)))
    budget, restart = draw.choice([WHOLE, MIXED, 509, 131]), draw.randint(2, 12)
    return _schedule(name, chosen, budget, restart)


def _schedule(name: str, requests: list[dict], budget: int = WHOLE, restart: int = 0) -> dict:
    return dict(name=name, requests=requests, budget=budget, restart=restart)


def written(requests: list[dict], number: int) -> int:
    """How many tokens of the request nobody had to say first: its prompt, or that of the one it
    forks."""
    one = requests[number]
    return written(requests, one["of"]) if "of" in one else len(one["prompt"])


def due(coming: dict[int, dict], tokens: dict[int, list[int]], step: int) -> dict[int, list[int]]:
    """The prompts of the requests that are to come before this step; tokens: of those that ran."""
    prompts = {}
    for number, one in coming.items():
        if "of" not in one and one["step"] <= step:
            prompts[number] = one["prompt"]
        elif "of" in one and len(tokens.get(one["of"], [])) >= one["at"]:
            prompts[number] = [*tokens[one["of"]][: one["at"]], *one["prompt"]]
    return prompts


def _request(tokens: list[int], step: int = 0, max_tokens: int = ANSWER) -> dict:
    return dict(prompt=tokens, step=step, max_tokens=max_tokens)


def _fork(of: int, at: int, tail: int) -> dict:
    return dict(of=of, at=at, prompt=prompt(tail, seed=8), max_tokens=ANSWER)
