"""What vllm-ascend does from 0.27 on, and did not before."""

import family
import pytest

if family.FIRST:
    pytest.skip("vllm-ascend does none of this before 0.27", allow_module_level=True)

import torch
from check_layer import assert_stores_the_reference, two_decodes
from layer import Layer, forward_call, make_attention
from schedule import Schedule
from vllm_ascend import utils
from vllm_ascend.models.deepseek_v4.compressor import AscendCompressorMetadata
from vllm_ascend.models.deepseek_v4.indexer import AscendIndexerMetadata

from vllm_dsv4_indexer.engines.vllm_ascend import family2, loading


class WhenWaitedFor:
    """The stream that makes what the builders leave to it: in its order, and no sooner than it is
    waited for."""

    def __init__(self, builders):
        tasks = [task for builder in builders for task in builder.take_device_metadata_tasks()]
        self.tasks = sorted(tasks, key=lambda task: task.stage)

    def wait(self, stage, group_id) -> None:
        while any((task.stage, task.group_id) == (stage, group_id) for task in self.tasks):
            self.tasks.pop(0).run()


@pytest.mark.parametrize("full_graphs", [False, True], ids=["eager", "full_graphs"])
@pytest.mark.parametrize("path", ["one_stream", "two_streams", "context_parallel"])
def test_a_step_waits_for_what_another_stream_makes_of_its_metadata(
    config, path, full_graphs, monkeypatch
):
    if path == "context_parallel":
        monkeypatch.setattr(utils, "enable_dsa_cp", lambda: True)
    layer = Layer(config, multistream=path == "two_streams")
    for builder in layer.builders:
        builder.enable_device_metadata()
        if full_graphs:  # which make the stock compressor's slots themselves
            builder.compressor_metadata_buffers = None
    run = layer.run_context_parallel if path == "context_parallel" else layer.run

    def step(rows, x) -> None:
        metadata = layer.metadata(rows)
        run(x, metadata, WhenWaitedFor(layer.builders))

    assert_stores_the_reference(layer, Schedule(0, layer.page, layer.k_page), step)


def metadata_of_indexer(metadata: list) -> AscendIndexerMetadata:
    state, keys = metadata[2:4]
    return AscendIndexerMetadata(AscendCompressorMetadata(cache=keys, state=state))


def test_the_keys_alone_are_the_same_as_with_a_query(config):
    with_query, alone = Layer(config, seed=3), Layer(config, seed=3)
    x, metadata = two_decodes(with_query)
    with_query.run(x, metadata)
    of_indexer = metadata_of_indexer(metadata)
    with forward_call(metadata, len(x)):
        alone.module.indexer.update_cache(x, alone.kv_cache, of_indexer)
    assert all(map(torch.equal, with_query.storages, alone.storages))


def test_an_indexer_that_is_not_to_write_writes_nothing(config):
    """As under prefill context parallelism, which writes the keys of all ranks before."""
    layer = Layer(config)
    x, metadata = two_decodes(layer)
    before = [storage.clone() for storage in layer.storages]
    of_indexer = metadata_of_indexer(metadata)
    cos, sin = (torch.zeros(len(x), 1, 1, 64) for _ in range(2))
    qr = torch.zeros(len(x), layer.module.indexer.q_lora_rank, dtype=x.dtype)
    with forward_call(metadata, len(x)):
        layer.module.indexer._indexer_qkv_prepare(
            x, qr, layer.kv_cache, of_indexer, cos, sin, write_cache=False
        )
    assert all(map(torch.equal, layer.storages, before))


def test_a_draft_model_has_no_indexer(config):
    layer = Layer(config)
    with pytest.raises(AssertionError, match="only support SWA-layer"):
        layer.builders[3].build_for_drafting(None, draft_index=1)


def test_a_bf16_kv_cache_of_an_a5_is_refused_when_the_model_is_loaded(configure, monkeypatch):
    monkeypatch.setattr(family2, "is_a5_bf16_kv_enabled", lambda config: True)
    module = make_attention(configure(), ours=True)
    with pytest.raises(ValueError, match="the KV cache is bf16"):
        loading.finish_loading(module, "reference", 1, 512)


@pytest.mark.parametrize(
    "options, found",
    [
        (dict(kv_cache_dtype="turboquant_4bit_nc"), "the KV cache is turboquant_4bit_nc"),
        (dict(prefill_context_parallel_size=2), "prefill_context_parallel_size is 2"),
        (dict(additional_config={"no_such_key": 1}), "no_such_key"),
    ],
)
def test_what_is_not_tested_here_is_refused_by_name(configure, options, found):
    with pytest.raises(ValueError, match=found):
        configure(**options)
