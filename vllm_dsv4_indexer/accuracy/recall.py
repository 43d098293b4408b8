"""Indexer recall: of the 512 entries that exact arithmetic selects, the share that the engine
selects, too.

Exact means float64 from the layer's inputs on: projection, compressor, query and score, nothing
quantised. The engine differs by its projection's rounding and by the eight bits of its keys and
queries.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.config import INDEX_HEAD_DIM, INDEX_TOPK
from ..contract import KV_WIDTH, RATIO, WINDOW
from ..ops import reference
from .engines import VllmEngine
from .weights import Indexers

ALL_SELECTED = RATIO * INDEX_TOPK  # tokens up to which a selection cannot be wrong
EVERY = 4  # every so many positions one selection is compared
VOCABULARY = 120_000  # ordinary tokens; the special ones come after
# By layer, pairs of the entries to choose from and the recall.
Recall = dict[int, list[tuple[int, float]]]


def measure(
    settings: dict[str, Any], model: str, length: int, chunk: int, seeds: Iterable[int]
) -> Recall:
    """Starts an engine with these settings in this process, which prefills `chunk` tokens a step,
    and measures its recall in prompts of `length` random tokens.

    Positions with 512 entries or fewer are left out: there all are selected. Raises UserError if
    the weights of `model` cannot be read as numbers.
    """
    indexers = Indexers(model)
    engine = VllmEngine(model, settings, length, chunk)
    by_prompt = [_recall_in_prompt(engine, indexers, random_prompt(length, seed)) for seed in seeds]
    return {
        number: [pair for layers in by_prompt for pair in layers[number]] for number in by_prompt[0]
    }


def _recall_in_prompt(engine: VllmEngine, indexers: Indexers, prompt: list[int]) -> Recall:
    with ExitStack() as stack:
        layers = engine.indexed_layers()
        steps = {
            number: stack.enter_context(_recording(attention))
            for number, attention in layers.items()
        }
        engine.answers([prompt])
    return {
        number: _recall_of_layer(
            _Step(*map(torch.cat, zip(*steps[number], strict=True))),
            indexers[number],
            attention.indexer_rotary_emb.cos_sin_cache.double(),
        )
        for number, attention in layers.items()
    }


def random_prompt(length: int, seed: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(VOCABULARY), k=length)


class _Step(NamedTuple):
    """What went into a layer's indexer in one step, and what it selected.

    positions: [S] the ones to compare. hidden: [T, H] of all tokens. low_rank_query: [S, R].
    selected: [S, 512] entries."""

    positions: Tensor
    hidden: Tensor
    low_rank_query: Tensor
    selected: Tensor


@contextmanager
def _recording(attention: Any) -> Iterator[list[_Step]]:
    """The steps of one layer, in a list that fills as the engine runs."""
    steps: list[_Step] = []
    compute = attention._prepare_and_attn_fn

    def record(hidden: Tensor, low_rank_query: Tensor, *others: Any) -> None:
        compute(hidden, low_rank_query, *others)
        *_, positions, _ = others  # and the output
        seldom = positions % EVERY == EVERY - 1
        selected = attention.topk_indices_buffer[: len(positions)]
        steps.append(
            _Step(positions[seldom], hidden.clone(), low_rank_query[seldom], selected[seldom])
        )

    attention._prepare_and_attn_fn = record
    try:
        yield steps
    finally:
        attention._prepare_and_attn_fn = compute


def _recall_of_layer(
    step: _Step, weights: dict[str, Tensor], cos_sin: Tensor
) -> list[tuple[int, float]]:
    """step: all steps in one."""
    keys = _keys(step.hidden.double(), weights, cos_sin)
    flat = step.low_rank_query.double() @ weights["wq_b.weight"].T
    queries = flat.view(len(flat), -1, INDEX_HEAD_DIM)
    head_weights = step.hidden[step.positions].double() @ weights["weights_proj.weight"].T
    result = []
    for position, query, of_head, chosen in zip(
        step.positions.tolist(), queries, head_weights, step.selected, strict=True
    ):
        entries = (position + 1) // RATIO
        if entries > INDEX_TOPK:
            scores = of_head @ (reference.rope(query, cos_sin[position]) @ keys[:entries].T).relu()
            selected = torch.isin(scores.topk(INDEX_TOPK).indices, chosen)
            result.append((entries, selected.double().mean().item()))
    return result


def _keys(hidden: Tensor, weights: dict[str, Tensor], cos_sin: Tensor) -> Tensor:
    """[E, 128]: the indexer's keys of a whole prompt, before any rounding."""
    tokens = len(hidden) // RATIO * RATIO
    kv, gate = (
        hidden[:tokens] @ weights[f"compressor.{name}.weight"].T for name in ("wkv", "wgate")
    )
    rows = torch.cat([kv, gate + weights["compressor.ape"].repeat(tokens // RATIO, 1)], dim=1)
    before = rows.new_zeros(RATIO, 2 * KV_WIDTH)
    before[:, KV_WIDTH:] = -torch.inf
    windows = torch.cat([before, rows]).unfold(0, WINDOW, RATIO).transpose(1, 2)
    pooled = reference.pool(windows)
    return reference.rope(
        reference.rms_norm(pooled, weights["compressor.norm.weight"], 1e-6), cos_sin[:tokens:RATIO]
    )
