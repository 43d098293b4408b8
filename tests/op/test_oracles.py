"""The op against two independent implementations: vLLM 0.32's CPU kernels and transformers 5.19's
model."""

from dataclasses import replace

import pytest
import torch

from batches import IMPLS_WHERE_ROWS_ARE_UNIQUE, Batch, assert_close, assert_identical, make_batch
from vllm_dsv4_indexer.contract import HEAD_DIM, WINDOW

REQUESTS = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (0, 3), (62, 41)]


def run_vllm(batch: Batch) -> Batch:
    """Scatter, then pool, as vLLM's DeepseekV4CPUCompressor does after the projection."""
    ops = pytest.importorskip("vllm._custom_ops")
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    kv, score = batch.kv_score.float().chunk(2, dim=-1)
    ops.save_partial_states_cpu(
        kv,
        score,
        batch.ape,
        batch.positions,
        batch.inner_state_cache,
        batch.inner_state_slot_mapping,
    )
    window = batch.positions[:, None] - WINDOW + 1 + torch.arange(WINDOW)
    page = batch.inner_state_cache.shape[1]
    gather = map_local_to_global_slots_cpu(
        window, batch.token_to_req, batch.inner_state_block_table, page
    )
    k_pages, k_page, _ = batch.k_cache.shape
    ops.compress_norm_rope_store_indexer_cpu(
        batch.inner_state_cache,
        gather,
        batch.positions,
        batch.k_slot_mapping,
        batch.norm_weight.float(),
        1e-6,
        batch.cos_sin_cache,
        batch.k_cache.view(k_pages, -1),
        k_page,
        4,
    )
    return batch


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize("layout", ("dense", "padded", "engine"))
@pytest.mark.parametrize("kv_dtype", (torch.float32, torch.bfloat16))
def test_every_byte_is_vllms(impl, layout, kv_dtype):
    """State and scales exactly; of the values at most one in ten thousand is one code apart."""
    different = total = 0
    for seed in range(4):
        batch = make_batch(REQUESTS, layout=layout, kv_dtype=kv_dtype, seed=seed)
        d, n = assert_close(batch.clone().compress(impl), run_vllm(batch.clone()), f"seed {seed}")
        different, total = different + d, total + n
    assert different <= 1e-4 * total


@pytest.mark.parametrize("start", (0, 1, 2, 3, 4, 5, 63, 64, 127, 128))
def test_every_start_stores_vllms_bytes(start):
    batch = make_batch([(start, 128)], seed=start)
    different, _ = assert_close(batch.clone().compress(), run_vllm(batch.clone()))
    assert different <= 1


def fp8_page(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales by the logarithm's definition of the power-of-two scale, not by the op's
    bits."""
    x = entries.bfloat16().float()
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    return (x / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale[:, 0]


@pytest.fixture(scope="module")
def transformers_indexer():
    configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
        DeepseekV4CSACache,
        DeepseekV4Indexer,
    )

    torch.manual_seed(0)
    config = configuration.DeepseekV4Config(
        hidden_size=256, q_lora_rank=16, index_n_heads=1, index_topk=4
    )
    indexer = DeepseekV4Indexer(config)
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(indexer.kv_norm.weight, mean=0.7, std=0.26)

    class Caches:
        layers = [DeepseekV4CSACache(config)]

    return indexer.requires_grad_(False), Caches


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize("chunks", ([131], [1, 2, 30, 4, 7, 87], [5, 126], [1] * 20 + [111]))
def test_entries_are_those_of_the_transformers_indexer(impl, chunks, transformers_indexer):
    """fp32 throughout; its entries are quantised here."""
    indexer, caches = transformers_indexer
    caches.layers[0].reset()
    hidden = torch.randn(sum(chunks), 256, generator=torch.Generator().manual_seed(1))
    batch = make_batch([(0, sum(chunks))], norm_dtype=torch.float32)
    batch.norm_weight.copy_(indexer.kv_norm.weight)
    batch.ape.copy_(indexer.position_bias)
    cos, sin = indexer.rotary_emb(
        hidden, torch.arange(len(batch.cos_sin_cache)), layer_type="compress"
    )
    batch.cos_sin_cache.copy_(torch.cat([cos, sin], dim=-1))
    weight = torch.cat([indexer.kv_proj.weight, indexer.gate_proj.weight])
    for tokens in torch.arange(len(hidden)).split(chunks):
        x = hidden[tokens]
        indexer(x[None], torch.zeros(1, len(x), 16), tokens[None], caches, 0)
        batch.kv_score[tokens] = x @ weight.T
        batch.take(tokens).compress(impl)
    entries = caches.layers[0].compressed_kv["indexer"][0]
    codes, scales = fp8_page(entries)
    stored = torch.tensor([list(entry) for entry in batch.entries()], dtype=torch.uint8)
    assert torch.equal(stored[:, HEAD_DIM:].contiguous().view(torch.float32)[:, 0], scales)
    distance = (stored[:, :HEAD_DIM].int() - codes.int()).abs()
    assert distance.max() <= 1 and distance.count_nonzero() <= 1e-3 * codes.numel()


def test_scatter_first_agrees_with_the_pre_image_rule_when_slots_are_unique():
    """vLLM's order of work on our kernel, bit for bit."""
    batch = make_batch(REQUESTS)
    scattered = batch.clone()
    replace(scattered, k_slot_mapping=torch.full_like(batch.k_slot_mapping, -1)).compress()
    for token in (batch.k_slot_mapping >= 0).nonzero()[:, 0].tolist():
        scattered.take([token]).compress()
    assert_identical(scattered, batch.compress())
