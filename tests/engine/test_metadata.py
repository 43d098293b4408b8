"""The metadata that vLLM has only as Triton kernels, against the plainest loops that say what it is."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.mla import compressor_utils, indexer, sparse_swa
from vllm.v1.attention.ops import metadata

from vllm_dsv4_indexer.engines import vllm_cpu

RATIO, PAGE, PAD = 4, 64, -1
BATCHES = {
    "one prompt": [(0, 9)],
    "one decode": [(256, 1)],
    "decodes before prefills": [(7, 1), (1023, 1), (0, 300), (5, 8)],
    "chunks that start anywhere": [(start, 13) for start in range(8)],
}


@pytest.fixture
def provided():
    vllm_cpu.provide_metadata("a test")
    yield
    vllm_cpu.withdraw_metadata("a test")


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def batch(request, provided):
    """Requests as (first position, tokens) and what vLLM's builders hand to the kernels for them."""
    requests = request.param
    lengths = torch.tensor([tokens for _, tokens in requests])
    query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    seq_lens = torch.tensor([start + tokens for start, tokens in requests], dtype=torch.int32)
    table = torch.randperm(len(requests) * 8, generator=torch.Generator().manual_seed(0)).int().view(-1, 8) + 1
    return requests, query_start_loc, seq_lens, table


def test_each_token_is_mapped_to_its_request_and_padding_to_the_first(batch):
    requests, query_start_loc, _, _ = batch
    tokens, padded = int(query_start_loc[-1]), int(query_start_loc[-1]) + 3
    out = torch.full((padded + 1,), 99, dtype=torch.int32)
    mapped = metadata.compute_token_to_req_indices(query_start_loc, out, tokens, padded)
    expected = [request for request, (_, count) in enumerate(requests) for _ in range(count)]
    assert mapped.tolist() == expected + [0] * 3
    assert out[-1] == 99


def test_the_last_token_of_a_group_gets_the_slot_of_its_entry(batch):
    requests, query_start_loc, seq_lens, table = batch
    tokens = int(query_start_loc[-1])
    own_slots = torch.arange(tokens)
    own_slots[::5] = PAD  # a token without a slot of its own gets none for its entry
    mapped = compressor_utils.get_compressed_slot_mapping(
        tokens, own_slots, query_start_loc, seq_lens, table, PAGE, RATIO, out=torch.zeros(tokens + 4, dtype=torch.int64)
    )
    expected = []
    for request, (start, count) in enumerate(requests):
        for position in range(start, start + count):
            entry, closes = position // RATIO, position % RATIO == RATIO - 1
            slot = int(table[request, entry // PAGE]) * PAGE + entry % PAGE
            expected.append(slot if closes and own_slots[len(expected)] != PAD else PAD)
    assert mapped.tolist() == expected


def test_a_prefill_token_may_score_the_entries_up_to_its_own(batch):
    requests, query_start_loc, seq_lens, table = batch
    entries = seq_lens // RATIO
    tokens = int(query_start_loc[-1])
    rows = slice(tokens // 3, tokens)
    chunk = indexer.build_prefill_chunk_metadata(
        0, len(requests), query_start_loc, query_start_loc, seq_lens, entries, entries, table, RATIO, query_slice=rows
    )
    before = [sum(entries.tolist()[:request]) for request in range(len(requests))]
    first = [before[request] for request, (_, count) in enumerate(requests) for _ in range(count)]
    scored = [(position + 1) // RATIO for start, count in requests for position in range(start, start + count)]
    assert chunk.cu_seqlen_ks.tolist() == first[rows]
    assert chunk.cu_seqlen_ke.tolist() == [begin + count for begin, count in zip(first, scored)][rows]
    assert chunk.token_to_seq.tolist() == [r for r, count in enumerate(entries.tolist()) for _ in range(count)]


def test_a_token_and_each_of_its_drafts_become_a_request_of_one_token(provided):
    drafted, width = 3, 5
    seq_lens = torch.tensor([7, 300, 0, 2], dtype=torch.int32)  # one is padding
    table = torch.arange(4 * width, dtype=torch.int32).view(4, width)
    lengths, ones = torch.full((2, 13), 99, dtype=torch.int32)
    pages = torch.full((13, width), 99, dtype=torch.int32)
    indexer.PrepareUniformDecodeKernel()(seq_lens, lengths, table, pages, ones, 4 * drafted, drafted)
    assert lengths.tolist() == [5, 6, 7, 298, 299, 300, 0, 0, 0, 0, 1, 2, 99]
    assert pages[:-1].tolist() == [row for row in table.tolist() for _ in range(drafted)]
    assert ones.tolist() == [1] * 12 + [99] and set(pages[-1].tolist()) == {99}


def test_every_layer_type_has_a_schedule_of_none(provided):
    builder = vllm_cpu.DeepseekV4CPUSparseSWAMetadataBuilder
    kinds = {"swaonly", "c4a", "c128a", "c1a", "c2a"}
    assert builder.build_tile_scheduler(object.__new__(builder), 3) == dict.fromkeys(kinds)


KERNELS = [
    (metadata, "_token_request_mapping_kernel"),
    (compressor_utils.CompressedSlotMappingKernel, "kernel"),
    (indexer.BuildPrefillChunkMetadataKernel, "kernel"),
    (indexer.PrepareUniformDecodeKernel, "kernel"),
    (sparse_swa.ComputeSWAIndicesAndLensKernel, "kernel"),
    (sparse_swa.ComputePrefillMetadataKernel, "kernel"),
    (vllm_cpu.DeepseekV4CPUSparseSWAMetadataBuilder, "build_tile_scheduler"),
]
VLLMS_OWN = [vars(owner)[name] for owner, name in KERNELS]


def vllms_own() -> list[bool]:
    return [vars(owner)[name] is own for (owner, name), own in zip(KERNELS, VLLMS_OWN)]


def test_vllms_own_objects_are_back_when_a_model_cannot_be_loaded(monkeypatch):
    def fail(worker):
        assert not any(vllms_own())
        raise OSError("no such weights")

    monkeypatch.setattr(vllm_cpu.CPUWorker, "load_model", fail)
    worker = object.__new__(vllm_cpu.Worker)
    worker.vllm_config = SimpleNamespace(additional_config={})
    with pytest.raises(OSError, match="no such weights"):
        worker.load_model()
    assert all(vllms_own())


def test_vllms_own_objects_are_back_when_the_last_engine_of_the_process_is_gone():
    assert all(vllms_own())
    vllm_cpu.provide_metadata("first")
    vllm_cpu.provide_metadata("second")
    assert not any(vllms_own())
    vllm_cpu.withdraw_metadata("first")
    assert not any(vllms_own())
    vllm_cpu.withdraw_metadata("second")
    assert all(vllms_own())
