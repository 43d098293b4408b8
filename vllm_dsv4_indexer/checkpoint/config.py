"""Sizes and configuration of the checkpoints. What the engine fixes is the real model's. Everything
else is as small as vLLM's CPU kernels allow.
"""

from typing import Any

# Fixed by vLLM's CPU kernels (0.32.0): they refuse any other value.
ATTENTION_HEAD_DIM = 512
ROPE_DIM = 64
INDEX_HEAD_DIM = 128
INDEX_TOPK = 512
EXPERTS = 64  # routing takes 64, 128, 256 or 384
EXPERTS_PER_TOKEN = 6  # or 8
HIDDEN_MULTIPLE = 32  # the block in which the experts' weights are packed

# The real model's (Flash).
VOCABULARY = 129280
SLIDING_WINDOW = 128
STREAMS = 4  # parallel residual streams ("hyper-connections")
HASH_LAYERS = 3
COMPRESS_ROPE_THETA = 160000  # of the layers that compress

# Ours: small, and divisible by two tensor-parallel workers.
HEADS = 8
OUTPUT_GROUPS = 4
OUTPUT_RANK = 128
QUERY_RANK = 256
INDEX_HEADS = 16
EXPERT_WIDTH = 128
# The real model has 16 times more. vLLM sizes its KV cache and ratio-128 index rows by it.
MAX_POSITIONS = 65536


def compress_ratios(layers: int) -> list[int]:
    """The compress ratio of each layer: 0 (sliding window only), then 4 and 128 in turn. So three
    layers have all of them."""
    return [0] + [4 if layer % 2 else 128 for layer in range(1, layers)]


def make_config(layers: int, hidden: int) -> dict[str, Any]:
    """The contents of config.json, in the official keys."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        # Without it, transformers takes the tokenizer for a broken one of Mistral's.
        "transformers_version": "5.19.0",
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
        "compress_rope_theta": COMPRESS_ROPE_THETA,
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
