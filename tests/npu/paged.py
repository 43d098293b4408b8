"""Batches of tests/op in vllm-ascend's K pages."""

import torch

from batches import Batch, make_batch

# Tokens of a state page, entries of a K page: block sizes 128, 64 and 32.
PAGES = ((8, 128), (4, 64), (2, 32))


def paged_batch(
    requests: list[tuple[int, int]], pages: tuple[int, int], k_format: str, **options
) -> Batch:
    """With pages as A2 and A3 have them (`int8_hadamard`, `bf16`), or A5 (`fp8_amax`)."""
    page, k_page = pages
    options = {"layout": "ascend", "scale_dtype": torch.float16} | options
    return make_batch(requests, page=page, k_page=k_page, k_format=k_format, **options)
