"""What a real attention layer of vllm-ascend's stores through our op, and what it calls."""

import family
import npu
import pytest
import stock
import torch
from layer import Layer, Rows, forward_call
from schedule import Schedule, store
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm_ascend import utils
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPMetadataBuilder
from vllm_ascend.attention.dsa_v1 import AscendDSABackend

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines.vllm_ascend import loading

STEPS = 25


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
            assert not differ, (
                f"{name} cache, step {step}: {differ} bytes differ; starts {rows.starts}, lengths "
                f"{rows.lengths}"
            )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("decode_tokens", [1, 3], ids="decode_{}".format)
@pytest.mark.parametrize("multistream", [False, True], ids=["one_stream", "two_streams"])
def test_prefill_decode_and_mixed_steps_store_the_reference(
    config, multistream, decode_tokens, seed
):
    layer = Layer(config, multistream=multistream, seed=seed)
    for builder in layer.builders:
        builder.decode_threshold = decode_tokens  # more than one: speculative decoding
    schedule = Schedule(seed, layer.page, layer.k_page, decode_tokens)
    assert_stores_the_reference(layer, schedule, lambda rows, x: layer.run(x, layer.metadata(rows)))


@pytest.mark.parametrize("seed", range(2))
def test_context_parallel_steps_store_the_reference(config, seed, monkeypatch):
    monkeypatch.setattr(utils, "enable_dsa_cp", lambda: True)
    with set_current_vllm_config(config):
        assert AscendDSABackend.get_builder_cls() is AscendDSACPMetadataBuilder
    layer = Layer(config, seed=seed)
    assert type(layer.attention) is loading.family().ContextParallelAttention

    schedule = Schedule(seed, layer.page, layer.k_page)
    assert_stores_the_reference(
        layer, schedule, lambda rows, x: layer.run_context_parallel(x, layer.metadata(rows))
    )


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


@pytest.mark.parametrize("decode_tokens", [1, 4], ids="decode_{}".format)
@pytest.mark.parametrize("path", ["one_stream", "two_streams", "context_parallel"])
def test_a_dummy_run_on_live_tables_stores_nothing(config, path, decode_tokens, monkeypatch):
    """A rank without requests of its own runs one with those that have others: as long as a decode
    step, its tables are those of requests that may live, and only its slots say that nothing is
    written."""
    if path == "context_parallel":
        monkeypatch.setattr(utils, "enable_dsa_cp", lambda: True)
    layer = Layer(config, multistream=path == "two_streams")
    for builder in layer.builders:
        builder.decode_threshold = decode_tokens
    run = layer.run_context_parallel if path == "context_parallel" else layer.run
    blocks = [list(range(first, first + 4)) for first in range(1, 32, 4)]
    live = [storage.clone() for storage in layer.storages]
    for lengths in ([8], [4, 4], [1] * 8):
        rows = Rows([0] * len(lengths), lengths, blocks[: len(lengths)], blocks[: len(lengths)])
        run(layer.hidden_states(8), layer.metadata(rows, dummy=True))
        for name, now, before in zip(("state", "K"), layer.storages, live):
            assert not (changed := (now != before).sum()), (
                f"{changed} bytes of the live {name} cache, {lengths}"
            )


def test_the_stock_chain_stores_the_same_but_for_its_own_roundings(config, monkeypatch):
    """State rows and slots the same; int8 codes at most 2 apart, fp8 values by 2 or their last bit,
    scales within 1 %: stock rounds to bf16 before, in the middle and after its Hadamard product,
    and on A2 and A3 its scale to fp16 after the division."""
    for operator in (stock.compressor_metadata, stock.compressor, stock.indexer_compress_epilog_v2):
        monkeypatch.setattr(
            torch.ops._C_ascend, operator.__name__, npu.counted(operator), raising=False
        )
    ours, theirs = Layer(config, seed=1), Layer(config, ours=False, seed=1)
    schedule = Schedule(1, ours.page, ours.k_page)
    for _ in range(STEPS):
        rows = schedule.step()
        x = ours.hidden_states(sum(rows.lengths))
        for layer in (ours, theirs):
            layer.run(x, layer.metadata(rows))
        assert torch.equal(ours.storages[0], theirs.storages[0])
    _, k, scale, *_ = ours.views(ours.storages)
    _, stock_k, stock_scale, *_ = theirs.views(theirs.storages)
    differ = k.view(torch.uint8) != stock_k.view(torch.uint8)
    one, other = k[differ].float(), stock_k[differ].float()
    last_bit = 0 if k.dtype is torch.int8 else other.abs() / 8
    assert ((one - other).abs() <= torch.clamp(torch.as_tensor(last_bit), min=2)).all()
    assert 0 < differ.float().mean() < 0.15
    torch.testing.assert_close(scale, stock_scale, rtol=0.01, atol=0, equal_nan=True)


class Launches(TorchDispatchMode):
    """The operators that are called, but for those that only make views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def two_decodes(layer: Layer):
    """The hidden states and the metadata of two requests that close a window each."""
    rows = Rows([3, 7], [1, 1], [list(range(1, 9)), list(range(11, 19))], [[1], [2]])
    return layer.hidden_states(2), layer.metadata(rows)


def test_a_layer_launches_the_projection_and_the_op(config, monkeypatch):
    layer = Layer(config)
    x, metadata = two_decodes(layer)
    with forward_call(metadata, len(x)):
        layer.keys.compress(
            x, layer.kv_cache, metadata[2:4]
        )  # the first layer of a step makes its plan
        runs = []
        monkeypatch.setattr(ops.BoundLayer, "run", lambda *arguments: runs.append(arguments))
        with Launches() as launches:
            layer.keys.compress(x, layer.kv_cache, metadata[2:4])
    assert launches.names == ["aten.mm.dtype"] and len(runs) == 1


def test_layers_whose_caches_have_the_same_metadata_share_one_plan_a_step(config):
    first, second = Layer(config), Layer(config)
    x, metadata = two_decodes(first)
    _, of_another_group = two_decodes(first)
    before = ops.work.plans
    for step in (1, 2):
        with forward_call(metadata, len(x)):
            for layer in (first, second):
                layer.keys.compress(x, layer.kv_cache, metadata[2:4])
            assert ops.work.plans == before + 2 * step - 1
            second.keys.compress(x, second.kv_cache, of_another_group[2:4])
            assert ops.work.plans == before + 2 * step


def test_a_capture_makes_a_plan_of_its_own(config, monkeypatch):
    """So that the graph makes it again in every replay, and does not keep what was made before
    it."""
    layer = Layer(config)
    x, metadata = two_decodes(layer)
    before = ops.work.plans
    with forward_call(metadata, len(x)):
        layer.keys.compress(x, layer.kv_cache, metadata[2:4])
        monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            layer.keys.compress(x, layer.kv_cache, metadata[2:4])
    assert ops.work.plans == before + 2


def test_metadata_that_are_refreshed_in_place_are_planned_again(config):
    """As a captured graph has them, whose tensors vllm-ascend's builders write anew for every
    step."""
    layer = Layer(config)
    tables = [list(range(1, 11)), list(range(11, 21))], [[1], [2]]
    before, after = (Rows(starts, [1, 1], *tables) for starts in ([3, 7], [11, 19]))
    metadata = layer.metadata(before)
    layer.run(layer.hidden_states(2), metadata)
    expected, x = [storage.clone() for storage in layer.storages], layer.hidden_states(2)
    layer.metadata(after)
    layer.run(x, metadata)
    with torch.inference_mode():
        store(layer, expected, after, x)
    assert all(map(torch.equal, layer.storages, expected))


def test_caches_that_are_replaced_are_written_from_then_on(config):
    layer = Layer(config)
    rows = Rows([0], [8], [list(range(1, 9))], [[1]])
    layer.run(layer.hidden_states(8), layer.metadata(rows))
    layer.allocate()
    expected, x = [storage.clone() for storage in layer.storages], layer.hidden_states(8)
    layer.run(x, layer.metadata(rows))
    with torch.inference_mode():
        store(layer, expected, rows, x)
    assert all(map(torch.equal, layer.storages, expected))


@pytest.mark.parametrize("multistream", [False, True], ids=["one_stream", "two_streams"])
def test_a_step_of_prefills_and_decodes_is_compressed_in_one_call(config, multistream, monkeypatch):
    layer = Layer(config, multistream=multistream)
    rows = Rows(
        [3, 7, 0],
        [1, 1, 6],
        [list(range(first, first + 8)) for first in (1, 11, 21)],
        [[1], [2], [3]],
    )
    runs = []
    monkeypatch.setattr(
        ops.BoundLayer, "run", lambda bound, kv_score, plan: runs.append(len(kv_score))
    )
    layer.run(layer.hidden_states(8), layer.metadata(rows))
    assert runs == [8]


def test_the_stock_compressor_is_not_called_for_the_indexer(config):
    """The one call left is the main compressor's; the quantisation and the scatter are the query's
    and its."""
    counts = []
    for ours in (True, False):
        layer = Layer(config, ours=ours)
        x, metadata = two_decodes(layer)
        npu.calls.clear()
        layer.run(x, metadata)
        counts.append(
            {
                name: npu.calls[name]
                for name in ("compressor", "compressor_metadata", "npu_dynamic_quant")
            }
        )
    assert counts == [
        dict(compressor=1, compressor_metadata=1, npu_dynamic_quant=1),
        dict(
            compressor=2, compressor_metadata=2, npu_dynamic_quant=1
        ),  # the stubs' compressor closes no window
    ]


def test_the_op_runs_beside_the_query_and_before_the_keys_are_read(config, monkeypatch):
    layer = Layer(config, multistream=True)
    x, metadata = two_decodes(layer)
    monkeypatch.setattr(ops.BoundLayer, "run", npu.counted(ops.BoundLayer.run))
    npu.streams.clear()
    layer.run(x, metadata)
    order = npu.streams[npu.streams.index("projection on main") :]
    order = order[: order.index(f"{family.READS_THE_KEYS} on main") + 1]
    assert order[:4] == [
        "projection on main",
        "event on main",
        "beside waits for event on main",
        "run on beside",
    ]
    others = [step for step in order[4:] if step != "event on main"]  # stock's own events
    assert others[:2] == ["inplace_partial_rotary_mul on main", "main waits for beside"]


def test_weights_that_are_loaded_again_reach_the_joined_projection(config):
    layer = Layer(config)
    compressor = layer.module.indexer.compressor
    x = layer.hidden_states(3)
    for weight in (compressor.wkv.weight, compressor.wgate.weight):
        weight.data.copy_(torch.randint(-3, 4, weight.shape) / 32)
    weights = torch.cat([compressor.wkv.weight, compressor.wgate.weight]).double()
    assert torch.equal(layer.keys.project(x).double(), x.double() @ weights.t())
