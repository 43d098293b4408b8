"""Indexer recall: of the 512 entries that exact arithmetic selects, the share that the engine selected.

Exact is float64 from the inputs of the layer on: projection, compressor, query and score, with nothing quantised. What the
engine loses against it is its projection's rounding, the eight bits of its keys, and those of its queries.
"""

import random
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.config import INDEX_HEAD_DIM, INDEX_TOPK
from ..contract import KV_WIDTH, RATIO, WINDOW
from ..ops import reference
from .engines import VllmEngine

EVERY = 64  # every so many positions one selection is compared
VOCABULARY = 120_000  # ordinary tokens; the special ones come after


def recall(engine: VllmEngine, model: str, length: int, seed: int) -> dict[int, list[tuple[int, float]]]:
    """Recall in a prompt of `length` random tokens: by layer, pairs of the entries to choose from and the recall.

    The engine runs in this process. Positions with 512 entries or fewer are left out: there all are selected.
    """
    prompt = random_prompt(length, seed)
    layers = {number: Recorder(attention) for number, attention in engine.indexed_layers().items()}
    engine.answers([prompt])
    return {number: _recall_of_layer(recorder, model, number) for number, recorder in layers.items()}


def random_prompt(length: int, seed: int | str) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(VOCABULARY), k=length)


class Recorder:
    """What goes into the indexer of one layer, and what it selects."""

    def __init__(self, attention: torch.nn.Module):
        self.steps = []
        self.cos_sin = attention.indexer_rotary_emb.cos_sin_cache.double()
        compute = attention._prepare_and_attn_fn

        def record(hidden: Tensor, qr: Tensor, *others) -> None:
            compute(hidden, qr, *others)
            positions = others[-2]
            seldom = positions % EVERY == EVERY - 1
            selected = attention.topk_indices_buffer[: len(positions)]
            self.steps.append((positions[seldom], hidden.clone(), qr[seldom], selected[seldom]))

        attention._prepare_and_attn_fn = record

    def recorded(self) -> tuple[Tensor, ...]:
        """positions [S] of the selections, hidden states of all tokens [T, H], query's low-rank states [S, R],
        selected entries [S, 512]."""
        return tuple(map(torch.cat, zip(*self.steps, strict=True)))


def _recall_of_layer(recorder: Recorder, model: str, layer: int) -> list[tuple[int, float]]:
    weights = _weights(model, f"layers.{layer}.attn.indexer.")
    positions, hidden, qr, selected = recorder.recorded()
    keys = _keys(hidden.double(), weights, recorder.cos_sin)
    queries = (qr.double() @ weights["wq_b.weight"].T).unflatten(1, (-1, INDEX_HEAD_DIM))
    head_weights = hidden[positions].double() @ weights["weights_proj.weight"].T
    result = []
    for position, query, of_head, chosen in zip(positions.tolist(), queries, head_weights, selected, strict=True):
        entries = (position + 1) // RATIO
        if entries > INDEX_TOPK:
            query = reference._rope(query, recorder.cos_sin[position])
            scores = of_head @ (query @ keys[:entries].T).relu()
            result.append((entries, torch.isin(scores.topk(INDEX_TOPK).indices, chosen).double().mean().item()))
    return result


def _keys(hidden: Tensor, weights: dict[str, Tensor], cos_sin: Tensor) -> Tensor:
    """[E, 128]: the indexer's keys of a whole prompt, before any rounding."""
    tokens = len(hidden) // RATIO * RATIO
    kv, gate = (hidden[:tokens] @ weights[f"compressor.{name}.weight"].T for name in ("wkv", "wgate"))
    rows = torch.cat([kv, gate + weights["compressor.ape"].repeat(tokens // RATIO, 1)], dim=1)
    before = rows.new_zeros(RATIO, 2 * KV_WIDTH)
    before[:, KV_WIDTH:] = -torch.inf
    windows = torch.cat([before, rows]).unfold(0, WINDOW, RATIO).transpose(1, 2)
    pooled = reference._pool(windows)
    return reference._rope(reference._rms_norm(pooled, weights["compressor.norm.weight"], 1e-6), cos_sin[:tokens:RATIO])


def _weights(model: str, prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix` in float64, by the rest of their names."""
    weights = {}
    for path in Path(model).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            weights |= {name.removeprefix(prefix): file.get_tensor(name).double() for name in names}
    return weights
