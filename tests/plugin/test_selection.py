"""What a selected backend changes in a configuration, when it is refused, and that other backends
are not affected."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from vllm.config import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_dsv4_indexer import plugin, selection
from vllm_dsv4_indexer.engines import compress_ratios, require_indexer, vllm_cpu
from vllm_dsv4_indexer.engines.vllm_cpu import compressor as compressors
from vllm_dsv4_indexer.engines.vllm_cpu import projection
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.settings import Settings

OURS = "vllm_dsv4_indexer.engines.vllm_cpu.worker.Worker"


def configure(model: Path, backend: str | None = "dsv4_indexer", **options):
    arguments = EngineArgs(
        model=str(model), attention_backend=backend, skip_tokenizer_init=True, **options
    )
    return arguments.create_engine_config()


@pytest.fixture
def variant(checkpoint: Path, tmp_path: Path):
    """The demo checkpoint's configuration with some keys changed."""

    def make(**changes) -> Path:
        config = json.loads((checkpoint / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return tmp_path

    return make


def test_selecting_the_backend_runs_our_worker_with_what_the_user_asked_for(checkpoint: Path):
    config = configure(checkpoint, max_num_batched_tokens=512)
    assert config.parallel_config.worker_cls == OURS
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.max_num_batched_tokens == 512


def test_what_the_user_switches_off_stays_off(checkpoint: Path):
    config = configure(checkpoint, enable_prefix_caching=False)
    assert not config.cache_config.enable_prefix_caching


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_another_backend_gets_vllms_own_worker_and_settings(llama: Path, backend: str | None):
    config = configure(llama, backend)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_deepseek_v4_without_our_backend_is_left_to_vllm(checkpoint: Path):
    config = configure(checkpoint, None)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def refusal(*arguments, **options) -> str:
    """The message of our error, which vLLM wraps in its own."""
    with pytest.raises(ValidationError) as refused:
        configure(*arguments, **options)
    error = refused.value.errors()[0]["ctx"]["error"]
    assert type(error) is UserError
    return str(error)


OTHER = "CPU_MLA"


@pytest.mark.parametrize("backend", [None, "dsv4_indexer"])
def test_naming_the_backend_for_the_kind_of_the_keys_is_the_same_selection(
    checkpoint: Path, backend: str | None
):
    kinds = {"mla_attention": "dsv4_indexer"}
    config = configure(checkpoint, backend, attention_config={"backend_per_kind": kinds})
    assert config.parallel_config.worker_cls == OURS
    assert config.attention_config == configure(checkpoint).attention_config


@pytest.mark.parametrize(
    "backend, kinds, found",
    [
        (None, {"sliding_window_mla": "dsv4_indexer"}, "names it for 'sliding_window_mla'"),
        (OTHER, {"full_attention": "dsv4_indexer"}, "names it for 'full_attention'"),
        (OTHER, {"mla_attention": "dsv4_indexer"}, f"{OTHER} and DSV4_INDEXER"),
        ("dsv4_indexer", {"mla_attention": OTHER}, f"DSV4_INDEXER and {OTHER}"),
        (
            None,
            {"mla_attention": "dsv4_indexer", "sliding_window_mla": OTHER},
            f"DSV4_INDEXER and {OTHER}",
        ),
    ],
)
def test_a_selection_for_a_part_of_the_layers_is_refused(
    checkpoint: Path, backend: str | None, kinds: dict, found: str
):
    message = refusal(checkpoint, backend, attention_config={"backend_per_kind": kinds})
    assert found in message and "pass --attention-backend dsv4_indexer" in message


@pytest.mark.parametrize("backend", [None, "dsv4_indexer"])
def test_the_backend_is_refused_for_drafts(checkpoint: Path, backend: str | None):
    drafts = dict(method="ngram", num_speculative_tokens=2, attention_backend="dsv4_indexer")
    message = refusal(checkpoint, backend, speculative_config=drafts)
    assert "attention_backend in --speculative-config names it" in message


def test_the_backend_is_refused_for_images():
    multimodal = MultiModalConfig(mm_encoder_attn_backend="dsv4_indexer")
    config = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal))
    with pytest.raises(UserError, match="--mm-encoder-attn-backend names it"):
        selection.is_selected(config)


def test_other_backends_for_kinds_and_drafts_are_none_of_our_business(llama: Path):
    kinds = {"backend_per_kind": {"full_attention": "CPU_ATTN"}}
    drafts = dict(method="ngram", num_speculative_tokens=2, attention_backend="CPU_ATTN")
    config = configure(llama, None, attention_config=kinds, speculative_config=drafts)
    assert config.attention_config.backend_per_kind["full_attention"].name == "CPU_ATTN"


@pytest.fixture
def warnings(llama: Path, caplog, monkeypatch):
    """The warnings that our logger has given so far."""
    configure(llama, None)  # in a process's first configuration, vLLM sets its loggers up again
    ours = logging.getLogger("vllm.dsv4_indexer")
    monkeypatch.setattr(ours, "handlers", [caplog.handler])
    monkeypatch.setattr(ours, "propagate", False)
    return lambda: [
        record.message
        for record in caplog.records
        if (record.name, record.levelname) == (ours.name, "WARNING")
    ]


@pytest.mark.parametrize("key", ["dsv4_indexer", "DSV4-indexer"])
def test_settings_without_the_backend_are_warned_of_once(llama: Path, warnings, key: str):
    for _ in range(2):
        configure(llama, None, additional_config={key: {"impl": "reference"}})
    (warning,) = warnings()
    assert repr(key) in warning and "pass --attention-backend dsv4_indexer" in warning


def test_no_settings_or_those_of_other_plugins_are_not_warned_of(llama: Path, warnings):
    configure(llama, None)
    configure(llama, None, additional_config={"another_plugin": {"impl": "reference"}})
    assert warnings() == []


def test_a_configuration_that_is_ours_already_is_not_warned_of():
    """vllm-ascend drops the backend's name, and vLLM checks a configuration more than once."""
    config = SimpleNamespace(additional_config={"dsv4_indexer": {}}, parallel_config=None)
    assert "does nothing" in selection.idle_settings(config)
    config.parallel_config = SimpleNamespace(worker_cls=OURS)
    assert selection.idle_settings(config) is None


def test_a_model_that_is_not_deepseek_v4_is_refused(llama: Path):
    message = refusal(llama)
    assert (
        "'llama'" in message
        and "supported: deepseek_v4" in message
        and "leave the option out" in message
    )


def test_deepseek_v4_1_is_refused_with_what_serves_it():
    config = SimpleNamespace(hf_config=SimpleNamespace(model_type="deepseek_v41"))
    with pytest.raises(UserError, match="V4.1 has no indexer compressor .* vLLM's own attention"):
        require_indexer(SimpleNamespace(model_config=config, parallel_config=None))


def test_model_runner_v2_is_refused_with_the_variable_that_turns_it_off(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    message = refusal(checkpoint)
    assert "Model Runner V2 is on" in message and "set VLLM_USE_V2_MODEL_RUNNER=0" in message


def test_zentorch_is_refused_by_name(checkpoint, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_zen_cpu", lambda _: True)
    assert "zentorch is installed" in refusal(checkpoint)


def test_an_index_topk_that_the_engine_cannot_do_is_refused(variant):
    message = refusal(variant(index_topk=1024))
    assert "index_topk is 1024" in message and "512" in message


def test_a_model_without_an_indexer_is_refused(variant):
    assert "no layer of this model has an indexer" in refusal(
        variant(compress_ratios=[0, 128, 128, 0])
    )


def test_a_model_with_fewer_compress_ratios_than_layers_is_refused(variant):
    message = refusal(variant(compress_ratios=[0, 4, 128]))
    assert "4 layers, and compress_ratios for 3" in message and "config.json" in message


def test_ratios_of_layers_for_drafts_behind_the_models_own_are_accepted(variant):
    configure(variant(compress_ratios=[0, 4, 128, 4, 0]))


def test_ratios_are_read_from_transformers_configuration_too(checkpoint: Path):
    theirs = DeepseekV4Config.from_pretrained(checkpoint)
    ours = json.loads((checkpoint / "config.json").read_text())["compress_ratios"]
    assert not hasattr(theirs, "compress_ratios") and compress_ratios(theirs) == ours


def test_a_reload_of_weights_is_refused():
    worker = resolve_obj_by_qualname(OURS)
    with pytest.raises(UserError, match="the weights are to be reloaded.*start a new engine"):
        worker.__new__(worker).reload_weights()


def test_another_worker_class_is_refused(checkpoint: Path):
    message = refusal(checkpoint, worker_cls="some.other.Worker")
    assert "some.other.Worker" in message


@pytest.mark.parametrize(
    "options, found",
    [
        (
            dict(decode_context_parallel_size=2, tensor_parallel_size=2),
            "decode_context_parallel_size is 2",
        ),
        (
            dict(speculative_config=dict(method="ngram_gpu", num_speculative_tokens=2)),
            "method is 'ngram_gpu'",
        ),
        (
            dict(speculative_config=dict(method="ngram", num_speculative_tokens=1)),
            "num_speculative_tokens is 1",
        ),
        (dict(data_parallel_size=2), "data_parallel_size is 2"),
        (dict(enable_expert_parallel=True, tensor_parallel_size=2), "expert parallelism is on"),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(dtype="float32"), "dtype is 'float32'"),
        (dict(enable_prompt_embeds=True), "prompt embeddings are on"),
        (dict(model_impl="transformers"), "model_impl is 'transformers'"),
        (
            dict(kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")),
            "a KV connector is configured",
        ),
        (dict(kv_offloading_size=1), "KV offloading is on"),
        (dict(disable_hybrid_kv_cache_manager=True), "all caches are to be one group"),
        (dict(offload_backend="prefetch", offload_group_size=2), "weights are to be prefetched"),
        (dict(mamba_cache_mode="align"), "mamba_cache_mode is 'align'"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(checkpoint: Path, options: dict, found: str):
    assert found in refusal(checkpoint, **options)


@pytest.mark.parametrize(
    "drafts", [dict(method="ngram"), dict(method="custom_class", model="drafts.FromMemory")]
)
def test_speculative_decoding_without_a_second_model_is_accepted(checkpoint: Path, drafts: dict):
    configure(checkpoint, speculative_config=drafts | dict(num_speculative_tokens=2))


READABLE = {"dsv4_indexer": {"state_save": "readable"}}


def test_with_another_scheduler_all_rows_are_saved_and_no_other_way_is_accepted(checkpoint: Path):
    options = dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    configure(checkpoint, **options)
    message = refusal(checkpoint, additional_config=READABLE, **options)
    assert "state_save is 'readable', but a scheduler is configured" in message
    assert "leave --scheduler-cls out" in message


def test_the_stock_compressor_has_all_rows_saved(checkpoint: Path):
    configure(checkpoint, additional_config={"dsv4_indexer": {"impl": "stock"}})
    settings = {"dsv4_indexer": {"state_save": "readable", "impl": "stock"}}
    message = refusal(checkpoint, additional_config=settings)
    assert "state_save is 'readable'" in message and "'stock'" in message


def test_an_unknown_way_to_save_is_refused_by_name(checkpoint: Path):
    message = refusal(checkpoint, additional_config={"dsv4_indexer": {"state_save": "none"}})
    assert "'none'" in message and "['auto', 'full', 'readable']" in message


@pytest.mark.parametrize("file", [7, "", "no-such-folder/account", "/"])
def test_an_account_that_cannot_be_written_is_refused_by_name(checkpoint: Path, file):
    message = refusal(checkpoint, additional_config={"dsv4_indexer": {"account": file}})
    assert f"dsv4_indexer.account is {file!r}" in message


def test_an_unknown_platform_is_refused():
    with pytest.raises(UserError, match=r"the platform is 'cuda'; supported: cpu, npu"):
        plugin._engine(SimpleNamespace(device_type="cuda"))


def test_an_unknown_setting_is_refused_by_name(checkpoint: Path):
    message = refusal(checkpoint, additional_config={"dsv4_indexer": {"implementation": "cpu"}})
    assert (
        "unknown key dsv4_indexer.implementation" in message
        and "['impl', 'projection', 'state_save', 'check', 'capture', 'capture_when', " in message
    )


def test_an_unknown_implementation_is_refused_by_name(checkpoint: Path):
    message = refusal(checkpoint, additional_config={"dsv4_indexer": {"impl": "fast"}})
    assert "'fast'" in message and "'reference'" in message


@pytest.mark.parametrize("value", ["fp64", None, True, ["exact"]])
def test_an_unknown_projection_is_refused_by_name(checkpoint: Path, value):
    message = refusal(checkpoint, additional_config={"dsv4_indexer": {"projection": value}})
    assert f"projection is {value!r}" in message and "['auto', 'exact', 'engine']" in message


@pytest.mark.parametrize(
    "capabilities, exact",
    [
        ({"avx2": True}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"bf16": True}, False),  # Arm
        ({"bf16": False}, True),
    ],
)
def test_the_projection_is_exact_unless_the_cpu_has_a_matrix_unit_or_the_user_says_otherwise(
    monkeypatch, capabilities: dict, exact: bool
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert vllm_cpu.projects_exactly(Settings()) is exact
    assert vllm_cpu.projects_exactly(Settings(projection="exact"))
    assert not vllm_cpu.projects_exactly(Settings(projection="engine"))


def test_an_unknown_environment_variable_of_ours_is_refused(checkpoint: Path, monkeypatch):
    monkeypatch.setenv("DSV4_INDEXER_SPEED", "11")
    assert "DSV4_INDEXER_SPEED" in refusal(checkpoint)


@pytest.mark.parametrize("key", ["dsv4-indexer", "DSV4_INDEXER", "dsv4indexer"])
def test_a_misspelt_namespace_is_refused(checkpoint: Path, key: str):
    message = refusal(checkpoint, additional_config={key: {"impl": "cpu"}})
    assert repr(key) in message and "'dsv4_indexer'" in message


def test_settings_of_other_plugins_are_not_ours_to_refuse(checkpoint: Path):
    configure(checkpoint, additional_config={"another_plugin": {"speed": 11}})


def test_an_indexer_that_another_plugin_changed_is_refused(monkeypatch):
    layer = SimpleNamespace(
        indexer=SimpleNamespace(compressor=SimpleNamespace(prefix="layers.1.compressor"))
    )
    monkeypatch.setattr(compressors, "DeepseekV4CPUAttention", SimpleNamespace)
    with pytest.raises(UserError, match="layers.1.compressor is a SimpleNamespace"):
        compressors.replace_compressors(
            SimpleNamespace(modules=lambda: [layer]), Settings(), indexers=1, request_ids=list
        )


def test_a_model_class_that_another_plugin_replaced_is_refused():
    with pytest.raises(UserError, match="the model has 0 layers .* its configuration asks for 2"):
        compressors.replace_compressors(
            SimpleNamespace(modules=list), Settings(), indexers=2, request_ids=list
        )


@pytest.mark.parametrize("setting", [{"check": "on"}, {"capture": "."}])
def test_what_watches_our_op_is_refused_for_the_stock_compressor(checkpoint: Path, setting: dict):
    message = refusal(checkpoint, additional_config={"dsv4_indexer": setting | {"impl": "stock"}})
    assert "but impl 'stock' leaves our op out" in message


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"capture": "no/such/folder"}, "name a folder that can be written"),
        ({"capture_when": "error"}, "name a folder in dsv4_indexer.capture, too"),
        ({"capture": ".", "capture_when": 0}, "the number of a step, from 1 on"),
        ({"capture": ".", "capture_when": "now"}, "choose 'error', 'not_finite' or"),
    ],
)
def test_a_capture_that_cannot_be_made_is_refused(checkpoint: Path, settings: dict, message: str):
    assert message in refusal(checkpoint, additional_config={"dsv4_indexer": settings})


@pytest.fixture
def compressor() -> SimpleNamespace:
    """What is needed of a compressor whose weights are loaded but not packed."""
    linear = torch.nn.Linear(64, 512, bias=False, dtype=torch.bfloat16)
    linear.quant_method = UnquantizedLinearMethod()
    return SimpleNamespace(prefix="layers.1.compressor", fused_wkv_wgate=linear)


def test_our_projection_keeps_one_copy_of_the_weight_and_takes_a_new_one(compressor):
    linear, x = compressor.fused_wkv_wgate, torch.rand(5, 64).bfloat16()
    projection.replace_projection(compressor)
    for _ in range(2):  # loaded, and reloaded
        weight = torch.randn(512, 64).bfloat16()
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        linear.quant_method.process_weights_after_loading(linear)
        torch.testing.assert_close(
            linear.quant_method.apply(linear, x), (x.double() @ weight.double().T).float()
        )
        assert [name for name, _ in linear.named_parameters()] == ["weight"] and not hasattr(
            linear, "cpu_linear"
        )


@pytest.mark.parametrize(
    "change, found",
    [
        (
            dict(quant_method=SimpleNamespace()),
            r"has a SimpleNamespace and a weight of shape \(512, 64\)",
        ),
        (dict(weight=torch.nn.Parameter(torch.empty(0))), r"a weight of shape \(0,\)"),
        (dict(bias=torch.nn.Parameter(torch.empty(512))), "and no bias"),
    ],
)
def test_a_projection_that_vllm_builds_otherwise_is_refused(compressor, change: dict, found: str):
    for name, value in change.items():
        setattr(compressor.fused_wkv_wgate, name, value)
    with pytest.raises(UserError, match=f"layers.1.compressor.fused_wkv_wgate .*{found}"):
        projection.replace_projection(compressor)


def test_attention_is_built_as_before_once_a_model_is_loaded_or_could_not_be():
    build = projection.DeepseekV4CPUAttention.__init__
    with pytest.raises(KeyError), projection.exact_projections():
        assert projection.DeepseekV4CPUAttention.__init__ is not build
        raise KeyError
    assert projection.DeepseekV4CPUAttention.__init__ is build
