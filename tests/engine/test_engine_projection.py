"""The projection in front of the indexer's compressor, in the engine: ours, exact, and the engine's
own, rounded."""

import numpy as np
import pytest
import torch
from engine import GREEDY, Result, prompt
from safetensors import safe_open

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.bench.cases import Case, make_call
from vllm_dsv4_indexer.contract import FP8_SCALE_OFFSET, KV_WIDTH, ROW_WIDTH, WINDOW

# the first with an indexer: nothing before it depends on the projection
LAYER = "model.layers.1.attn.indexer"
TOKENS = 2048


@pytest.fixture(scope="module")
def engines(engine) -> dict[str, Result]:
    """One prompt and a few generated tokens, by either projection."""
    options = dict(caches=True, projections=True, enable_prefix_caching=False)
    rounds = [dict(prompts=[prompt(TOKENS)], sampling=GREEDY)]
    return {
        name: engine(
            name, rounds, additional_config={"dsv4_indexer": {"projection": name}}, **options
        )
        for name in ("exact", "engine")
    }


@pytest.fixture(scope="module")
def in_float64(engines, checkpoint) -> torch.Tensor:
    """The projection of the same hidden states and the checkpoint's weights, in float64."""
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        name = LAYER.removeprefix("model.") + ".compressor.{}.weight"
        weight = torch.cat([weights.get_tensor(name.format(part)) for part in ("wkv", "wgate")])
    return torch.from_numpy(engines["exact"].caches[f"{LAYER}.x"]).double() @ weight.double().T


def kv_score(result: Result) -> torch.Tensor:
    return torch.from_numpy(result.caches[f"{LAYER}.kv_score"])


def codes(kv_score: torch.Tensor) -> torch.Tensor:
    """The fp8 codes that the reference stores for one prompt of these projections."""
    call = make_call(Case("", "one", ((0, TOKENS),)), torch.float32)
    ops.compress(*call._replace(kv_score=kv_score[:TOKENS].float()), impl="reference")
    return call.k_cache.flatten(1)[:, :FP8_SCALE_OFFSET]


def test_both_engines_project_the_same_hidden_states(engines):
    assert np.array_equal(*(result.caches[f"{LAYER}.x"] for result in engines.values()))


def test_the_exact_projection_is_never_rounded_to_bfloat16_and_the_engines_is(engines, in_float64):
    for name, lowest, highest in (("exact", 0, 1e-6), ("engine", 1e-3, 3e-3)):
        error = (kv_score(engines[name]) - in_float64).norm() / in_float64.norm()
        assert lowest <= error <= highest, name


def test_the_exact_projection_changes_two_codes_in_ten_thousand_and_the_engines_one_in_twenty(
    engines, in_float64
):
    expected = codes(in_float64)
    changed = {
        name: (codes(kv_score(result)) != expected).sum() / (TOKENS * 32)
        for name, result in engines.items()
    }
    assert changed["exact"] <= 2e-4 and 0.04 <= changed["engine"] <= 0.1


@pytest.mark.parametrize("name", ("exact", "engine"))
def test_the_state_holds_the_rows_as_they_were_projected(engines, name):
    """The rows of the last window; pages of older ones may have been used again."""
    result = engines[name]
    state = result.caches[f"{LAYER}.state"].reshape(-1, ROW_WIDTH)[:, :KV_WIDTH]
    for row in kv_score(result)[-WINDOW:, :KV_WIDTH].numpy():
        assert (state == row).all(axis=1).any()


def test_the_log_says_which_projection_is_in_use(engines):
    assert "projection: exact" in engines["exact"].log
    assert "projection: the engine's own, rounded to bfloat16" in engines["engine"].log
