"""The metadata that vLLM has only as Triton kernels, against the plainest loops that say what it
is."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.mla import compressor_utils, indexer
from vllm.v1.attention.ops import metadata

from vllm_dsv4_indexer.engines.vllm_cpu import patches
from vllm_dsv4_indexer.engines.vllm_cpu import worker as workers

RATIO, PAGE, PAD = 4, 64, -1
BATCHES = {
    "one prompt": [(0, 9)],
    "one decode": [(256, 1)],
    "decodes before prefills": [(7, 1), (1023, 1), (0, 300), (5, 8)],
    "chunks that start anywhere": [(start, 13) for start in range(8)],
    "prompts without an entry at the end": [(1023, 1), (0, 300), (0, 4), (0, 3), (0, 2)],
    "prompts without an entry in front": [(1, 1), (0, 3), (0, 2), (0, 5)],
}


@pytest.fixture
def provided():
    with patches.metadata_on_cpu():
        yield


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def batch(request, provided):
    """Requests as (first position, tokens) and what vLLM's builders hand to the kernels for
    them."""
    requests = request.param
    lengths = torch.tensor([tokens for _, tokens in requests])
    query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    seq_lens = torch.tensor([start + tokens for start, tokens in requests], dtype=torch.int32)
    table = (
        torch.randperm(len(requests) * 8, generator=torch.Generator().manual_seed(0))
        .int()
        .view(-1, 8)
        + 1
    )
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
        tokens,
        own_slots,
        query_start_loc,
        seq_lens,
        table,
        PAGE,
        RATIO,
        out=torch.zeros(tokens + 4, dtype=torch.int64),
    )
    expected = []
    for request, (start, count) in enumerate(requests):
        for position in range(start, start + count):
            entry, closes = position // RATIO, position % RATIO == RATIO - 1
            slot = int(table[request, entry // PAGE]) * PAGE + entry % PAGE
            expected.append(slot if closes and own_slots[len(expected)] != PAD else PAD)
    assert mapped.tolist() == expected


def prefill_chunk(batch, rows: slice | None = None):
    """vLLM's chunk of all requests of the batch, made of our metadata."""
    requests, query_start_loc, seq_lens, table = batch
    entries, both = seq_lens // RATIO, (query_start_loc, query_start_loc)
    return indexer.build_prefill_chunk_metadata(
        0, len(requests), *both, seq_lens, entries, entries, table, RATIO, query_slice=rows
    )


def test_a_prefill_token_may_score_the_entries_up_to_its_own(batch):
    requests, query_start_loc, seq_lens, _ = batch
    entries = (seq_lens // RATIO).tolist()
    tokens = int(query_start_loc[-1])
    rows = slice(tokens // 3, tokens)
    chunk = prefill_chunk(batch, rows)
    first = [sum(entries[:r]) for r, (_, count) in enumerate(requests) for _ in range(count)]
    first = [min(entry, sum(entries) - 1) for entry in first]  # for requests without an entry
    scored = [(start + i + 1) // RATIO for start, count in requests for i in range(count)]
    end = [begin + count for begin, count in zip(first, scored)]
    assert chunk.cu_seqlen_ks.tolist() == first[rows]
    assert chunk.cu_seqlen_ke.tolist() == end[rows]
    assert chunk.token_to_seq.tolist() == [r for r, n in enumerate(entries) for _ in range(n)]


def test_a_token_that_may_score_entries_is_found_to_be_of_its_own_request_and_any_token_of_one(
    batch,
):
    """By the look-up in `forward_cpu` of vLLM's indexer."""
    requests, chunk = batch[0], prefill_chunk(batch)
    found = torch.searchsorted(chunk.local_cu_seq_lens, chunk.cu_seqlen_ks, right=True) - 1
    own = torch.tensor([r for r, (_, count) in enumerate(requests) for _ in range(count)])
    scores = chunk.cu_seqlen_ke > chunk.cu_seqlen_ks
    assert found[scores].tolist() == own[scores].tolist()
    assert found.min() >= 0 and found.max() < len(requests)


def test_prefills_without_an_entry_get_an_empty_chunk_of_all_their_tokens(provided):
    """Of a step with one decode, as `forward_cpu` of vLLM's indexer wants it."""
    query_start_loc = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    seq_lens = torch.tensor([2100, 3, 2], dtype=torch.int32)
    entries, both = seq_lens // RATIO, (query_start_loc, query_start_loc)
    table = torch.ones(3, 9, dtype=torch.int32)
    chunk = indexer.build_prefill_chunk_metadata(
        1, 3, *both, seq_lens, entries, entries, table, RATIO, query_slice=slice(0, 5)
    )
    assert (chunk.token_start, chunk.token_end) == (1, 6) and chunk.num_reqs == 2
    assert chunk.local_total_seq_lens == 0


def test_a_token_and_each_of_its_drafts_become_a_request_of_one_token(provided):
    drafted, width = 3, 5
    seq_lens = torch.tensor([7, 300, 0, 2], dtype=torch.int32)  # one is padding
    table = torch.arange(4 * width, dtype=torch.int32).view(4, width)
    lengths, ones = torch.full((2, 13), 99, dtype=torch.int32)
    pages = torch.full((13, width), 99, dtype=torch.int32)
    indexer.PrepareUniformDecodeKernel()(
        seq_lens, lengths, table, pages, ones, 4 * drafted, drafted
    )
    assert lengths.tolist() == [5, 6, 7, 298, 299, 300, 0, 0, 0, 0, 1, 2, 99]
    assert pages[:-1].tolist() == [row for row in table.tolist() for _ in range(drafted)]
    assert ones.tolist() == [1] * 12 + [99] and set(pages[-1].tolist()) == {99}


def test_every_layer_type_has_a_schedule_of_none(provided):
    builder = patches.DeepseekV4CPUSparseSWAMetadataBuilder
    kinds = {"swaonly", "c4a", "c128a", "c1a", "c2a"}
    assert builder.build_tile_scheduler(object.__new__(builder), 3) == dict.fromkeys(kinds)


VLLMS_OWN = [vars(owner)[name] for owner, name, _ in patches.REPLACED]


def vllms_own() -> list[bool]:
    """Of each object that we replace, whether vLLM's own is in its place."""
    replaced = patches.REPLACED
    return [vars(owner)[name] is own for (owner, name, _), own in zip(replaced, VLLMS_OWN)]


@pytest.fixture
def worker(monkeypatch):
    """Our worker, whose step is to say which objects of vLLM's it meets."""
    monkeypatch.setattr(workers.CPUWorker, "execute_model", lambda worker, step: step())
    monkeypatch.setattr(workers.Worker, "_give_account", lambda worker: None)
    made = object.__new__(workers.Worker)
    made.rank = 0
    return made


def test_only_a_step_of_our_own_engine_meets_our_metadata(worker):
    assert all(vllms_own())
    assert not any(worker.execute_model(vllms_own))
    assert all(vllms_own())


def test_vllms_own_objects_are_back_when_a_step_fails(worker):
    def fail():
        raise OSError("no such page")

    with pytest.raises(OSError, match="no such page"):
        worker.execute_model(fail)
    assert all(vllms_own())


def test_vllms_own_objects_are_back_when_one_of_them_cannot_be_replaced(worker, monkeypatch):
    immutable = (int, "real", None)
    replaced = (*patches.REPLACED, immutable)
    monkeypatch.setattr(patches, "REPLACED", replaced)
    with pytest.raises(TypeError, match="immutable type 'int'"):
        worker.execute_model(vllms_own)
    assert all(vllms_own())


def test_what_was_replaced_last_comes_back_first(worker, monkeypatch):
    owner = SimpleNamespace(kernel="vLLM's own")
    replaced = [(owner, "kernel", value) for value in ("ours", "ours, again")]
    monkeypatch.setattr(patches, "REPLACED", replaced)
    assert worker.execute_model(lambda: owner.kernel) == "ours, again"
    assert owner.kernel == "vLLM's own"


def test_the_functions_need_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None; import vllm_dsv4_indexer.engines.vllm_cpu.metadata"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
