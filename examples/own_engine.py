"""The op in an engine of your own, without vLLM: two layers, two requests, two steps.

    python examples/own_engine.py

Each request has state pages of 4 rows and K pages of 64 entries. Page 0 of the state is nobody's.
"""

import torch

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import (
    FP8_ENTRY_BYTES,
    FP8_PAGE_ENTRIES,
    HEAD_DIM,
    KV_WIDTH,
    RATIO,
    ROPE_DIM,
    ROW_WIDTH,
    Layer,
    Step,
)

STATE_PAGE, STATE_PAGES, K_PAGES, MAX_POS = 4, 20, 2, 64
TABLE = torch.tensor([range(1, 9), range(9, 17)], dtype=torch.int32)  # the state pages of each


def make_layer() -> Layer:
    return Layer(
        ape=torch.randn(RATIO, KV_WIDTH),
        norm_weight=torch.ones(HEAD_DIM),
        cos_sin_cache=torch.randn(MAX_POS, ROPE_DIM),
        inner_state_cache=torch.zeros(STATE_PAGES, STATE_PAGE, ROW_WIDTH),
        k_cache=torch.zeros(K_PAGES, FP8_PAGE_ENTRIES, FP8_ENTRY_BYTES, dtype=torch.uint8),
    )


def make_step(requests: dict[int, range]) -> Step:
    """requests: the positions that each of them computes in this step."""
    request = torch.tensor([request for request, those in requests.items() for _ in those])
    position = torch.tensor([position for those in requests.values() for position in those])
    page = TABLE[request, position // STATE_PAGE].long()
    entry = request * FP8_PAGE_ENTRIES + position // RATIO  # request r has K page r
    closes = position % RATIO == RATIO - 1
    return Step(
        positions=position,
        token_to_req=request.int(),
        inner_state_slot_mapping=page * STATE_PAGE + position % STATE_PAGE,
        inner_state_block_table=TABLE,
        k_slot_mapping=torch.where(closes, entry, -1),
    )


def main() -> None:
    bound = [ops.BoundLayer(make_layer()) for _ in range(2)]  # once
    for requests in ({0: range(13), 1: range(6)}, {0: range(13, 14), 1: range(6, 12)}):
        step = make_step(requests)
        plan = ops.plan(*step, **bound[0].extents._asdict())  # once a step
        for layer in bound:
            kv_score = torch.randn(len(step.positions), ROW_WIDTH)  # your projection
            layer.run(kv_score, plan)
    print(ops.work)


if __name__ == "__main__":
    main()
