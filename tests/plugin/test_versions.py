"""Which versions of an engine are let in, and what is said of the others."""

import sys
from types import SimpleNamespace

import pytest
import vllm
from vllm.models.deepseek_v4.cpu import cpu_mla
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.v1.attention.backends.mla import compressor_utils

from vllm_dsv4_indexer.engines import gate, vllm_cpu
from vllm_dsv4_indexer.engines.versions import TESTED, Engine
from vllm_dsv4_indexer.engines.vllm_cpu import signatures
from vllm_dsv4_indexer.errors import NotInstalled, UserError

VERIFY = {"dsv4_indexer": {"untested": "verify"}}


def configure(**additional_config) -> None:
    """What happens when the backend is selected, up to where the engine looks at the model."""
    config = SimpleNamespace(model_config=None, additional_config=additional_config)
    vllm_cpu.configure(config, lambda _: None)


@pytest.fixture
def tested(monkeypatch):
    """Pretends that these versions of vLLM were tested, and no other."""

    def pretend(*versions: str) -> None:
        monkeypatch.setitem(TESTED, "cpu", tuple(map(Engine, versions)))

    return pretend


def test_a_newer_version_is_refused_with_the_setting_that_has_it_verified(tested):
    tested("0.31.0", "0.30.0")
    with pytest.raises(NotInstalled) as refused:
        configure()
    message = str(refused.value)
    assert f"this is vLLM {gate.public(vllm.__version__)}; " in message
    assert "supports vLLM 0.31.0, vLLM 0.30.0." in message
    assert """--additional-config '{"dsv4_indexer": {"untested": "verify"}}'""" in message
    configure(**VERIFY)


@pytest.mark.parametrize("between", ["0.32.1.dev3+g0123abc.cpu", "0.32.0.post1", "1.0.0rc1+cpu"])
def test_a_build_between_releases_is_a_newer_version(between, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", between)
    with pytest.raises(NotInstalled, match=f"this is vLLM {gate.public(between)}; .*verified"):
        configure()
    configure(**VERIFY)


def test_a_version_between_two_that_were_tested_is_not_older(tested):
    tested("0.31.0", "0.33.0")
    configure(**VERIFY)


@pytest.mark.parametrize("older", ["0.31.0", "0.32.0rc1", "0.32.0.dev7+cpu"])
def test_an_older_version_is_refused_whatever_is_set(older, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", older)
    with pytest.raises(NotInstalled, match=f"this is vLLM {gate.public(older)}; ") as refused:
        configure(**VERIFY)
    assert "verified" not in str(refused.value)


def test_a_pair_is_older_if_either_part_is():
    assert gate.is_older("npu", Engine("0.22.0", "0.30.0rc2"))
    assert gate.is_older("npu", Engine("0.30.0", "0.22.1rc1"))
    assert not gate.is_older("npu", Engine("0.31.0", "0.31.0rc1"))


def another_forward(self, kv_score, positions, rotary_emb, hadamard): ...


def another_kernel(compressed_slot_mapping_ptr, pages): ...


@pytest.mark.parametrize(
    "owner, name, theirs, found",
    [
        (
            DeepseekV4CPUCompressor,
            "forward",
            another_forward,
            r"DeepseekV4CPUCompressor\.forward of vLLM takes .*'hadamard'\), where the supported",
        ),
        (
            compressor_utils.CompressedSlotMappingKernel,
            "kernel",
            staticmethod(another_kernel),
            r"CompressedSlotMappingKernel\.kernel of vLLM takes .*'pages'\), where the supported",
        ),
    ],
)
def test_a_version_with_another_signature_is_refused_with_its_parameters(
    tested, monkeypatch, owner, name, theirs, found
):
    tested("0.31.0")
    monkeypatch.setattr(owner, name, theirs)
    with pytest.raises(UserError, match=found):
        configure(**VERIFY)


def test_a_version_without_a_class_of_those_that_we_replace_is_refused_with_its_name(
    tested, monkeypatch
):
    tested("0.31.0")
    monkeypatch.delattr(cpu_mla, "DeepseekV4CPUSparseSWAMetadataBuilder")
    monkeypatch.delitem(sys.modules, signatures.__name__)
    with pytest.raises(NotInstalled, match="since this one differs .*SparseSWAMetadataBuilder"):
        configure(**VERIFY)
