"""A batch: the tensors of a call, on caches of its own."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import contract, ops
from ..contract import Call, Extents, Geometry, Requests
from ..entries import Entries, in_order

# The tensors of a call that have a row for each token.
PER_TOKEN = (
    "kv_score",
    "positions",
    "token_to_req",
    "inner_state_slot_mapping",
    "k_slot_mapping",
)
CACHES = ("inner_state_cache", "k_cache", "k_scale_cache")


def view_like(tensor: Tensor, storage: Tensor) -> Tensor:
    """The same view as `tensor` of another storage, given as a flat tensor of any type."""
    return storage.view(tensor.dtype).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


@dataclass(frozen=True)
class Batch:
    kv_score: Tensor
    ape: Tensor
    norm_weight: Tensor
    cos_sin_cache: Tensor
    positions: Tensor
    token_to_req: Tensor
    inner_state_slot_mapping: Tensor
    inner_state_block_table: Tensor
    inner_state_cache: Tensor
    k_slot_mapping: Tensor
    k_cache: Tensor
    k_scale_cache: Tensor | None
    k_format: str
    storages: tuple[Tensor, ...]  # every byte behind the caches, each storage once
    requests: Requests  # the same tokens, but for padding, as `ops.plan_requests` is told them
    eps: float = 1e-6

    def compress(self, impl: str | None = None) -> "Batch":
        ops.compress(*self.call, eps=self.eps, k_format=self.k_format, impl=impl)
        return self

    @property
    def call(self) -> Call:
        return Call(*(getattr(self, name) for name in Call._fields))

    @property
    def geometry(self) -> Geometry:
        return contract.geometry_of(self.ape, self.k_format)

    def plan(self, impl: str | None = None, extents: Extents | None = None) -> Tensor:
        extents = extents or Extents.of(self.call.layer)
        ratio = self.geometry.ratio
        return ops.plan(*self.call.step, **extents._asdict(), ratio=ratio, impl=impl)

    def run_planned(self, plan: Tensor, impl: str | None = None) -> "Batch":
        layer = self.call.layer
        bound = ops.BoundLayer(layer, eps=self.eps, k_format=self.k_format, impl=impl)
        bound.run(self.kv_score, plan)
        return self

    def take(self, tokens: Any) -> "Batch":
        """The call with these tokens only, on the same caches."""
        return replace(self, **{name: getattr(self, name)[tokens] for name in PER_TOKEN})

    def clone(self) -> "Batch":
        """An equal batch on tensors of its own."""
        return self.to(self.kv_score.device)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on a device; the caches keep their strides and share their storages as before."""
        copies = {
            storage.untyped_storage().data_ptr(): storage.to(device, copy=True)
            for storage in self.storages
        }

        def copied(tensor: Tensor) -> Tensor:
            storage = copies.get(tensor.untyped_storage().data_ptr())
            return tensor.to(device, copy=True) if storage is None else view_like(tensor, storage)

        tensors: dict[str, Any] = {
            name: copied(t) for name, t in self.__dict__.items() if isinstance(t, Tensor)
        }
        return replace(self, **tensors, storages=tuple(copies.values()))

    @property
    def _stored(self) -> Entries:
        return Entries.of(self.k_cache, self.k_format, self.k_scale_cache)

    def codes(self) -> Tensor:
        """[pages, entries, codes] view of the K values, without the `rotated` ones."""
        return self._stored.codes

    def rotated(self) -> Tensor:
        """[pages, entries, 64] view of the channels that the main caches keep in bfloat16."""
        return self._stored.rotated

    def ordered_codes(self) -> Tensor:
        """The codes as integers in the order of the values that they stand for."""
        return in_order(self.codes())

    def scales(self) -> Tensor:
        """[pages, entries] view of the scales; [pages, entries, 8] exponents of `fp8_ds_mla`;
        [pages, entries, 0] of `bf16`."""
        return self._stored.scales

    def written(self) -> Entries:
        """[E, ...]: what each window-closing token stored, in the order of the tokens."""
        return self._stored.at(self.k_slot_mapping[self.k_slot_mapping >= 0])

    def entries(self) -> list[bytes]:
        """The same, byte by byte."""
        parts = [part[..., None].flatten(1).view(torch.uint8) for part in self.written()]
        return [bytes(row.tolist()) for row in torch.cat(parts, dim=1)]
