"""The demo checkpoint in transformers: it loads as it is, and its outputs say something about its
inputs."""

import math

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV4ForCausalLM

from vllm_dsv4_indexer.checkpoint.config import VOCABULARY

PROMPT = torch.arange(1000, 1064)[None] * 7


def load(directory):
    return DeepseekV4ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)[0].eval()


@torch.no_grad()
def logprobs(model, tokens, keep):
    return model(tokens, use_cache=False, logits_to_keep=keep).logits[0].log_softmax(-1)


@pytest.mark.parametrize("directory", ["small", "checkpoint", "needle"])
def test_loads_with_no_missing_or_unexpected_key(directory, request):
    _, info = load(request.getfixturevalue(directory))
    assert not any(info.values()), info


def test_tokenizer_is_the_real_one(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.decode(tokenizer.encode("Hello, 世界!")) == "Hello, 世界!"
    assert tokenizer.convert_tokens_to_ids("<｜end▁of▁sentence｜>") == 1


def test_logits_are_finite_and_far_from_uniform(model):
    result = logprobs(model, PROMPT, 64)
    assert result.isfinite().all()
    entropy = -(result.exp() * result).sum(-1)
    assert entropy.mean() < 0.7 * math.log(VOCABULARY)
    assert result.argmax(-1).unique().numel() > 48  # no favourite token


@pytest.mark.parametrize("layer", [1, 3])
def test_short_prompts_depend_on_the_compressed_entries_of_ratio_4(model, layer, monkeypatch):
    before = logprobs(model, PROMPT, 1)
    norm = model.model.layers[layer].self_attn.compressor.kv_norm.weight
    monkeypatch.setattr(norm, "data", torch.zeros_like(norm))
    assert (logprobs(model, PROMPT, 1) - before).abs().max() > 1


def test_prompts_past_the_top_k_depend_on_the_indexer(model, monkeypatch):
    tokens = torch.randint(VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    indexer = model.model.layers[1].self_attn.compressor.indexer
    monkeypatch.setattr(
        indexer, "index_topk", 16
    )  # of 64 entries: the real 512 would take a prompt of 2K tokens
    before = logprobs(model, tokens, 8)
    monkeypatch.setattr(indexer.kv_norm.weight, "data", -indexer.kv_norm.weight)
    assert (logprobs(model, tokens, 8) - before).abs().max() > 1
