"""The weights of a checkpoint's indexers as numbers, for recall to calculate with.

They are the tensors `layers.N.attn.indexer.*` of its safetensors files. Their dtype is bfloat16 or
wider, or FP8 (e4m3) with a scale for each block of the matrix, in fp32 or as a power of two
(ue8m0). `wq_b` is FP8 in DeepSeek's own checkpoints.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

NEEDED = (
    "wq_b.weight",
    "weights_proj.weight",
    "compressor.wkv.weight",
    "compressor.wgate.weight",
    "compressor.ape",
    "compressor.norm.weight",
)
WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn
SCALES = ("scale", "weight_scale_inv", "weight_scale")  # DeepSeek's name, vLLM's, and AMD Quark's
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
_NAME = re.compile(r"layers\.(\d+)\.attn\.indexer\.(.+)")


class Indexers:
    """By number of the layer, the weights of its indexer. Raises UserError at once if one is
    missing or has a format that is not known here."""

    def __init__(self, model: str | Path):
        self._stored = _stored(model)
        self._block = _block(model)
        if not self._stored:
            raise UserError(
                f"{model} has no tensor layers.N.attn.indexer.* in *.safetensors; recall needs them"
            )
        for number in self._stored:
            for name in NEEDED:
                self._check(number, name)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The weights of one layer in float64, by the rest of their names."""
        stored = self._stored[number]
        return {name: self._exact(stored, name) for name in NEEDED}

    def _exact(self, stored: dict[str, Tensor], name: str) -> Tensor:
        if stored[name].dtype != FP8:
            return stored[name].double()
        scale = _scale_of(stored, name)
        assert scale is not None, "checked when the checkpoint was read"
        return dequantised(stored[name], stored[scale], self._block)

    def _check(self, number: int, name: str) -> None:
        whole, stored = f"layers.{number}.attn.indexer.{name}", self._stored[number]
        if name not in stored:
            raise UserError(f"the checkpoint has no {whole}, which recall needs")
        weight = stored[name]
        if weight.dtype in WIDE:
            return
        if weight.dtype != FP8 or weight.dim() != 2:
            raise UserError(
                f"{whole} has dtype {weight.dtype} and shape {list(weight.shape)}; recall reads "
                "bfloat16, float16, float32, float64, and matrices of float8_e4m3fn with a scale "
                "for each block: use a checkpoint in one of these"
            )
        scale = _scale_of(stored, name)
        if scale is None:
            raise UserError(
                f"{whole} has dtype float8_e4m3fn, and no tensor beside it has its scales "
                f"({', '.join(SCALES)})"
            )
        expected = [-(-size // block) for size, block in zip(weight.shape, self._block)]
        if list(stored[scale].shape) != expected or stored[scale].dtype not in SCALE_DTYPES:
            raise UserError(
                f"the scales of {whole} have dtype {stored[scale].dtype} and shape "
                f"{list(stored[scale].shape)}; recall reads float32, bfloat16 and float8_e8m0fnu, "
                f"of shape {expected}, one for each block of {self._block}"
            )


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix in float64: each code times the scale of its block."""
    of_each = scales.double()
    for dim, size in enumerate(block):
        of_each = of_each.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return codes.double() * of_each


def _stored(model: str | Path) -> dict[int, dict[str, Tensor]]:
    """The tensors as they are, by layer and the rest of their names."""
    stored: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for path in sorted(Path(model).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for found in filter(None, map(_NAME.fullmatch, file.keys())):
                    stored[int(found[1])][found[2]] = file.get_tensor(found[0])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    return dict(stored)


def _block(model: str | Path) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    config = json.loads(Path(model, "config.json").read_text())
    return tuple((config.get("quantization_config") or {}).get("weight_block_size") or (128, 128))


def _scale_of(stored: dict[str, Tensor], name: str) -> str | None:
    """The name of the scales of a weight."""
    stem = name.removesuffix("weight")
    return next((stem + scale for scale in SCALES if stem + scale in stored), None)
