"""When our attention is chosen, what is refused by name, and what a change in vllm-ascend is
told."""

import math
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import family
import npu
import pytest
import torch
import vllm
from layer import make_attention
from vllm.platforms import current_platform
from vllm_ascend.attention.dsa_v1 import AscendDSABackend, AscendDSAImpl
from vllm_ascend.ops import rope_dsv4

from vllm_dsv4_indexer import ops, plugin
from vllm_dsv4_indexer.engines import account, gate, vllm_ascend
from vllm_dsv4_indexer.engines.versions import TESTED
from vllm_dsv4_indexer.engines.vllm_ascend import configuration, loading
from vllm_dsv4_indexer.engines.vllm_ascend import worker as workers
from vllm_dsv4_indexer.engines.vllm_ascend.carried import Carried
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import Keys
from vllm_dsv4_indexer.errors import NotInstalled, UserError

REFERENCE = dict(additional_config={"dsv4_indexer": {"impl": "reference"}}, enforce_eager=True)


def load(config, layers: int = 2, draft_layers: int = 0) -> torch.nn.Module:
    """The model that our worker loads, over vllm-ascend's own worker and a runner that makes
    attention layers."""
    made, draft = torch.nn.ModuleList(), torch.nn.ModuleList()

    def load_model() -> None:
        for model, count in ((made, layers), (draft, draft_layers)):
            model.extend(make_attention(config, ours=False) for _ in range(count))

    runner = SimpleNamespace(load_model=load_model, get_model=lambda: made)
    worker = workers.Worker.__new__(workers.Worker)
    worker.vllm_config, worker.model_runner = config, runner
    worker.load_model()
    return made


def keys(model: torch.nn.Module) -> list[Keys | None]:
    """Of each layer, ours; None for stock's."""
    return [family.keys(layer.dsa_attn.dsa_attn.impl) for layer in model]


def test_the_platform_that_checks_the_configuration_is_the_one_we_have_an_engine_for():
    assert plugin._engine(current_platform) is vllm_ascend


def test_naming_the_backend_names_our_worker_though_the_platform_drops_the_name(configure):
    config = configure()
    assert (
        config.parallel_config.worker_cls == "vllm_dsv4_indexer.engines.vllm_ascend.worker.Worker"
    )
    assert config.attention_config.backend is None


@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "CUSTOM"])
def test_another_backend_gets_the_stock_worker(configure, backend):
    assert configure(backend).parallel_config.worker_cls == configuration.STOCK_WORKER


def test_a_configuration_that_is_checked_again_keeps_our_worker(configure):
    config = configure()
    current_platform.check_and_update_config(config)
    assert config.parallel_config.worker_cls == configuration.WORKER


def test_our_worker_gives_every_indexer_our_attention_under_the_stock_backend(configure):
    model = load(configure(**REFERENCE))
    assert [found.compressor for found in keys(model)] == [
        layer.indexer.compressor for layer in model
    ]
    assert len(model) == 2
    assert all(layer.dsa_attn.dsa_attn.get_attn_backend() is family.Backend for layer in model)


def test_layers_made_before_and_after_are_stock(configure):
    config = configure(**REFERENCE)
    before, ours, after = (
        make_attention(config, ours=False),
        load(config),
        make_attention(config, ours=False),
    )
    assert [bool(found) for found in keys([before, *ours, after])] == [False, True, True, False]


def test_a_model_that_cannot_be_loaded_leaves_the_stock_backend(configure):
    with pytest.raises(KeyError), loading.family().while_loading():
        raise KeyError
    assert AscendDSABackend.get_impl_cls.__qualname__ == "AscendDSABackend.get_impl_cls"


def test_impl_stock_leaves_the_stock_attention(configure):
    model = load(configure(additional_config={"dsv4_indexer": {"impl": "stock"}}))
    assert keys(model) == [None, None]
    assert [type(layer.dsa_attn.dsa_attn.impl) for layer in model] == [AscendDSAImpl] * 2


def test_the_op_is_looked_for_on_the_platforms_device_before_the_model_is_loaded(
    configure, monkeypatch
):
    asked = []
    monkeypatch.setattr(workers.ops, "prepare", lambda *arguments: asked.append(arguments))
    model = load(configure())
    assert asked == [("ascend", "npu", {"A2": "int8_hadamard", "A5": "fp8_amax"}[npu.PRODUCT])]
    assert {found.impl for found in keys(model)} == {"ascend"}


def test_all_indexers_share_one_table_of_cosines_and_sines_as_long_as_the_model(configure):
    config = configure(**REFERENCE)
    first, second = (found.cos_sin for found in keys(load(config)))
    assert first is second and first.shape == (config.model_config.max_model_len, 64)
    cos, sin = rope_dsv4.get_full_cos_and_sin_dsa("c4")
    for half, table in ((first[:, :32], cos), (first[:, 32:], sin)):
        assert torch.equal(half.repeat_interleave(2, dim=1), table[: len(half), 0, 0])


def test_a_model_with_another_number_of_indexers_is_refused(configure):
    with pytest.raises(
        UserError,
        match="the model has 1 indexers in layers of ours, where its configuration asks for 2",
    ):
        load(configure(**REFERENCE), layers=1)


def test_a_dummy_run_is_told_to_write_nothing_before_its_metadata_are_built(monkeypatch):
    """Where vllm-ascend does so too late, as 0.23.0 does, and whichever of the two ways the run
    comes."""
    monkeypatch.setattr(workers, "SLOTS_ARE_VOIDED_LATE", True)
    tables = [
        SimpleNamespace(slot_mapping=SimpleNamespace(gpu=torch.arange(5, dtype=torch.int32)))
        for _ in range(2)
    ]
    seen = []
    for name in ("execute_model", "execute_dummy_batch"):
        look = lambda *_: seen.append([table.slot_mapping.gpu.tolist() for table in tables])  # noqa: E731
        monkeypatch.setattr(workers.NPUWorker, name, look)
    worker = workers.Worker.__new__(workers.Worker)
    worker.rank, worker._account_due = 0, math.inf
    worker.model_runner = SimpleNamespace(
        input_batch=SimpleNamespace(block_table=SimpleNamespace(block_tables=tables))
    )
    worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=1))
    worker.execute_dummy_batch()
    for table in tables:
        table.slot_mapping.gpu.zero_()
    worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=0))
    assert seen == [[[0, 1, 2, 3, 4]] * 2, [[-1] * 5] * 2, [[-1] * 5] * 2]


def test_our_worker_says_after_a_step_and_when_it_stops_what_the_op_did(monkeypatch):
    said = []
    monkeypatch.setattr(
        account.logger, "info", lambda message, *values: said.append(message % values)
    )
    monkeypatch.setattr(ops, "work", ops.Work(calls=2, tokens=26, uncounted=2))
    monkeypatch.setattr(workers.NPUWorker, "execute_model", lambda worker, step: step)
    monkeypatch.setattr(
        workers.NPUWorker, "shutdown", lambda worker: said.append("stock's own shut-down")
    )
    worker = workers.Worker.__new__(workers.Worker)
    worker.rank, worker.vllm_config = 3, SimpleNamespace(additional_config=Carried.of({}))
    steps = [SimpleNamespace(total_num_scheduled_tokens=tokens) for tokens in (20, 6)]
    assert [worker.execute_model(step) for step in steps] == steps
    worker.shutdown()
    line = f"DSV4_INDEXER: rank 3: {ops.work}"
    assert "2 calls on 26 tokens" in line and "2 calls whose entries only the device knows" in line
    assert said == [
        line,
        line,
        "stock's own shut-down",
    ]  # nothing after step 2: ten seconds have not passed


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, found",
    [
        (
            dict(tensor_parallel_size=2, decode_context_parallel_size=2),
            "decode_context_parallel_size is 2",
        ),
        (
            dict(additional_config={"xlite_graph_config": {"enabled": True}}),
            "the worker is 'vllm_ascend.xlite",
        ),
        (dict(worker_cls="some.other.Worker"), "the worker is 'some.other.Worker'"),
        (
            dict(hf_overrides={"compress_ratios": [0, 128, 128, 0]}),
            "no layer of this model has an indexer",
        ),
        (dict(additional_config={"dsv4_indexer": {"speed": 11}}), "unknown key dsv4_indexer.speed"),
        (
            dict(additional_config={"dsv4_indexer": {"state_save": "readable"}}),
            "state_save is 'readable'",
        ),
        (dict(additional_config={"dsv4_indexer": {"check": "on"}}), "check is 'on', which reads"),
        (dict(additional_config={"dsv4_indexer": {"capture": "."}}), "capture is set, which reads"),
        (
            dict(additional_config={"dsv4_indexer": {"projection": "engine"}}),
            "projection is 'engine'",
        ),
        (
            dict(additional_config={"dsv4_indexer": {"untested": "verify"}}),
            "untested is 'verify'; supported: 'refuse' with vllm-ascend: keys cannot be verified",
        ),
        (
            dict(additional_config={"dsv4_indexer": {"impl": "cpu"}}),
            "impl is 'cpu'; supported: ascend, reference, stock",
        ),
        (
            REFERENCE | dict(enforce_eager=False),
            "impl is 'reference', which reads values on the host",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(configure, options, found):
    with pytest.raises(ValueError) as refused:
        configure(**options)
    assert found in str(refused.value)


def test_weights_in_the_devices_private_layout_are_refused_where_ours_would_be(configure):
    """From 0.28 on vllm-ascend keeps wkv and wgate plain whatever weight_nz_mode says."""
    options = dict(additional_config={"weight_nz_mode": 2})
    if not family.BEFORE_0_28:
        assert configure(**options).parallel_config.worker_cls == configuration.WORKER
        compressor = make_attention(configure(**options), ours=True).indexer.compressor
        assert compressor.wkv.skip_weight_nz_conversion
        assert compressor.wgate.skip_weight_nz_conversion
    else:
        with pytest.raises(ValueError, match="weight_nz_mode is 2"):
            configure(**options)


@pytest.mark.skipif(not family.FIRST, reason="vllm-ascend asserts that drafts have none")
def test_a_draft_model_with_an_indexer_is_refused_by_the_name_of_its_layer(configure):
    with pytest.raises(
        ValueError, match=r"layers\.1\..*indexer\.compressor\.wkv is in an indexer of a draft model"
    ):
        load(configure(**REFERENCE), draft_layers=1)


@pytest.mark.parametrize("quantised", ["wkv", "wgate"])
def test_a_quantised_projection_is_refused_by_its_name(configure, quantised):
    class Description(dict):
        def __missing__(self, name: str) -> str:
            return "W8A8_DYNAMIC" if f"indexer.compressor.{quantised}." in name else "FLOAT"

        def get(self, name: str, default=None) -> str:
            return self[name] if name.endswith(".weight") else default

    class OneLayer(family.AscendModelSlimConfig):
        def is_layer_skipped_ascend(self, prefix: str, *mapping) -> bool:
            """What the first family asks; the second goes by the description."""
            return not prefix.endswith(f"indexer.compressor.{quantised}")

    quantisation = OneLayer()
    quantisation.quant_description = Description()
    make_attention(configure(), ours=False, quant_config=quantisation)
    refusal = pytest.raises(
        ValueError, match=rf"indexer\.compressor\.{quantised} is quantised \(AscendLinearMethod\)"
    )
    # For an A5 vllm-ascend quantises neither.
    never = npu.PRODUCT == "A5"
    with nullcontext() if never else refusal:
        module = make_attention(configure(), ours=True, quant_config=quantisation)
        loading.finish_loading(module, "reference", 1, 512)


@pytest.mark.parametrize(
    "name, value, found",
    [
        ("dtype", torch.bfloat16, "the dtype of its K cache is torch.bfloat16"),
        ("head_dim", 64, "the width of its K cache is 64"),
    ],
)
def test_a_k_cache_of_another_kind_is_refused_when_the_model_is_loaded(
    configure, name, value, found
):
    module = make_attention(configure(), ours=True)
    setattr(module.indexer.k_cache, name, value)
    with pytest.raises(ValueError, match=rf"layers\.1\..*indexer\.k_cache: {found}"):
        loading.finish_loading(module, "reference", 1, 512)


def test_the_settings_come_along_and_leave_no_key_that_vllm_ascend_may_refuse(configure):
    config = configure(**REFERENCE)
    assert "dsv4_indexer" not in config.additional_config
    worker = workers.Worker.__new__(workers.Worker)
    worker.vllm_config = pickle.loads(pickle.dumps(config))
    assert worker.settings.impl == "reference"


def test_model_runner_v2_is_refused_by_name(configure, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="Model Runner V2 is on"):
        configure()


@pytest.mark.parametrize(
    "name, found",
    [
        ("use_index_cache", "use_index_cache is set"),
        ("vision_n_layers", "the model has a vision tower"),
    ],
)
def test_a_model_with_what_is_not_tested_is_refused_by_name(configure, monkeypatch, name, found):
    config = configure()
    monkeypatch.setattr(config.model_config.hf_config, name, 1, raising=False)
    with pytest.raises(ValueError, match=found):
        configuration.configure(config, lambda config: None)


def test_other_versions_are_refused_with_what_was_found_and_what_is_supported(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.27.0+empty")
    with pytest.raises(NotInstalled) as refused:
        vllm_ascend.configure(None, None)
    message = str(refused.value)
    assert "with vLLM 0.27.0;" in message
    assert all(str(pair) in message for pair in TESTED["npu"])


@pytest.mark.parametrize("local", ["", "+empty", "+g0123abc.d20261129"])
def test_the_local_part_of_a_version_does_not_matter(monkeypatch, local):
    here = vllm_ascend.found()
    monkeypatch.setattr(vllm_ascend, "version", lambda package: here.vllm_ascend + local)
    monkeypatch.setattr(vllm, "__version__", here.vllm + local)
    assert vllm_ascend.found() == here and gate.is_tested("npu", here)


@pytest.mark.parametrize("between", ["0.26.1.dev3+g0123abc", "0.23.0rc1", "0.30.1.dev3"])
def test_a_build_between_releases_is_refused_by_its_version(monkeypatch, between):
    monkeypatch.setattr(vllm_ascend, "version", lambda package: between)
    with pytest.raises(NotInstalled, match=f"vllm-ascend {between.split('+')[0]} with"):
        vllm_ascend.configure(None, None)


CALLED = [
    (loading.DeviceOperator, "unpack_dsa_indexer_kv_cache"),
    (rope_dsv4, "get_full_cos_and_sin_dsa"),
    *loading.family().CALLED,
    *((owner, method.__name__) for method, owner in loading.family().OVERRIDDEN.items()),
]


@pytest.mark.parametrize("owner, name", CALLED)
def test_another_signature_is_named(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda more: None)
    with pytest.raises(
        UserError,
        match=rf"{owner.__name__}\.{name} of vllm-ascend takes \('more',\), where the supp",
    ):
        loading.check_signatures()


def is_inherited(owner: object, name: str) -> bool:
    return any(hasattr(base, name) for base in getattr(owner, "__mro__", ())[1:])


@pytest.mark.parametrize("owner, name", [one for one in CALLED if not is_inherited(*one)])
def test_what_is_gone_is_named(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(
        UserError, match=rf"{owner.__name__}\.{name} of vllm-ascend takes None, where the supported"
    ):
        loading.check_signatures()


def test_the_wheel_is_as_it_was_written_against():
    loading.check_signatures()
