"""A checked engine refuses a step that breaks an invariant, and says where. What it must let pass
is in test_schedules.py and test_shared_prefix.py, whose engines are checked."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from engine import GREEDY, complete, prompt
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.batches import Batch, make_batch
from vllm_dsv4_indexer.contract import (
    GEOMETRIES,
    INDEXER,
    ContractError,
    Extents,
    Geometry,
    Step,
)
from vllm_dsv4_indexer.engines.vllm_cpu.checks import Checks
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor
from vllm_dsv4_indexer.settings import Settings

REQUESTS = [(0, 16), (0, 9)]
MAIN_4, MAIN_128 = (geometry for geometry in GEOMETRIES if geometry != INDEXER)
every_compressor = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def batch_of(geometry=INDEXER, requests=REQUESTS) -> Batch:
    """In caches that have one pool of pages, as vLLM's."""
    page = 8 if geometry == MAIN_128 else 4
    return make_batch(requests, geometry=geometry, page=page, layout="engine")


class Compressor(SimpleNamespace):
    """What a compressor is made of, without a model."""

    forward = OnePassCompressor.forward
    _bind = OnePassCompressor._bind
    _plan = OnePassCompressor._plan
    _captured = OnePassCompressor._captured
    _named = OnePassCompressor._named
    captures = None


def compressor_of(batch: Batch, checks: Checks | None = None, **settings) -> Compressor:
    return Compressor(
        prefix="layers.1.compressor",
        head_dim=batch.geometry.head_dim,
        compress_ratio=batch.geometry.ratio,
        ape=batch.ape,
        _norm_weight_fp32=batch.norm_weight.float(),
        rms_norm_eps=batch.eps,
        state_cache=SimpleNamespace(prefix="state", kv_cache=batch.inner_state_cache),
        k_cache_prefix="keys",
        _static_forward_context={"keys": SimpleNamespace(kv_cache=batch.k_cache)},
        settings=Settings(impl="cpu", **settings),
        checks=checks or Checks(),
        request_ids=lambda: ["chat-7", "chat-8"],
        bound=None,
    )


def run_step(compressor: Compressor, batch: Batch) -> None:
    state = SimpleNamespace(
        slot_mapping=batch.inner_state_slot_mapping,
        block_table=batch.inner_state_block_table,
        token_to_req_indices=batch.token_to_req,
    )
    tokens = len(batch.positions)
    counts = dict(num_decode_tokens=0, num_prefill_tokens=tokens)
    entries = SimpleNamespace(
        slot_mapping=batch.k_slot_mapping,
        block_table=batch.requests.k_block_table,
        **counts if batch.geometry == INDEXER else dict(num_actual_tokens=tokens),
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


@every_compressor
def test_a_step_that_is_refused_names_the_layer_and_vllms_request(geometry):
    batch = batch_of(geometry)
    batch.inner_state_slot_mapping[21] = -1
    said = refusal(batch)
    assert said.startswith("layers.1.compressor: token 21 (request 1, position 5) has no state row")
    assert said.endswith("; request 1 is 'chat-8'")


def test_so_does_one_that_the_plan_refuses():
    batch = batch_of()
    batch.k_slot_mapping[3] = 10**6
    said = refusal(batch)
    assert said.startswith("layers.1.compressor: k_slot_mapping[3] = 1000000 (request 0, ")
    assert said.endswith("; request 0 is 'chat-7'")


@every_compressor
def test_a_value_that_is_not_finite_is_refused_before_its_layer_writes(geometry):
    batch = batch_of(geometry)
    batch.kv_score[20, 7] = torch.nan
    assert "token 20 (request 1, position 4) has nan in channel 7 of its kv" in refusal(batch)


def test_history_is_what_earlier_steps_have_saved():
    batch = batch_of()
    compressor = compressor_of(batch)
    again = batch.take(range(8, 16))  # as behind a hit of eight tokens in the prefix cache
    with pytest.raises(ContractError, match="needs the row of position 4 .* of position -1 "):
        run_step(compressor, again)
    run_step(compressor, batch.take(range(14)))
    run_step(compressor, again)


def checked(checks: Checks, geometry: Geometry, tokens: range, page: int, key: int) -> None:
    """A step of a request whose state begins in that page and whose keys are in page `key`."""
    size = 8 if geometry == MAIN_128 else 4
    positions = torch.arange(tokens.start, tokens.stop)
    step = Step(
        positions,
        torch.zeros(len(positions), dtype=torch.int32),
        page * size + positions,
        torch.arange(page, 40, dtype=torch.int32)[None],
        torch.where((positions + 1) % geometry.ratio == 0, key * 2 + positions // 128, -1),
    )
    entries = SimpleNamespace(num_actual_tokens=len(positions), block_table=torch.tensor([[key]]))
    layer = SimpleNamespace(k_cache=torch.empty(40, 2))
    bound = SimpleNamespace(geometry=geometry, extents=Extents(40, size, 80, 512), layer=layer)
    checks.step(step, entries, bound, all_saved=True)


@every_compressor
@pytest.mark.parametrize("other", GEOMETRIES, ids=str)
def test_rows_in_a_page_that_other_caches_have_got_are_no_more(geometry, other):
    """Those of another ratio, or of keys. The states of one ratio may have the same pages."""
    gone = "needs the row of position 0 .* of position -1 "
    for page, key in ((3, 1), (5, 3)):
        checks = Checks()
        checked(checks, geometry, range(3), page=3, key=2)
        checked(checks, other, range(other.ratio), page, key)
        same = other.ratio == geometry.ratio and page == 3
        with nullcontext() if same else pytest.raises(ContractError, match=gone):
            checked(checks, geometry, range(3, 4), page=3, key=2)


@pytest.mark.parametrize("geometry", (INDEXER, MAIN_128), ids=str)
def test_a_row_of_the_null_page_may_be_left_out_and_no_other(geometry):
    batch = batch_of(geometry, [(0, 20)])
    page = batch.inner_state_cache.shape[1]
    batch.inner_state_block_table[0, 1] = 0
    batch.inner_state_slot_mapping[page : 2 * page] = torch.arange(page)
    run_step(compressor_of(batch, state_save="readable"), batch.clone())
    batch.inner_state_slot_mapping[2 * page + 1] = 1
    with pytest.raises(ContractError, match=rf"token {2 * page + 1} .* has no state row"):
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
    if made.block_size == 8 and len(made.slot_mapping) == 130:  # of the ratio 128
        made.slot_mapping = made.slot_mapping.clone()
        made.slot_mapping[129] = 1  # of the null page
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
    "fault, layer, says",
    [
        (EXCHANGED, "1.attn.indexer.", "token 125 (request 0, position 125) has the state slot "),
        (LOST, "2.attn.", "token 129 (request 0, position 129) has no state row "),
    ],
    ids=["slots exchanged", "a row that is not saved"],
)
def test_an_engine_dies_of_a_fault_with_the_right_words_instead_of_answering(
    checkpoint, fault, layer, says, tmp_path, capsys
):
    printed = last_words(checkpoint, fault, {"check": "on", "capture": str(tmp_path)})
    assert f"layers.{layer}compressor: {says}" in printed, printed
    assert "; request 0 is '1" in printed, printed

    (file,) = tmp_path.iterdir()
    assert cli.main(["replay", str(file)]) == 0  # the op does as it is told
    replayed = capsys.readouterr().out
    assert f"\nwhy: {says}" in replayed and "\nthe same: cpu stores what the " in replayed


def test_an_error_of_a_main_compressor_names_its_layer_and_vllms_request_too(checkpoint):
    printed = last_words(checkpoint, BEYOND, {})
    assert "attn.compressor: inner_state_slot_mapping[125] = 1000000000 (request 0, " in printed
    assert "; request 0 is '1" in printed, printed
