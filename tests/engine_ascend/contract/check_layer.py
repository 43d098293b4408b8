"""What a real attention layer of vllm-ascend's stores through our op, and what it calls."""

from types import SimpleNamespace

import npu
import pytest
import stock
import torch
from layer import BLOCKS, Layer
from schedule import Schedule, store
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_ascend import utils
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPMetadataBuilder
from vllm_ascend.attention.dsa_v1 import AscendDSABackend
from vllm_ascend.device import device_op

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines import vllm_ascend_worker as engine

STEPS = 40


def assert_stores_the_reference(layer: Layer, schedule: Schedule, run) -> None:
    """Every byte of both caches, after every step."""
    expected = [storage.clone() for storage in layer.storages]
    for step in range(STEPS):
        rows = schedule.step()
        x = layer.hidden_states(sum(rows.lengths))
        run(rows, x)
        with torch.inference_mode():
            store(layer, expected, rows, x)
        for name, actual, wanted in zip(("state", "K"), layer.storages, expected):
            differ = (actual != wanted).sum()
            assert not differ, f"{name} cache, step {step}: {differ} bytes differ; starts {rows.starts}, lengths {rows.lengths}"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("decode_tokens", [1, 3], ids="decode_{}".format)
@pytest.mark.parametrize("multistream", [False, True], ids=["one_stream", "two_streams"])
def test_prefill_decode_and_mixed_steps_store_the_reference(config, multistream, decode_tokens, seed):
    layer = Layer(config, multistream=multistream, seed=seed)
    for builder in layer.builders:
        builder.decode_threshold = decode_tokens  # more than one: speculative decoding
    schedule = Schedule(seed, layer.page, layer.k_page, decode_tokens)
    assert_stores_the_reference(layer, schedule, lambda rows, x: layer.run(x, layer.metadata(rows)))


@pytest.mark.parametrize("seed", range(2))
def test_context_parallel_steps_store_the_reference(config, seed, monkeypatch):
    monkeypatch.setattr(utils, "enable_dsa_cp", lambda: True)
    assert AscendDSABackend.get_builder_cls() is AscendDSACPMetadataBuilder
    layer = Layer(config, seed=seed)
    assert type(layer.attention) is engine.ContextParallelAttention

    def run(rows, x):
        metadata = layer.metadata(rows)
        starts = metadata[0].req_metadata.query_start_loc
        with torch.inference_mode():
            layer.attention._update_indexer_cache(x, layer.kv_cache, metadata, starts)

    assert_stores_the_reference(layer, Schedule(seed, layer.page, layer.k_page), run)


def test_requests_that_a_graph_adds_store_nothing(config):
    layer = Layer(config)
    schedule = Schedule(0, layer.page, layer.k_page)
    expected = [storage.clone() for storage in layer.storages]
    for length in (1, 1, 1, 1, 1, 1, 1, 1):
        schedule._length = lambda: length
        rows = schedule.step()
        x = layer.hidden_states(sum(rows.lengths))
        padded = torch.cat([x, torch.full((3, x.shape[1]), torch.nan)])
        layer.run(padded, layer.metadata(rows, padding=3))
        with torch.inference_mode():
            store(layer, expected, rows, x)
        assert all(map(torch.equal, layer.storages, expected))


def test_the_stock_chain_stores_the_same_but_for_its_own_roundings(config, monkeypatch):
    """State rows and slots the same; int8 codes at most 2 apart, scales within 1 %: stock rounds to bf16 before, in the
    middle and after its Hadamard product, and its scale to fp16 after the division."""
    for operator in (stock.compressor_metadata, stock.compressor):
        monkeypatch.setattr(torch.ops._C_ascend, operator.__name__, npu.counted(operator))
    ours, theirs = Layer(config, seed=1), Layer(config, ours=False, seed=1)
    schedule = Schedule(1, ours.page, ours.k_page)
    for _ in range(STEPS):
        rows = schedule.step()
        x = ours.hidden_states(sum(rows.lengths))
        for layer in (ours, theirs):
            layer.run(x, layer.metadata(rows))
        assert torch.equal(ours.storages[0], theirs.storages[0])
    _, k, scale = ours.views(ours.storages)
    _, stock_k, stock_scale = theirs.views(theirs.storages)
    apart = (k.int() - stock_k.int()).abs()
    assert apart.max() <= 2 and 0 < (apart > 0).float().mean() < 0.15
    written = scale != Layer(config, seed=1).views(ours.storages)[2]
    torch.testing.assert_close(scale, stock_scale, rtol=0.01, atol=0, equal_nan=True)
    del written


class Launches(TorchDispatchMode):
    """The operators that would be launched: all but views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not torch.Tag.core in function.tags or "view" not in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))
