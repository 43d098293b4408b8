"""Runs in a process of its own, with a vLLM and its vllm-ascend first on the path:
test_contract.py."""

import json

import npu

npu.install()

import family
import pytest
import torch
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from vllm import ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPMetadataBuilder
from vllm_ascend.attention.dsa_v1 import AscendDSAMetadataBuilder

from vllm_dsv4_indexer import plugin
from vllm_dsv4_indexer.checkpoint.config import make_config
from vllm_dsv4_indexer.engines.versions import TESTED
from vllm_dsv4_indexer.engines.vllm_ascend import found

if found() not in TESTED["npu"]:  # named by TEST_VLLM_ASCEND, or `make compat`
    TESTED["npu"] += (found(),)
npu.define_what_a_layer_calls()
plugin.register()
# As a class that is loaded already: vLLM would inspect one that is named in a process without our
# stubs.
ModelRegistry.register_model("DeepseekV4ForCausalLM", family.AscendDeepseekV4ForCausalLM)


@pytest.fixture(scope="session")
def configure(tmp_path_factory):
    """A configuration, made and checked by vLLM and vllm-ascend's real platform."""
    model = tmp_path_factory.mktemp("deepseek-v4")
    (model / "config.json").write_text(json.dumps(make_config(layers=4, hidden=512)))

    def make(backend: str | None = "dsv4_indexer", **options):
        options = (
            dict(skip_tokenizer_init=True, max_model_len=512, max_num_batched_tokens=512) | options
        )
        return EngineArgs(
            model=str(model), attention_backend=backend, **options
        ).create_engine_config()

    return make


@pytest.fixture(scope="session", params=[128, 64, 32], ids="block_size_{}".format)
def config(request, configure):
    return configure(block_size=request.param)


@pytest.fixture(scope="session", autouse=True)
def one_worker(tmp_path_factory, configure):
    """What a worker sets up before it makes a model."""
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(configure()):
        init_distributed_environment(
            1, 0, f"file://{tmp_path_factory.mktemp('rendezvous')}/file", 0, "gloo"
        )
        ensure_model_parallel_initialized(1, 1)
    # The builder takes scipy's Hadamard matrix, unless there is one: products of signs, by the bits
    # that two share.
    index = torch.arange(128)
    AscendDSAMetadataBuilder.hadamard = AscendDSACPMetadataBuilder.hadamard = torch.tensor(
        [[(-1.0) ** int(i & j).bit_count() for j in index.tolist()] for i in index.tolist()],
        dtype=torch.bfloat16,
    )
