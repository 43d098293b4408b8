"""Batches of tests/op in vllm-ascend's K pages, and on the device."""

from dataclasses import replace

import torch
from torch import Tensor

from batches import Batch, make_batch

# Tokens of a state page, entries of a K page: block sizes 128, 64 and 32.
PAGES = ((8, 128), (4, 64), (2, 32))


def paged_batch(
    requests: list[tuple[int, int]], pages: tuple[int, int], k_format: str, **options
) -> Batch:
    """With pages as A2 and A3 have them (`int8_hadamard`), or A5 (`fp8_amax`)."""
    page, k_page = pages
    options = {"layout": "ascend", "scale_dtype": torch.float16} | options
    return make_batch(requests, page=page, k_page=k_page, k_format=k_format, **options)


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
