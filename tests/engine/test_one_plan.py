"""The CPU engine's seam: one plan a pass, and a layer that follows its tensors. Without an
engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from batches import assert_identical, make_batch
from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import HEAD_DIM, Extents, Layer
from vllm_dsv4_indexer.engines.plans import once_a_step
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor

EXTENTS = Extents(9, 4, 640, 100)
EPS = 0.3  # no default of ours or of vLLM's


def context() -> ForwardContext:
    return ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={})


class Planner:
    """Counts its plans."""

    plans = 0

    def __call__(self) -> int:
        self.plans += 1
        return self.plans


@pytest.fixture
def make():
    return Planner()


def test_layers_with_the_same_metadata_share_the_plan_of_the_pass(make):
    state, entries = object(), object()
    with override_forward_context(context()):
        assert [once_a_step((state, entries), EXTENTS, make) for _ in range(3)] == [1, 1, 1]


def test_other_metadata_or_other_extents_have_a_plan_of_their_own(make):
    state, entries = object(), object()
    with override_forward_context(context()):
        once_a_step((state, entries), EXTENTS, make)
        assert once_a_step((object(), entries), EXTENTS, make) == 2
        assert once_a_step((state, object()), EXTENTS, make) == 3
        assert once_a_step((state, entries), EXTENTS._replace(max_pos=7), make) == 4
        assert once_a_step((state, entries), EXTENTS, make) == 1


def test_metadata_that_is_equal_and_not_the_same_is_other_metadata(make):
    with override_forward_context(context()):
        once_a_step(([1], [2]), EXTENTS, make)
        assert once_a_step(([1], [2]), EXTENTS, make) == 2


def test_a_later_pass_plans_anew_although_its_metadata_was_refreshed_in_place(make):
    metadata = object(), object()
    for expected in (1, 2):
        with override_forward_context(context()):
            assert once_a_step(metadata, EXTENTS, make) == expected


REPLACED = {
    "ape": lambda c: vars(c).update(ape=c.ape.clone()),
    "norm weight": lambda c: vars(c).update(_norm_weight_fp32=c._norm_weight_fp32.clone()),
    "state": lambda c: vars(c.state_cache).update(kv_cache=c.state_cache.kv_cache.clone()),
    "K cache": lambda c: vars(c._static_forward_context["k"]).update(
        kv_cache=c._static_forward_context["k"].kv_cache.clone()
    ),
}


def compressor(layer: Layer | None = None) -> SimpleNamespace:
    layer = layer or make_batch([(0, 16)], norm_dtype=torch.float32).call.layer
    return SimpleNamespace(
        ape=layer.ape,
        _norm_weight_fp32=layer.norm_weight,
        rms_norm_eps=EPS,
        head_dim=HEAD_DIM,
        bound=None,
        k_cache_prefix="k",
        state_cache=SimpleNamespace(kv_cache=layer.inner_state_cache),
        _static_forward_context={"k": SimpleNamespace(kv_cache=layer.k_cache)},
        settings=SimpleNamespace(impl="cpu"),
        cos_sin_cache=layer.cos_sin_cache,
    )


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_layer_is_bound_once_and_again_when_the_engine_replaces_a_tensor(replace):
    fake = compressor()
    bind = OnePassCompressor._bind
    first = bind(fake, fake.cos_sin_cache)
    assert bind(fake, fake.cos_sin_cache) is first
    replace(fake)
    second = bind(fake, fake.cos_sin_cache)
    assert second is not first
    assert sum(new is not old for new, old in zip(second.layer, first.layer)) == 1


def test_a_layer_runs_with_its_own_tensors_and_the_models_epsilon():
    batch = make_batch([(5, 16)], norm_dtype=torch.float32, eps=EPS)
    expected, call = batch.clone().compress("cpu"), batch.call
    fake = compressor(call.layer)
    bound = OnePassCompressor._bind(fake, fake.cos_sin_cache)
    bound.run(call.kv_score, ops.plan(*call.step, **bound.extents._asdict()))
    assert_identical(batch, expected)
