"""How a model of vllm-ascend's gets our indexers.

While the worker loads its model, `AscendDSABackend.get_impl_cls` answers with our subclasses; the
backend itself stays the stock one, since vllm-ascend compares it by identity.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm_ascend.ops  # noqa: F401  before dsa_v1, which it imports in a circle
from vllm_ascend import utils
from vllm_ascend.attention import dsa_v1
from vllm_ascend.attention.context_parallel.dsa_cp import AscendDSACPImpl
from vllm_ascend.attention.dsa_v1 import AscendDSABackend, AscendDSAImpl
from vllm_ascend.device.device_op import DeviceOperator
from vllm_ascend.ops import rope_dsv4

from vllm_dsv4_indexer.contract import RATIO
from vllm_dsv4_indexer.engines import refuse
from vllm_dsv4_indexer.engines.vllm_ascend.attention import Attention, ContextParallelAttention
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import OnePassIndexer
from vllm_dsv4_indexer.errors import UserError

OURS = {AscendDSAImpl: Attention, AscendDSACPImpl: ContextParallelAttention}
OVERRIDDEN: dict[Callable[..., Any], type] = {
    Attention.forward: AscendDSAImpl,
    Attention._indexer_qkv_prepare: AscendDSAImpl,
    Attention.cv_indexer_select_qli: AscendDSAImpl,
    ContextParallelAttention._update_indexer_cache: AscendDSACPImpl,
}


def check_signatures() -> None:
    """Raise UserError that names what vllm-ascend has with other parameters than those we were
    written against."""
    expected = {
        (AscendDSABackend, "get_impl_cls"): (),
        (DeviceOperator, "unpack_dsa_indexer_kv_cache"): ("kv_cache",),
        (dsa_v1, "dsv4_dsa_overlap_stream"): (),
        (dsa_v1, "rotate_activation"): ("x", "hadamard"),
        (dsa_v1, "_is_w8a8_dynamic"): ("linear",),
        (rope_dsv4, "get_full_cos_and_sin_dsa"): ("group_name",),
        (utils, "npu_stream_switch"): ("target_stream", "enabled"),
    }
    for method, stock in OVERRIDDEN.items():
        expected[stock, method.__name__] = tuple(inspect.signature(method).parameters)
    for (owner, name), parameters in expected.items():
        function = getattr(owner, name, None)
        found = function and tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise UserError(
                f"--attention-backend dsv4_indexer: {owner.__name__}.{name} of vllm-ascend takes "
                f"{found}, where the supported versions take {parameters}. Has another plugin "
                "replaced it? Disable that plugin, or leave the option out."
            )


@contextmanager
def one_pass_indexers() -> Iterator[list[OnePassIndexer]]:
    """Attention layers that are made inside get our implementations, which are listed."""
    stock = vars(AscendDSABackend)["get_impl_cls"]
    AscendDSABackend.get_impl_cls = staticmethod(lambda: OURS[stock()])
    OnePassIndexer.made = []
    try:
        yield OnePassIndexer.made
    finally:
        AscendDSABackend.get_impl_cls = stock
        del OnePassIndexer.made


def finish_loading(model: Any, impl: str, indexers: int, max_positions: int) -> None:
    """Give the indexers of a loaded model, which must be as many as `indexers`, what they share:
    the op's name and one table of 32 cosines and 32 sines for each of `max_positions`, where
    vllm-ascend has two with each value twice."""
    found = [
        layer.impl
        for layer in model.modules()
        if isinstance(getattr(layer, "impl", None), OnePassIndexer)
    ]
    found = [attention for attention in found if attention.indexer is not None]
    if len(found) != indexers:
        raise UserError(
            f"--attention-backend dsv4_indexer: the model has {len(found)} indexers in layers of "
            f"ours, where its configuration asks for {indexers}. Is another plugin replacing the "
            "model class? Disable that plugin."
        )
    if not found:  # a pipeline stage without one
        return
    halves = [
        table[:max_positions, 0, 0, ::2]
        for table in rope_dsv4.get_full_cos_and_sin_dsa(f"c{RATIO}")
    ]
    cos_sin = torch.cat(halves, dim=1)
    for attention in found:
        attention.finish_loading(impl, cos_sin)


def refuse_drafts(made: list[OnePassIndexer]) -> None:
    """Refuse an indexer that was made while the model was loaded, and does not belong to it."""
    for attention in made:
        if attention.wkv_wgate is None:
            refuse(
                f"{attention.indexer.compressor.wkv.prefix} is in an indexer of a draft model",
                "draft models whose layers have none, as the published ones",
                "take another draft model, or leave the speculative configuration out",
            )
