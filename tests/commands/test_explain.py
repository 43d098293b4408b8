"""`vllm-dsv4-indexer explain`: vLLM's own numbers for a model whose weights nobody has."""

import json
import re
from pathlib import Path

import forked
import pytest

from vllm_dsv4_indexer.checkpoint.config import make_config

EXPLAIN = ["-m", "vllm_dsv4_indexer.cli", "explain"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its configuration alone."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(make_config(layers=6, hidden=512)))
    return folder


def python(*arguments: str, level: str = "ERROR") -> tuple[int, str, str]:
    done = forked.python(*arguments, environment={"VLLM_LOGGING_LEVEL": level})
    return done.returncode, done.stdout, done.stderr


def test_it_says_what_the_caches_take(model):
    flags = ["--max-model-len", "16384", "--max-num-batched-tokens", "8192"]
    status, printed, log = python(*EXPLAIN, str(model), *flags)
    assert status == 0, log
    assert "layers         6: ratio 0 in 1, ratio 4 in 3, ratio 128 in 2 " in printed
    assert "group          4 tokens a block, keeps rows that are read later, " in printed
    assert "3 attn.compressor.state_cache, 3 attn.indexer.compressor.state_cache\n" in printed
    # Of the state with the ratio 4 in front of each hit, of the keys, and of some sliding windows.
    windows = len(re.findall("keeps the last 128 tokens, .* attn.swa_cache", printed))
    blocks = 8192 // 256 + 8192 // 256 + windows * 8192 // 64
    assert f"step           of 8192 tokens: {blocks} blocks, " in printed
    assert "prefixes       hit in multiples of 256 tokens: in prompts of 257 or more" in printed
    steps = re.findall(r"KV cache .* in steps of (\d+)", printed)
    least = [int(number) for number in re.findall(r"KV cache +at least (\d+) bytes", printed)]
    assert steps == ["512", "2048", "8192"] and least == sorted(least)


def test_prefixes_do_not_hit_where_the_cache_is_off(model):
    status, printed, log = python(*EXPLAIN, str(model), "--no-enable-prefix-caching")
    assert status == 0, log
    assert "prefixes       are off\n" in printed


LEAST = """
from unittest import mock
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_kv_cache_groups
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm_dsv4_indexer import explain
from vllm_dsv4_indexer.engines.vllm_cpu import explanation
from vllm_dsv4_indexer.engines.vllm_cpu.worker import Worker

config = explain.read_flags({model!r}, ["--max-model-len", "4096"]).create_engine_config()
specs = explanation.specs_of(config)
told = explanation.Explanation.of(config, get_kv_cache_groups(config, dict(specs)))
(cache,) = get_kv_cache_configs(config, [specs], [told.least_bytes])
print("starts with", cache.num_blocks * told.block_bytes - told.least_bytes, "bytes to spare")
try:
    get_kv_cache_configs(config, [specs], [told.least_bytes - 1])
except ValueError as error:
    print("and with a byte less:", error)

worker = Worker.__new__(Worker)
worker.vllm_config, worker.get_kv_cache_spec = config, lambda: specs
for available in (told.least_bytes, told.least_bytes - 1):
    with mock.patch.object(CPUWorker, "determine_available_memory", lambda _: available):
        print("a worker has", worker.determine_available_memory())
"""


@pytest.fixture(scope="module")
def least(model) -> str:
    status, printed, log = python("-c", LEAST.format(model=str(model)), level="WARNING")
    assert status == 0, log
    return printed


def test_vllm_takes_the_least_memory_that_it_names_and_not_a_byte_less(least):
    assert "starts with 0 bytes to spare" in least
    assert "and with a byte less: To serve at least one request" in least


def test_a_worker_with_a_byte_less_names_the_remedy_that_vllm_does_not(least):
    with_enough, with_a_byte_less = least.split("a worker has ")[:2]
    assert "too few" not in with_enough
    assert "too few for the KV cache" in with_a_byte_less
    assert "or fewer --max-num-batched-tokens" in with_a_byte_less


def test_what_is_refused_is_told_with_the_reason(model):
    status, printed, log = python(*EXPLAIN, str(model), "--data-parallel-size", "2")
    assert status == 1, log
    assert printed.startswith("refused        --attention-backend dsv4_indexer: data_parallel_size")


def test_a_flag_that_vllm_does_not_know_is_one_line_and_status_2(model):
    status, printed, log = python(*EXPLAIN, str(model), "--no-such-flag")
    assert (status, printed) == (2, "")
    assert "--no-such-flag (see `vllm serve --help`)" in log.splitlines()[-1]
