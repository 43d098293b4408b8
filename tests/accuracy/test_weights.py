"""The weights of indexers as recall reads them: in FP8, each code times the scale of its block."""

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_dsv4_indexer.accuracy import recall
from vllm_dsv4_indexer.accuracy.weights import FP8, NEEDED, Indexers
from vllm_dsv4_indexer.errors import UserError

PREFIX = "layers.1.attn.indexer."
ROWS, COLUMNS = 300, 200  # no multiples of a block's


def indexer() -> dict[str, torch.Tensor]:
    """An indexer's weights, as small as real ones, and in bfloat16 or float32."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.02 * torch.randn(*shape, generator=generator)  # noqa: E731
    weights = {name: draw(ROWS, COLUMNS).bfloat16() for name in NEEDED if name.endswith(".weight")}
    return weights | {"compressor.ape": draw(4, 256), "compressor.norm.weight": draw(128)}


def write(
    folder: Path, weights: dict[str, torch.Tensor], config: dict | None = None, **others
) -> Path:
    save_file(
        {PREFIX + name: value.contiguous() for name, value in (weights | others).items()},
        folder / "1.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def quantised(
    weight: torch.Tensor, block: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, block by block."""
    blocks = -(-ROWS // block), -(-COLUMNS // block)
    codes, scales = torch.empty_like(weight, dtype=FP8), torch.empty(blocks)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            here = slice(block * i, block * (i + 1)), slice(block * j, block * (j + 1))
            scale = weight[here].float().abs().max() / 448
            scales[i, j] = scale if dtype == torch.float32 else scale.log2().ceil().exp2()
            codes[here] = (weight[here].float() / scales[i, j]).to(FP8)
    return codes, scales.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("scale", ["scale", "weight_scale_inv"])
def test_fp8_is_the_weight_that_it_was_made_of_but_for_the_rounding(tmp_path, dtype, block, scale):
    weights = indexer()
    expected = weights["wq_b.weight"].double()
    weights["wq_b.weight"], weights[f"wq_b.{scale}"] = quantised(
        weights["wq_b.weight"], block, dtype
    )
    config = {"quantization_config": {"weight_block_size": [block, block]}} if block != 128 else {}
    read = Indexers(write(tmp_path, weights, config))[1]["wq_b.weight"]
    assert 0.018 < read.square().mean().sqrt() < 0.022
    assert ((read - expected).abs() <= expected.abs() / 16 + 1e-4 * expected.abs().max()).all()


def test_weights_that_are_wide_are_as_they_are(tmp_path):
    weights = indexer()
    read = Indexers(write(tmp_path, weights))[1]
    assert read.keys() == weights.keys()
    assert all(read[name].equal(value.double()) for name, value in weights.items())


def test_a_weight_and_its_scales_may_lie_in_two_files(tmp_path):
    weights = indexer()
    codes, scales = quantised(weights["wq_b.weight"], 128, torch.float32)
    weights["wq_b.weight"] = codes
    save_file({f"{PREFIX}wq_b.scale": scales}, tmp_path / "2.safetensors")
    read = Indexers(write(tmp_path, weights))[1]["wq_b.weight"]
    assert read[-1, -1] == codes[-1, -1].double() * scales[-1, -1].double()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda w: w.update({"wq_b.weight": w["wq_b.weight"].to(FP8)}),
            "wq_b.weight .* no tensor beside it has its scales",
        ),
        (
            lambda w: w.update({"wq_b.weight": w["wq_b.weight"].to(torch.int8)}),
            "wq_b.weight has dtype torch.int8",
        ),
        (
            lambda w: w.update({"wq_b.weight": w["wq_b.weight"].to(torch.float8_e5m2)}),
            "has dtype torch.float8_e5m2",
        ),
        (
            lambda w: w.update({"compressor.ape": w["compressor.ape"][0].to(FP8)}),
            "compressor.ape has dtype .*float8_e4m3",
        ),
        (
            lambda w: w.update(
                {"wq_b.weight": w["wq_b.weight"].to(FP8), "wq_b.scale": torch.ones(1)}
            ),
            r"scales of layers.1.attn.indexer.wq_b.weight .* shape \[1\]; .* shape \[3, 2\]",
        ),
        (
            lambda w: w.update(
                {"wq_b.weight": w["wq_b.weight"].to(FP8), "wq_b.scale": torch.ones(3, 2).byte()}
            ),
            "have dtype torch.uint8",
        ),
        (
            lambda w: w.pop("weights_proj.weight"),
            "has no layers.1.attn.indexer.weights_proj.weight",
        ),
        (lambda w: w.clear(), "no tensor layers.N.attn.indexer"),
    ],
)
def test_what_cannot_be_read_as_numbers_is_refused_by_name(tmp_path, spoil, message):
    weights = indexer()
    spoil(weights)
    with pytest.raises(UserError, match=message):
        Indexers(write(tmp_path, weights))


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1.safetensors").write_text("nonsense")
    with pytest.raises(UserError, match="1.safetensors cannot be read"):
        Indexers(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_hooked_is_restored_whatever_happens(error):
    compute = lambda *_: None  # noqa: E731
    attention = SimpleNamespace(_prepare_and_attn_fn=compute)
    with suppress(error), recall._recording(attention):
        assert attention._prepare_and_attn_fn is not compute
        raise error
    assert attention._prepare_and_attn_fn is compute
