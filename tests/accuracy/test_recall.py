"""Indexer recall on the demo checkpoint: what exact arithmetic is, and how much of its selection the engine makes; and
whether the engine agrees with itself under other schedules."""

import json
import subprocess
import sys

import pytest
import torch

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.accuracy import agreement, recall, report


def test_exact_keys_are_those_of_the_op_but_for_the_rounding_to_fp8():
    generator = torch.Generator().manual_seed(0)
    tokens, hidden = 256, torch.randn(256, 64, generator=generator, dtype=torch.float64)
    names = [f"compressor.{name}.weight" for name in ("wkv", "wgate")]
    weights = {name: torch.randn(256, 64, generator=generator).double() for name in names}
    weights["compressor.ape"] = torch.randn(4, 256, generator=generator).double()
    weights["compressor.norm.weight"] = torch.rand(128, generator=generator).double()
    angles = torch.arange(tokens)[:, None] / 10 ** torch.arange(32)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    expected = recall._keys(hidden, weights, cos_sin.double())

    kv_score = torch.cat([hidden @ weights[name].T for name in names], dim=1).float()
    k_cache = torch.zeros(1, 64, 132, dtype=torch.uint8)
    ape, norm = (weights[f"compressor.{name}"].float() for name in ("ape", "norm.weight"))
    positions = torch.arange(tokens)
    ops.compress(
        kv_score, ape, norm, cos_sin, positions, torch.zeros(tokens, dtype=torch.int32), positions + 4,
        1 + torch.arange(tokens // 4, dtype=torch.int32)[None], torch.zeros(tokens // 4 + 1, 4, 512),
        torch.where(positions % 4 == 3, positions // 4, -1), k_cache, impl="reference",
    )  # fmt: skip
    page = k_cache.flatten()
    codes = page[: 64 * 128].view(torch.float8_e4m3fn).view(64, 128).double()
    stored = codes * page[64 * 128 :].view(torch.float32)[:, None]
    assert ((stored - expected).abs() <= expected.abs() / 14 + expected.abs().amax(dim=1, keepdim=True) / 2**13).all()


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory) -> tuple[dict, str]:
    """What the command measured of vLLM with our backend, and what it printed."""
    folder = tmp_path_factory.mktemp("recall")
    command = [sys.executable, "-m", "vllm_dsv4_indexer.cli", "accuracy", str(checkpoint)]
    command += ["--lengths", "3072,4096", "--schedules", "600", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "accuracy.json").read_text()), done.stdout


def test_the_engine_selects_nearly_all_of_the_exact_top_k(measured):
    """Seen: 98.8 % and more. A random selection would have 50 % at 4096 tokens."""
    layers = measured[0]["recall"]
    assert layers.keys() == {"1", "3"}
    for layer in layers.values():
        assert [entries for entries, _ in layer] == list(range(528, 1025, 16))
        assert min(share for _, share in layer) >= 0.96


def test_recall_is_a_table_by_length_and_layer(measured):
    assert "| tokens | layer 1 | layer 3 |" in measured[1]
    assert "| to 3072 | " in measured[1] and "| to 4096 | " in measured[1]


def test_log_probabilities_hardly_depend_on_the_schedule(measured):
    """A bfloat16 logit has steps of 1/16 here, and a step of one token takes other matrix products."""
    schedules = measured[0]["agreement"]
    assert [positions for _, positions, *_ in schedules] == [599, 599, 75, 75]
    for schedule, _, mean, largest, same in schedules:
        assert mean <= 0.05 and largest <= 0.5 and same >= 0.9, schedule
        assert f"| {schedule} | " in measured[1]


def test_a_difference_is_that_of_the_tokens_which_both_name():
    one = [{1: -1.0, 2: -2.0}, {1: -1.0, 2: -0.5}]
    other = [{1: -1.25, 3: -4.0}, {1: -1.0, 2: -1.5}]
    assert agreement._compare("other", one, other) == ("other", 2, 1.25 / 3, 1.0, 0.5)


def test_the_table_has_the_mean_of_each_range_of_lengths():
    result = {"recall": {1: [(520, 0.9), (700, 0.8), (1024, 0.7), (1025, 0.5)]}}
    rows = report.recall_table(result, [2048, 4096, 8192]).splitlines()[2:]
    assert rows == ["| to 4096 | 80.00 % |", "| to 8192 | 50.00 % |"]
