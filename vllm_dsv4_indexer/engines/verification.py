"""Whether an engine's own compressor stores what ours does, before anything is served.

A wrong key is silent, so a version that nobody has tested is asked for numbers: both compressors
store the same random batches with the layer's own weights.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_dsv4_indexer.batches import Batch, make_batch
from vllm_dsv4_indexer.contract import INDEXER, Geometry
from vllm_dsv4_indexer.entries import SHARE_OF_TIES, bf16_differ
from vllm_dsv4_indexer.errors import UserError

# (start, length): prompts and decodes in one step, at any start, with a prefix in the state.
REQUESTS = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (0, 3), (62, 41), (120, 137)]
BATCHES = 8
Compressor = Callable[[Batch], None]  # stores a batch in the batch's own caches


class Stored(NamedTuple):
    """What two compressors stored for some tokens of a batch, a row for each of them."""

    what: str
    tokens: Tensor
    where: tuple[Tensor, Tensor]  # page and offset in the cache
    engines: Tensor
    ours: Tensor

    def require(self, layer: str, batch: Batch, differs: Tensor) -> None:
        """Raises UserError for the first value where `differs`, if there is any."""
        for row, column in differs.nonzero()[:1].tolist():
            token = int(self.tokens[row])
            found, expected = self.ours[row, column].item(), self.engines[row, column].item()
            refuse_keys(
                f"{layer}: at token {token} (request {int(batch.token_to_req[token])}, position "
                f"{int(batch.positions[token])}) of a random batch, {self.what} {column} is "
                f"{expected} by the engine's own compressor and {found} by ours"
            )


@functools.cache
def make_batches(geometry: Geometry = INDEXER, page: int = 4) -> list[Batch]:
    """Caches that lie in one storage, as vLLM's do, full of random bytes. page: tokens of a page of
    the state."""
    return [
        make_batch(REQUESTS, layout="engine", page=page, seed=seed, geometry=geometry)
        for seed in range(BATCHES)
    ]


def require_equal(layer: str, batches: list[Batch], engines: Compressor, ours: Compressor) -> None:
    """Raises UserError that names the layer and the first value that differs. State and scales are
    equal bit by bit, codes but for SHARE_OF_TIES of them, the rotated channels to the last step of
    bf16, and nothing else in the caches is touched."""
    ties = []
    for batch in batches:
        expected, actual = batch.clone(), batch.clone()
        engines(expected)
        ours(actual)
        state, scales, codes, *rotated = _stored(expected, actual)
        for exact in (state, scales):
            exact.require(layer, batch, _bits(exact.engines) != _bits(exact.ours))
        for near in rotated:
            near.require(layer, batch, bf16_differ(near.ours, near.engines))
            actual.rotated()[near.where] = expected.rotated()[near.where]
        codes.require(layer, batch, (codes.engines - codes.ours).abs() > 1)
        ties.append((batch, codes, codes.engines != codes.ours))
        actual.codes()[codes.where] = expected.codes()[codes.where]
        if not all(map(torch.equal, actual.storages, expected.storages)):
            refuse_keys(f"{layer}: one of the compressors writes where no token of the batch does")
    if sum(int(tie.sum()) for *_, tie in ties) > SHARE_OF_TIES * sum(
        tie.numel() for *_, tie in ties
    ):
        for batch, codes, tie in ties:
            codes.require(layer, batch, tie)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32) if values.dtype is torch.float32 else values


def _stored(expected: Batch, actual: Batch) -> list[Stored]:
    """State rows, scales and codes, and what the format keeps in bfloat16."""
    batch = expected
    tokens = torch.arange(len(batch.positions))
    closing = tokens[batch.k_slot_mapping >= 0]

    def both(what: str, of: Tensor, slots: Tensor, read: Callable[[Batch], Tensor]) -> Stored:
        rows = [read(one) for one in (expected, actual)]
        page = rows[0].shape[1]
        where = slots[of] // page, slots[of] % page
        return Stored(what, of, where, rows[0][where], rows[1][where])

    stored = [
        both("state", tokens, batch.inner_state_slot_mapping, lambda b: b.inner_state_cache),
        both("scale", closing, batch.k_slot_mapping, lambda b: b.scales()[..., None].flatten(2)),
        both("code", closing, batch.k_slot_mapping, Batch.ordered_codes),
    ]
    if batch.k_format == "fp8_ds_mla":
        stored.append(both("rotated channel", closing, batch.k_slot_mapping, Batch.rotated))
    return stored


def refuse_keys(found: str) -> None:
    raise UserError(
        f"--attention-backend dsv4_indexer: {found}. This version of the engine wants other keys "
        'than ours. Set dsv4_indexer.impl to "stock", or leave the option out.'
    )
