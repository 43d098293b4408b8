"""A checked engine refuses a step that breaks an invariant, and says where. What it must let pass
is in test_shared_prefix.py, whose engines are checked."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from engine import GREEDY, complete, prompt
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.bench.batches import Batch, make_batch
from vllm_dsv4_indexer.contract import HEAD_DIM, RATIO, ContractError
from vllm_dsv4_indexer.engines.vllm_cpu.checks import Checks
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor
from vllm_dsv4_indexer.settings import Settings

REQUESTS = [(0, 16), (0, 9)]


class Compressor(SimpleNamespace):
    """What an indexer's compressor is made of, without a model."""

    forward = OnePassCompressor.forward
    _bind = OnePassCompressor._bind
    _plan = OnePassCompressor._plan
    _captured = OnePassCompressor._captured
    _named = OnePassCompressor._named
    captures = None


def compressor_of(batch: Batch, **settings) -> Compressor:
    return Compressor(
        prefix="layers.1.compressor",
        head_dim=HEAD_DIM,
        compress_ratio=RATIO,
        ape=batch.ape,
        _norm_weight_fp32=batch.norm_weight.float(),
        rms_norm_eps=batch.eps,
        state_cache=SimpleNamespace(prefix="state", kv_cache=batch.inner_state_cache),
        k_cache_prefix="keys",
        _static_forward_context={"keys": SimpleNamespace(kv_cache=batch.k_cache)},
        settings=Settings(impl="cpu", **settings),
        checks=Checks(),
        request_ids=lambda: ["chat-7", "chat-8"],
        bound=None,
    )


def run_step(compressor: Compressor, batch: Batch) -> None:
    state = SimpleNamespace(
        slot_mapping=batch.inner_state_slot_mapping,
        block_table=batch.inner_state_block_table,
        token_to_req_indices=batch.token_to_req,
    )
    entries = SimpleNamespace(
        slot_mapping=batch.k_slot_mapping,
        block_table=batch.requests.k_block_table,
        num_decode_tokens=0,
        num_prefill_tokens=len(batch.positions),
    )
    metadata = {"state": state, "keys": entries}
    context = ForwardContext(no_compile_layers={}, attn_metadata=metadata, slot_mapping={})
    rotary = SimpleNamespace(cos_sin_cache=batch.cos_sin_cache)
    with override_forward_context(context):
        compressor.forward(batch.kv_score, batch.positions, rotary)


def refusal(batch: Batch) -> str:
    """Of a step, which then has written nothing."""
    before = batch.clone()
    with pytest.raises(ContractError) as refused:
        run_step(compressor_of(batch), batch)
    assert all(map(torch.equal, batch.storages, before.storages))
    return str(refused.value)


def test_a_step_that_is_refused_names_the_layer_and_vllms_request():
    batch = make_batch(REQUESTS)
    batch.inner_state_slot_mapping[21] = -1
    said = refusal(batch)
    assert said.startswith("layers.1.compressor: token 21 (request 1, position 5) has no state row")
    assert said.endswith("; request 1 is 'chat-8'")


def test_so_does_one_that_the_plan_refuses():
    batch = make_batch(REQUESTS)
    batch.k_slot_mapping[3] = 10**6
    said = refusal(batch)
    assert said.startswith("layers.1.compressor: k_slot_mapping[3] = 1000000 (request 0, ")
    assert said.endswith("; request 0 is 'chat-7'")


def test_a_value_that_is_not_finite_is_refused_before_its_layer_writes():
    batch = make_batch(REQUESTS)
    batch.kv_score[20, 7] = torch.nan
    assert "token 20 (request 1, position 4) has nan in channel 7 of its kv" in refusal(batch)


def test_history_is_what_earlier_steps_have_saved():
    batch = make_batch(REQUESTS)
    compressor = compressor_of(batch)
    again = batch.take(range(8, 16))  # as behind a hit of eight tokens in the prefix cache
    with pytest.raises(ContractError, match="needs the row of position 4 .* of position -1 "):
        run_step(compressor, again)
    run_step(compressor, batch.take(range(14)))
    run_step(compressor, again)


def test_a_row_of_the_null_page_may_be_left_out_and_no_other():
    batch = make_batch([(0, 16)])
    batch.inner_state_block_table[0, 1] = 0
    batch.inner_state_slot_mapping[4:8] = torch.arange(4)
    run_step(compressor_of(batch, state_save="readable"), batch.clone())
    batch.inner_state_slot_mapping[9] = 1
    with pytest.raises(ContractError, match="token 9 .* has no state row"):
        run_step(compressor_of(batch, state_save="readable"), batch)


# ---- in an engine --------------------------------------------------------------------------------

ENGINE = """
from vllm import LLM, SamplingParams
from vllm.models.deepseek_v4.compressor import CompressorMetadataBuilder

build = CompressorMetadataBuilder.build

def exchange_two_slots(self, *arguments, **options):
    made = build(self, *arguments, **options)
    if made.block_size == 4 and len(made.slot_mapping) == 130:
        made.slot_mapping = made.slot_mapping.clone()
        made.slot_mapping[[125, 126]] = made.slot_mapping[[126, 125]]
    return made

def lose_a_row(self, *arguments, **options):
    made = build(self, *arguments, **options)
    if made.block_size == 4 and len(made.slot_mapping) == 130:
        made.slot_mapping = made.slot_mapping.clone()
        made.slot_mapping[125] = 1  # of the null page
    return made

def run_beyond_the_cache(*args, **kwargs):
    made = build(*args, **kwargs)
    if made.block_size == 8 and len(made.slot_mapping) == 130:  # of the ratio 128
        made.slot_mapping = made.slot_mapping.clone()
        made.slot_mapping[125] = 10**9
    return made

{fault}
llm = LLM(**{options})
for prompt in {prompts}:
    (answer,) = llm.generate([dict(prompt_token_ids=prompt)], SamplingParams(**{sampling}))
    print("answered", len(answer.outputs[0].token_ids))
"""


def last_words(checkpoint, fault: str, settings: dict[str, str]) -> str:
    """What an engine prints that answers a first prompt and dies of a fault in a second."""
    options = dict(skip_tokenizer_init=True, max_model_len=1024, max_num_batched_tokens=509)
    options |= dict(additional_config={"dsv4_indexer": settings})
    prompts = [prompt(37), prompt(130)]
    script = ENGINE.format(
        fault=fault, options=complete(checkpoint, options), prompts=prompts, sampling=GREEDY
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    assert done.returncode != 0 and printed.count("answered 8") == 1, printed
    return printed


EXCHANGED = "CompressorMetadataBuilder.build = exchange_two_slots"
LOST = "CompressorMetadataBuilder.build = lose_a_row"
BEYOND = "CompressorMetadataBuilder.build = run_beyond_the_cache"


@pytest.mark.parametrize(
    "fault, says",
    [
        (EXCHANGED, "token 125 (request 0, position 125) has the state slot "),
        (LOST, "token 125 (request 0, position 125) has no state row "),
    ],
    ids=["slots exchanged", "a row that is not saved"],
)
def test_an_engine_dies_of_a_fault_with_the_right_words_instead_of_answering(
    checkpoint, fault, says, tmp_path, capsys
):
    printed = last_words(checkpoint, fault, {"check": "on", "capture": str(tmp_path)})
    assert f"layers.1.attn.indexer.compressor: {says}" in printed, printed
    assert "; request 0 is '1" in printed, printed

    (file,) = tmp_path.iterdir()
    assert cli.main(["replay", str(file)]) == 0  # the op does as it is told
    replayed = capsys.readouterr().out
    assert f"\nwhy: {says}" in replayed and "\nthe same: cpu stores what the " in replayed


def test_an_error_of_a_main_compressor_names_its_layer_and_vllms_request_too(checkpoint):
    printed = last_words(checkpoint, BEYOND, {})
    assert "attn.compressor: inner_state_slot_mapping[125] = 1000000000 (request 0, " in printed
    assert "; request 0 is '1" in printed, printed
