"""How a model of vllm-ascend's gets our keys, in either family of versions."""

import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from torch import Tensor
from vllm_ascend import utils
from vllm_ascend.attention.dsa_v1 import AscendDSAImpl
from vllm_ascend.device.device_op import DeviceOperator
from vllm_ascend.ops import rope_dsv4

from vllm_dsv4_indexer.contract import RATIO
from vllm_dsv4_indexer.engines import parameters_of, require_signatures
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import Keys
from vllm_dsv4_indexer.errors import UserError


@functools.cache
def family() -> ModuleType:
    """The adapter for the vllm-ascend that is installed."""
    name = "family1" if hasattr(AscendDSAImpl, "_indexer_qkv_prepare") else "family2"
    return importlib.import_module(f"{__package__}.{name}")


def check_signatures() -> None:
    """Raise UserError that names what vllm-ascend has with other parameters than those we were
    written against."""
    expected = family().CALLED | {
        (DeviceOperator, "unpack_dsa_indexer_kv_cache"): ("kv_cache",),
        (rope_dsv4, "get_full_cos_and_sin_dsa"): ("group_name",),
        (utils, "npu_stream_switch"): ("target_stream", "enabled"),
    }
    for method, stock in family().OVERRIDDEN.items():
        expected[stock, method.__name__] = parameters_of(method)
    require_signatures("vllm-ascend", expected)


def finish_loading(model: Any, impl: str, indexers: int, max_positions: int) -> None:
    """Give the indexers of a loaded model, which must be as many as `indexers`, their keys.

    They share one table of 32 cosines and 32 sines for each of `max_positions`, where vllm-ascend
    has two with each value twice."""
    implementations: Iterator[Any] = (getattr(each, "impl", None) for each in model.modules())
    found = [
        attention
        for attention in implementations
        if type(attention) in family().ATTENTION and attention.indexer is not None
    ]
    if len(found) != indexers:
        raise UserError(
            f"--attention-backend dsv4_indexer: the model has {len(found)} indexers in layers of "
            f"ours, where its configuration asks for {indexers}. Is another plugin replacing the "
            "model class? Disable that plugin."
        )

    @functools.cache
    def cos_sin() -> Tensor:  # a pipeline stage without indexers has none
        tables = rope_dsv4.get_full_cos_and_sin_dsa(f"c{RATIO}")
        return torch.cat([table[:max_positions, 0, 0, ::2] for table in tables], dim=1)

    family().install(found, lambda indexer, requests: Keys(indexer, requests, impl, cos_sin()))
