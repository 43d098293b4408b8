"""The official tensors of DeepSeek-V4, drawn at random.

Names: the official release's, as read by vLLM 0.32.0 (`models/deepseek_v4/cpu/model.py`,
`load_weights`) and transformers 5.19 (`conversion_mapping.py`, "deepseek_v4"). `save_pretrained`
would rename them.
"""

from collections.abc import Iterator
from typing import Any

import torch

from .config import (
    ATTENTION_HEAD_DIM,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    INDEX_HEAD_DIM,
    OUTPUT_RANK,
    QUERY_RANK,
    STREAMS,
    VOCABULARY,
)

# A linear layer of gain g has weights of deviation g / sqrt(inputs): it makes outputs of size g
# from inputs of size 1.

# The real indexer compressor's: deviations 0.0293 and 0.0512 of 4096 inputs. pypto-lib's fixtures
# state these, and the next two, for layers 8 and 32 of Flash.
KV_GAIN, GATE_GAIN = 1.9, 3.3
APE_STD, POOL_GAMMA = 0.153, 0.685
GAMMA_SPREAD = 0.26  # relative
# The norm of the keys, and so the deviation of attention scores: with 1, hundreds of rows would
# average to nothing.
ATTENTION_GAMMA = 2.0
# fp8 keys move the output of attention by 5 %. With 1 that would change every fifth greedy token.
OUTPUT_GAIN = 0.3
# Rounding may pick another expert for a token. That should have a small effect.
SHARED_GAIN, ROUTED_GAIN = 0.5, 0.1
# The deviation of the logits over the vocabulary: 0 is uniform, 4.8 would repeat one token.
LOGIT_GAIN = 3.3


class Draw:
    """Random tensors from one seeded stream. The order in which they are drawn decides their
    values."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).mul_(std).add_(mean)

    def linear(self, outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return self.normal(outputs, inputs, std=gain * inputs**-0.5).bfloat16()

    def gamma(self, width: int, mean: float = 1.0) -> torch.Tensor:
        return self.normal(width, mean=mean, std=GAMMA_SPREAD * mean).bfloat16()

    def experts_of_tokens(self) -> torch.Tensor:
        """int32 [vocabulary, experts per token]: the distinct experts that a hash layer gives each
        token."""
        return self.normal(VOCABULARY, EXPERTS).topk(EXPERTS_PER_TOKEN).indices.int()


class Zeros(Draw):
    """Tensors without an effect: zero weights, and norms that only normalise."""

    def __init__(self) -> None:
        pass

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.zeros(*shape)

    def gamma(self, width: int, mean: float = 1.0) -> torch.Tensor:
        return torch.ones(width).bfloat16()


Tensors = Iterator[tuple[str, torch.Tensor]]


def tensors(config: dict[str, Any], draw: Draw) -> Tensors:
    """The name and value of every tensor of the checkpoint that `config` describes."""
    hidden = config["hidden_size"]
    yield "embed.weight", draw.normal(VOCABULARY, hidden).bfloat16()
    for layer, ratio in enumerate(config["compress_ratios"]):
        prefix = f"layers.{layer}."
        yield from _hyper_connection(draw, f"{prefix}hc_attn_", hidden)
        yield f"{prefix}attn_norm.weight", draw.gamma(hidden)
        yield from _attention(draw, f"{prefix}attn.", config, ratio)
        yield from _hyper_connection(draw, f"{prefix}hc_ffn_", hidden)
        yield f"{prefix}ffn_norm.weight", draw.gamma(hidden)
        yield from _experts(draw, f"{prefix}ffn.", config, hashed=layer < config["num_hash_layers"])
    yield from _mixing(draw, "hc_head_", hidden, outputs=STREAMS, scales=1)
    yield "norm.weight", draw.gamma(hidden)
    yield "head.weight", draw.linear(VOCABULARY, hidden, LOGIT_GAIN)


def _hyper_connection(draw: Draw, prefix: str, hidden: int) -> Tensors:
    """The weights of a block's input and output, one per stream each, and those between streams."""
    return _mixing(draw, prefix, hidden, outputs=STREAMS + STREAMS + STREAMS**2, scales=3)


def _mixing(draw: Draw, prefix: str, hidden: int, outputs: int, scales: int) -> Tensors:
    inputs = STREAMS * hidden
    yield f"{prefix}fn", draw.normal(outputs, inputs, std=inputs**-0.5)
    yield f"{prefix}base", draw.normal(outputs, std=0.5)
    yield f"{prefix}scale", draw.normal(scales, mean=0.5, std=0.1)


def _attention(draw: Draw, prefix: str, config: dict[str, Any], ratio: int) -> Tensors:
    hidden, heads, groups = (
        config[name] for name in ("hidden_size", "num_attention_heads", "o_groups")
    )
    yield f"{prefix}wq_a.weight", draw.linear(QUERY_RANK, hidden)
    yield f"{prefix}q_norm.weight", draw.gamma(QUERY_RANK)
    yield f"{prefix}wq_b.weight", draw.linear(heads * ATTENTION_HEAD_DIM, QUERY_RANK)
    yield f"{prefix}wkv.weight", draw.linear(ATTENTION_HEAD_DIM, hidden)
    yield f"{prefix}kv_norm.weight", draw.gamma(ATTENTION_HEAD_DIM, ATTENTION_GAMMA)
    yield f"{prefix}attn_sink", draw.normal(heads)
    yield (
        f"{prefix}wo_a.weight",
        draw.linear(groups * OUTPUT_RANK, heads // groups * ATTENTION_HEAD_DIM),
    )
    yield f"{prefix}wo_b.weight", draw.linear(hidden, groups * OUTPUT_RANK, OUTPUT_GAIN)
    if ratio:
        yield from _compressor(
            draw, f"{prefix}compressor.", hidden, ratio, ATTENTION_HEAD_DIM, ATTENTION_GAMMA
        )
    if ratio == 4:
        index_heads = config["index_n_heads"]
        yield f"{prefix}indexer.wq_b.weight", draw.linear(index_heads * INDEX_HEAD_DIM, QUERY_RANK)
        yield f"{prefix}indexer.weights_proj.weight", draw.linear(index_heads, hidden)
        yield from _compressor(
            draw, f"{prefix}indexer.compressor.", hidden, ratio, INDEX_HEAD_DIM, POOL_GAMMA
        )


def _compressor(
    draw: Draw, prefix: str, hidden: int, ratio: int, head_dim: int, gamma: float
) -> Tensors:
    # Ratio 4 pools overlapping windows: a token has one half for the next entry, one for its own.
    width = 2 * head_dim if ratio == 4 else head_dim
    yield f"{prefix}wkv.weight", draw.linear(width, hidden, KV_GAIN)
    yield f"{prefix}wgate.weight", draw.linear(width, hidden, GATE_GAIN)
    yield f"{prefix}ape", draw.normal(ratio, width, std=APE_STD)
    yield f"{prefix}norm.weight", draw.gamma(head_dim, gamma)


def _experts(draw: Draw, prefix: str, config: dict[str, Any], hashed: bool) -> Tensors:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield f"{prefix}gate.weight", draw.linear(EXPERTS, hidden)
    if hashed:
        yield f"{prefix}gate.tid2eid", draw.experts_of_tokens()
    else:
        yield f"{prefix}gate.bias", draw.normal(EXPERTS, std=0.1)
    for expert in [*(f"experts.{index}" for index in range(EXPERTS)), "shared_experts"]:
        gain = SHARED_GAIN if expert == "shared_experts" else ROUTED_GAIN
        yield f"{prefix}{expert}.w1.weight", draw.linear(width, hidden)
        yield f"{prefix}{expert}.w3.weight", draw.linear(width, hidden)
        yield f"{prefix}{expert}.w2.weight", draw.linear(hidden, width, gain)
