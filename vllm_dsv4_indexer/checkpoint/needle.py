"""A DeepSeek-V4 checkpoint that does one thing: it finds the value that follows a key, by the
indexer alone.

A document (`accuracy/document.py`) is full of pairs: a key token, and its value token in the next
position. A question token, which has no key or value of its own, makes the model say the value of
one pair:

- `QUESTIONS[i]` asks for the pair of key i. To the indexer all keys look nine tenths alike. So
  every other pair of the document is a near miss: a needle whose score falls by a tenth is no
  longer among the 512 that attention sees.
- `DISTANCES[i]` asks for the pair whose entry starts 4 i positions before the question. Then all
  keys are the same to the indexer, and RoPE decides.

How it works: one layer has ratio 4. Each of its entries has at most one pair: the key at the
offsets -1 to 2 of its group of four, the value one later. The gates open for key tokens in the
channels of the key, and for value tokens in those of the value. A key lies in two windows; the
positional bias shuts it out of one. So an entry of the indexer is the code of its key, and an entry
of the attention is the code of its key and its value. The attention among the selected entries is
sharp, and what it finds goes to the head.

Decoys are pairs whose keys are the opposite of all others. A decoy that leaks into a neighbour's
entry erases it. Experts, sliding window and ratio 128 add nothing. With zero weights the four
residual streams ("hyper-connections") stay equal.

Tokens that are not named here are filler.
"""

from typing import Any

import torch

from .config import (
    ATTENTION_HEAD_DIM,
    COMPRESS_ROPE_THETA,
    INDEX_HEAD_DIM,
    OUTPUT_RANK,
    ROPE_DIM,
    make_config,
)
from .weights import Zeros, tensors

LAYERS, HIDDEN = 3, 256  # of compress ratios 0, 4 and 128
# The least that two workers can share: fast.
LEAST = dict(num_attention_heads=2, o_groups=2, index_n_heads=2, moe_intermediate_size=32)
ATTENTION = "layers.1.attn."
INDEXER = f"{ATTENTION}indexer."

VALUES = range(1000, 1000 + OUTPUT_RANK)
FILLERS = range(2000, 3000)
KEYS = range(10_000, 10_000 + 2**14)  # one for each entry of a document of 64K tokens
DECOYS = range(30_000, 30_000 + 2**14)
QUESTIONS = range(50_000, 50_000 + len(KEYS))
DISTANCES = range(70_000, 70_000 + len(KEYS))

ALIKE = 0.9  # the cosine of two keys, to the indexer
CODE = 64  # numbers of a key's code
# Pairs of RoPE channels that YaRN (original length 65536, beta 32) leaves alone: theta^(-i / 32).
PHASES = 15
# Above this significand of an entry's largest magnitude, the exponent of its scale is one more.
CARRY = 1.75

# Channels of the hidden state: what kind of token, which key, which value, what distance.
KEY, DECOY, VALUE, QUESTION, DISTANCE, FILLER = range(6)
ANY_KEY, ANY_QUESTION = [KEY, DECOY], [QUESTION, DISTANCE]
CODES, VALUE_CODES, PHASE_CODES = (
    slice(8, 8 + CODE),
    slice(72, 72 + len(VALUES)),
    slice(200, 200 + 2 * PHASES),
)
# Channels of an entry of the attention: code of the key, then value, at the end the rotated ones,
# which hold a constant.
ENTRY_VALUES, ROTATED = slice(CODE, CODE + len(VALUES)), ATTENTION_HEAD_DIM - ROPE_DIM

# The length of a token's kind, and of its code: with both, RMSNorm changes no token.
LENGTH = (HIDDEN / 2) ** 0.5
# The gate of a key in the channels of keys; the positional bias where a key must stay out.
OPEN, SHUT = 16.0, -48.0
# Of attention: the needle's score is 50 and 70 nats above that of nothing.
KEY_SHARPNESS, DISTANCE_SHARPNESS = 4.0, 8.0
# The weight of the distance in the indexer's score, against the common part of the keys. With one
# pair of channels, 512 entries of 32K tokens are within fp8's error of the needle. With many pairs,
# a rotation that is wrong by a few positions leaves the needle among the top 512.
NEAR_PAIRS, NEARNESS = 2, 3.0
LOGIT = 2.0  # the logit of the value that was found is 22 above all others


def needle_config() -> dict[str, Any]:
    """The contents of config.json."""
    return make_config(LAYERS, HIDDEN) | LEAST


def needle_tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint, by name. `seed` decides the codes of the keys."""
    weights = dict(tensors(config, Zeros()))
    codes = _codes(len(KEYS) + len(DECOYS), seed)
    _set_tokens(weights, codes)
    _set_indexer({name.removeprefix(INDEXER): tensor for name, tensor in weights.items()}, codes)
    _set_attention({name.removeprefix(ATTENTION): tensor for name, tensor in weights.items()})
    return weights


def _codes(count: int, seed: int) -> torch.Tensor:
    """[count, CODE]: random unit vectors. They are orthogonal to the common part of the keys, which
    is equal in every channel."""
    codes = torch.randn(count, CODE, generator=torch.Generator().manual_seed(seed))
    codes -= codes.mean(dim=1, keepdim=True)
    return codes / codes.norm(dim=1, keepdim=True)


def _set_tokens(weights: dict[str, torch.Tensor], codes: torch.Tensor) -> None:
    embedding, head = weights["embed.weight"], weights["head.weight"]
    embedding[:, FILLER] = HIDDEN**0.5
    kinds = {KEY: KEYS, DECOY: DECOYS, VALUE: VALUES, QUESTION: QUESTIONS, DISTANCE: DISTANCES}
    for kind, tokens in kinds.items():
        rows = embedding[tokens.start : tokens.stop]
        rows[:, FILLER], rows[:, kind] = 0, LENGTH
    for tokens, content, code in (
        (KEYS, CODES, codes[: len(KEYS)]),
        (QUESTIONS, CODES, codes[: len(KEYS)]),
        (DECOYS, CODES, codes[len(KEYS) :]),
        (VALUES, VALUE_CODES, torch.eye(len(VALUES))),
        (DISTANCES, PHASE_CODES, _phases(len(DISTANCES))),
    ):
        embedding[tokens.start : tokens.stop, content] = LENGTH * code
    head[VALUES.start : VALUES.stop, VALUE_CODES] = LOGIT * torch.eye(len(VALUES))


def _phases(count: int) -> torch.Tensor:
    """[count, 2 PHASES], of length 1. In each pair of channels RoPE turns a key at position s by s
    units of angle, and a question at t by t. A question for the distance d starts at -d, so it has
    the angle of a key at t - d."""
    frequencies = COMPRESS_ROPE_THETA ** (-2 * torch.arange(PHASES, dtype=torch.float64) / ROPE_DIM)
    angles = -4 * torch.arange(count)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1).float() / PHASES**0.5


def _set_indexer(weights: dict[str, torch.Tensor], codes: torch.Tensor) -> None:
    """An entry is the common part and the code of its key, together of length 1, and a constant in
    the rotated channels, of length 1 too. Only the first head is used."""
    common, own, unit = (ALIKE / CODE) ** 0.5, (1 - ALIKE) ** 0.5 * torch.eye(CODE), 1 / LENGTH
    for half in weights["compressor.wkv.weight"].split(INDEX_HEAD_DIM):
        half[:CODE, KEY], half[:CODE, DECOY] = unit * common, -unit * common
        half[:CODE, CODES] = unit * own
        half[CODE::2, ANY_KEY] = unit * (ROPE_DIM / 2) ** -0.5
    weights["compressor.wgate.weight"][:, ANY_KEY] = unit * OPEN
    _shut_keys_out(weights["compressor.ape"])
    # Half of the entries lie above the carry, so that an error that depends on it shows.
    largest = (common + (1 - ALIKE) ** 0.5 * codes).amax(dim=1) * (INDEX_HEAD_DIM / 2) ** 0.5
    weights["compressor.norm.weight"][:] = CARRY / largest.median()

    query = weights["wq_b.weight"]
    query[:CODE, ANY_QUESTION] = unit * common
    query[:CODE, CODES] = unit * own
    fastest = 2 * NEAR_PAIRS
    query[CODE:, PHASE_CODES][:fastest, :fastest] = (
        unit * NEARNESS * PHASES**0.5 * torch.eye(fastest)
    )
    weights["weights_proj.weight"][0, ANY_QUESTION] = unit


def _set_attention(weights: dict[str, torch.Tensor]) -> None:
    """An entry is the code of the key, the value, and a constant in the rotated channels, each of
    length 1. Only the first head is used, and only for compressed entries: the keys of the sliding
    window are zero."""
    unit = 1 / LENGTH
    for half in weights["compressor.wkv.weight"].split(ATTENTION_HEAD_DIM):
        half[:CODE, CODES] = unit * torch.eye(CODE)
        half[ENTRY_VALUES, VALUE_CODES] = unit * torch.eye(len(VALUES))
        half[ROTATED::2, ANY_KEY] = unit * (ROPE_DIM / 2) ** -0.5
    gate, bias, gamma = (
        weights[f"compressor.{name}"] for name in ("wgate.weight", "ape", "norm.weight")
    )
    gate[:, ANY_KEY] = unit * OPEN
    _shut_keys_out(bias)
    for half in (0, ATTENTION_HEAD_DIM):
        values = slice(half + ENTRY_VALUES.start, half + ENTRY_VALUES.stop)
        gate[values, ANY_KEY], gate[values, VALUE] = 0, unit * OPEN
        bias[:, values] = 0 if half else SHUT  # a value lies in the group of its entry
    gamma[:CODE], gamma[ROTATED:] = KEY_SHARPNESS, DISTANCE_SHARPNESS

    weights["wq_a.weight"].fill_diagonal_(1)
    query = weights["wq_b.weight"]
    query[:CODE, CODES] = torch.eye(CODE)
    query[ROTATED : ROTATED + 2 * PHASES, PHASE_CODES] = torch.eye(2 * PHASES)
    found = (ATTENTION_HEAD_DIM / 3) ** 0.5  # what RMSNorm makes of the value's 1
    weights["wo_a.weight"][: len(VALUES), ENTRY_VALUES] = torch.eye(len(VALUES))
    weights["wo_b.weight"][VALUE_CODES, : len(VALUES)] = LENGTH / found * torch.eye(len(VALUES))


def _shut_keys_out(bias: torch.Tensor) -> None:
    """A key lies in two windows. It stays in the next group's if it is the last of its group, else
    in its own group's. The bias shuts it out of the other."""
    previous, own = bias.chunk(2, dim=1)
    previous[:3] = own[3] = SHUT
