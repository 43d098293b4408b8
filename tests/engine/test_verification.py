"""The engine's own compressor and ours, compared when a model is loaded: what is found, and what is
let through."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from engine import complete
from forked import python
from vllm.models.deepseek_v4.cpu import cpu_compressor
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.platforms import current_platform

from vllm_dsv4_indexer.batches import make_batch
from vllm_dsv4_indexer.contract import FP8_PAGE_ENTRIES, HEAD_DIM, KV_WIDTH, RATIO, ROW_WIDTH
from vllm_dsv4_indexer.engines import verification
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor
from vllm_dsv4_indexer.engines.vllm_cpu.verification import verify
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.settings import Settings

HIDDEN = 256
stock_forward = DeepseekV4CPUCompressor.forward
stock_store = cpu_compressor.compress_norm_rope_store_indexer_cpu


@pytest.fixture
def layer() -> SimpleNamespace:
    """What an attention layer of the engine has for its indexer's compressor, with random weights
    and caches that are not there yet."""
    current_platform.import_kernels()
    weights = make_batch([(0, 1)], norm_dtype=torch.float32)
    compressor = OnePassCompressor.__new__(OnePassCompressor)
    torch.nn.Module.__init__(compressor)
    compressor.prefix, compressor.settings = "layers.1.compressor", Settings(impl="cpu")
    compressor.hidden_size, compressor.head_dim, compressor.rms_norm_eps = HIDDEN, HEAD_DIM, 1e-6
    compressor.compress_ratio, compressor.overlap, compressor.coff = RATIO, True, 2
    compressor.ape, compressor._norm_weight_fp32 = weights.ape, weights.norm_weight
    compressor.fused_wkv_wgate = torch.nn.Linear(HIDDEN, ROW_WIDTH, False, dtype=torch.bfloat16)
    torch.nn.init.normal_(compressor.fused_wkv_wgate.weight, std=HIDDEN**-0.5)
    nothing = torch.tensor([])
    compressor.state_cache = SimpleNamespace(prefix="state", kv_cache=nothing, block_size=RATIO)
    k_cache = SimpleNamespace(kv_cache=nothing)
    compressor.k_cache_prefix, compressor._static_forward_context = "keys", {"keys": k_cache}
    return SimpleNamespace(
        indexer=SimpleNamespace(compressor=compressor, k_cache=k_cache),
        indexer_rotary_emb=SimpleNamespace(cos_sin_cache=weights.cos_sin_cache),
    )


@pytest.mark.parametrize("state_save", ["full", "readable"])
def test_the_engine_that_was_tested_stores_the_same_and_the_layer_is_left_as_it_was(
    layer, state_save
):
    compressor = layer.indexer.compressor
    compressor.settings = Settings(impl="cpu", state_save=state_save)
    before = compressor.settings, compressor.state_cache.kv_cache, layer.indexer.k_cache.kv_cache
    verify([layer, layer])
    after = compressor.settings, compressor.state_cache.kv_cache, layer.indexer.k_cache.kv_cache
    assert all(one is other for one, other in zip(before, after))


def another_epsilon(*arguments) -> None:
    *others, _, cos_sin, keys, page, ratio = arguments
    stock_store(*others, 1e-2, cos_sin, keys, page, ratio)


def a_rotation(*arguments) -> None:
    """By a Hadamard matrix, as vLLM's PR 55459 adds it on GPUs."""
    stock_store(*arguments)
    k_slots, keys, per_page = arguments[3], arguments[7], arguments[8]
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(HEAD_DIM)] for i in range(HEAD_DIM)]
    rotation = torch.tensor(signs) / HEAD_DIM**0.5
    for slot in k_slots[k_slots >= 0].tolist():
        entry = keys[slot // per_page, slot % per_page * HEAD_DIM :][:HEAD_DIM]
        rotated = entry.view(torch.float8_e4m3fn).float() @ rotation
        entry.copy_(rotated.to(torch.float8_e4m3fn).view(torch.uint8))


def another_position(*arguments) -> None:
    state, gathered, positions, *others = arguments
    stock_store(state, gathered, positions + RATIO, *others)


@pytest.mark.parametrize("fault", [another_epsilon, a_rotation, another_position])
def test_other_keys_are_told_with_their_layer_token_position_and_value(layer, fault, monkeypatch):
    monkeypatch.setattr(cpu_compressor, "compress_norm_rope_store_indexer_cpu", fault)
    with pytest.raises(
        UserError,
        match=r"layers\.1\.compressor: at token \d+ \(request \d, position \d+\) of a random "
        r"batch, (code|scale) \d+ is .* by the engine's own compressor and .* by ours.*"
        r'Set dsv4_indexer\.impl to "stock", or leave the option out',
    ):
        verify([layer])


def swapped_halves(compressor, kv_score, *others) -> None:
    stock_forward(compressor, kv_score.roll(KV_WIDTH, dims=1), *others)


def no_bias(compressor, *arguments) -> None:
    ape, compressor.ape = compressor.ape, torch.zeros_like(compressor.ape)
    stock_forward(compressor, *arguments)
    compressor.ape = ape


@pytest.mark.parametrize("fault", [swapped_halves, no_bias])
def test_another_state_is_told_even_if_its_keys_would_be_too(layer, fault, monkeypatch):
    monkeypatch.setattr(DeepseekV4CPUCompressor, "forward", fault)
    with pytest.raises(UserError, match=r"at token 0 \(request 0, position 5\) .* state \d+ is"):
        verify([layer])


def test_a_write_where_no_token_is_is_told(layer, monkeypatch):
    def writes_more(compressor, *arguments) -> None:
        stock_forward(compressor, *arguments)
        compressor.state_cache.kv_cache[0] = 0

    monkeypatch.setattr(DeepseekV4CPUCompressor, "forward", writes_more)
    with pytest.raises(UserError, match="writes where no token of the batch does"):
        verify([layer])


@pytest.mark.parametrize("ties, apart, passes", [(8, 1, True), (9, 1, False), (1, 2, False)])
def test_one_code_in_ten_thousand_may_be_the_neighbour_of_the_engines(ties, apart, passes):
    batches = verification.make_batches()
    assert sum((batch.k_slot_mapping >= 0).sum() for batch in batches) * HEAD_DIM // 10_000 == 8

    def engines(batch) -> None:
        batch.compress("cpu")
        if torch.equal(batch.kv_score, batches[0].kv_score):
            page = batch.codes()[batch.k_slot_mapping.max() // FP8_PAGE_ENTRIES]
            code = page[batch.k_slot_mapping.max() % FP8_PAGE_ENTRIES, :ties]
            code += torch.where((code & 0x7F) >= apart, 256 - apart, apart).to(torch.uint8)

    with contextlib.nullcontext() if passes else pytest.raises(UserError, match=" code 0 is "):
        verification.require_equal(
            "layers.1", batches, engines, lambda batch: batch.compress("cpu")
        )


START = """
from vllm import LLM
from vllm.models.deepseek_v4.cpu import cpu_compressor
from vllm_dsv4_indexer.engines.versions import TESTED, Engine

TESTED["cpu"] = (Engine("0.31.0"),)

def another_epsilon(*arguments):
    store(*arguments[:5], 1.0, *arguments[6:])

if {fault}:
    store = getattr(cpu_compressor, {fault})
    setattr(cpu_compressor, {fault}, another_epsilon)
settings = {{"dsv4_indexer": {{"untested": "verify"}}}}
llm = LLM(additional_config=settings, **{options})
answers = llm.generate([dict(prompt_token_ids=[1, 2, 3, 4, 5])], use_tqdm=False)
print("answered", len(answers))
"""


@pytest.mark.parametrize(
    "fault, layer",
    [
        ("", ""),
        ("compress_norm_rope_store_indexer_cpu", "attn.indexer.compressor"),
        ("compress_norm_rope_store_cpu", "attn.compressor"),
    ],
)
def test_an_engine_of_a_version_that_nobody_has_tested_starts_if_its_keys_are_ours(
    checkpoint, fault, layer
):
    options = complete(checkpoint, dict(max_model_len=512))
    done = python(
        "-c",
        START.format(fault=repr(fault), options=options),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    printed = done.stdout + done.stderr
    if fault:
        assert done.returncode != 0 and "by the engine's own compressor and" in printed, printed
        assert f"{layer}: at token" in printed and "answered" not in printed
    else:
        assert done.returncode == 0 and "answered 1" in printed, printed
        assert "verified: vLLM's own compressors store the same in 3 layers" in printed
