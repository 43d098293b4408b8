"""Batches of tests/op in vllm-ascend's K pages, and on the device."""

from dataclasses import replace

import torch
from torch import Tensor

from batches import Batch, make_batch
from vllm_dsv4_indexer.contract import HEAD_DIM

PAGES = (
    (8, 128),
    (4, 64),
    (2, 32),
)  # tokens of a state page, entries of a K page: block sizes 128, 64 and 32
SCALE = {"int8_hadamard": torch.float16, "fp8_amax": torch.float32}


def paged_batch(
    requests: list[tuple[int, int]], pages: tuple[int, int], k_format: str, **options
) -> Batch:
    """A batch with K pages as A2 and A3 have them (`int8_hadamard`), or A5 (`fp8_amax`): values,
    then scales."""
    page, k_page = pages
    batch = make_batch(requests, page=page, k_format="int8_hadamard", **options)
    count = (
        batch.k_cache.shape[0] * batch.k_cache.shape[1] // k_page + 2
    )  # the batch's slots stay what they are
    entry = HEAD_DIM + SCALE[k_format].itemsize
    storage = torch.randint(0, 256, (count * k_page * entry,), dtype=torch.uint8)
    if k_format == "int8_hadamard":
        size, stride = (count, k_page), (k_page * entry, HEAD_DIM)
        k_cache = storage.view(torch.int8).as_strided((*size, HEAD_DIM), (*stride, 1))
        scales = storage.view(torch.float16).as_strided(
            size, (stride[0] // 2, 1), k_page * HEAD_DIM // 2
        )
    else:
        k_cache, scales = storage.view(count, k_page, entry), None
    storages = (batch.storages[0], storage)
    return replace(
        batch, k_format=k_format, k_cache=k_cache, k_scale_cache=scales, storages=storages
    )


def on(device: str, batch: Batch) -> Batch:
    """The batch on a device; the caches keep their strides."""
    copies = {
        storage.untyped_storage().data_ptr(): storage.to(device) for storage in batch.storages
    }

    def moved(tensor: Tensor) -> Tensor:
        storage = copies.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return tensor.to(device)
        return storage.view(tensor.dtype).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )

    tensors = {
        name: moved(value) for name, value in batch.__dict__.items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors, storages=tuple(copies.values()))
