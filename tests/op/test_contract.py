"""Broken arguments: one error for each, the same from every implementation, and nothing is
written."""

import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batches import IMPLS_WHERE_ROWS_ARE_UNIQUE, Batch, assert_close, assert_identical, make_batch
from vllm_dsv4_indexer import contract, ops
from vllm_dsv4_indexer.contract import ContractError
from vllm_dsv4_indexer.errors import UserError

INT8 = {"k_format": "int8_hadamard"}


def strided(tensor: torch.Tensor, step: int = 2) -> torch.Tensor:
    """An equal tensor whose last stride is `step`."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * step, dtype=tensor.dtype)
    wide[..., ::step] = tensor
    return wide[..., ::step]


METADATA = [
    (
        {},
        lambda b: {"kv_score": b.kv_score.double()},
        "kv_score has dtype torch.float64; expected torch.float32 or torch.bfloat16",
    ),
    (
        {},
        lambda b: {"kv_score": b.kv_score[:, :256]},
        r"kv_score has shape \[16, 256\]; expected \[T=16, 512\]",
    ),
    (
        {},
        lambda b: {"kv_score": strided(b.kv_score)},
        r"kv_score has strides .*; expected its last 1 dim",
    ),
    (
        {},
        lambda b: {"ape": b.ape.T.contiguous().T},
        r"ape has strides \(1, 4\); expected its last 2 dim",
    ),
    ({}, lambda b: {"norm_weight": b.norm_weight.half()}, "norm_weight has dtype"),
    ({}, lambda b: {"cos_sin_cache": b.cos_sin_cache.bfloat16()}, "cos_sin_cache has dtype"),
    (
        {},
        lambda b: {"positions": b.positions.int()},
        "positions has dtype torch.int32; expected torch.int64",
    ),
    (
        {},
        lambda b: {"positions": b.positions[:-1]},
        r"positions has shape \[15\]; expected \[T=16\]",
    ),
    ({}, lambda b: {"token_to_req": b.token_to_req.long()}, "token_to_req has dtype"),
    (
        {},
        lambda b: {"inner_state_slot_mapping": strided(b.inner_state_slot_mapping)},
        "inner_state_slot_mapping has strides",
    ),
    (
        {},
        lambda b: {"inner_state_block_table": b.inner_state_block_table[0]},
        r"inner_state_block_table has shape \[5\]; expected \[R=5, M\]",
    ),
    (
        {},
        lambda b: {"inner_state_cache": b.inner_state_cache.bfloat16()},
        "inner_state_cache has dtype",
    ),
    (
        {},
        lambda b: {"inner_state_cache": b.inner_state_cache[:, :3]},
        r"inner_state_cache has pages of 3 tokens; expected one of \(2, 4, 8\)",
    ),
    ({}, lambda b: {"k_slot_mapping": b.k_slot_mapping.int()}, "k_slot_mapping has dtype"),
    (
        {},
        lambda b: {"k_cache": b.k_cache.view(torch.int8)},
        "k_cache has dtype torch.int8; expected torch.uint8",
    ),
    (
        {},
        lambda b: {"k_cache": b.k_cache[:, :32]},
        r"k_cache has shape .*; expected \[k_pages=3, 64, 132\]",
    ),
    ({}, lambda b: {"k_cache": strided(b.k_cache)}, "k_cache has strides"),
    (
        {},
        lambda b: {"k_scale_cache": torch.zeros(1)},
        "k_scale_cache must be None: the pages of k_format 'fp8_pow2'",
    ),
    (
        {},
        lambda b: {"k_format": "fp9"},
        "k_format is 'fp9'; the formats are 'fp8_pow2', 'int8_hadamard', 'fp8_amax'",
    ),
    ({}, lambda b: {"kv_score": None}, "kv_score is None"),
    (
        INT8,
        lambda b: {"k_scale_cache": None},
        "k_scale_cache is None, but the op and this k_format need it",
    ),
    (
        INT8,
        lambda b: {"k_scale_cache": b.k_scale_cache[:, :4]},
        r"k_scale_cache has shape .*; expected \[k_pages=3, bs=16\]",
    ),
    (INT8, lambda b: {"k_scale_cache": b.k_scale_cache.double()}, "k_scale_cache has dtype"),
    (INT8, lambda b: {"k_format": "fp8_pow2"}, "k_scale_cache must be None"),
]

VALUES = [
    (
        "inner_state_slot_mapping",
        5,
        -2,
        r"inner_state_slot_mapping\[5\] = -2 \(request 0, position 13\).* -1 .* less than 40",
    ),
    ("inner_state_slot_mapping", 5, 40, r"inner_state_slot_mapping\[5\] = 40"),
    (
        "k_slot_mapping",
        7,
        -2,
        r"k_slot_mapping\[7\] = -2 \(request 0, position 15\).* less than 192",
    ),
    ("k_slot_mapping", 4, 192, r"k_slot_mapping\[4\] = 192"),
    (
        "positions",
        5,
        -1,
        r"positions\[5\] = -1 \(request 0\).* less than 512, the rows of cos_sin_cache",
    ),
    ("positions", 5, 512, r"positions\[5\] = 512"),
    (
        "token_to_req",
        5,
        1,
        r"token_to_req\[5\] = 1 \(position 13\).* less than 1, the rows of inner_state_block_table",
    ),
    ("token_to_req", 5, -1, r"token_to_req\[5\] = -1"),
    (
        "inner_state_block_table",
        (0, 1),
        0,
        r"page 0 for position 4 of request 0, .* token 3 closes \(position 11\).* less than 10",
    ),
    ("inner_state_block_table", (0, 1), 10, r"page 10 for position 4"),
    ("inner_state_block_table", (0, 1), -1, r"page -1 for position 4"),
]


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize("options, change, message", METADATA, ids=[m for *_, m in METADATA])
def test_broken_metadata_is_named(options, change, message, impl):
    batch = make_batch([(0, 16)], **options)
    before = batch.clone()
    with pytest.raises(ContractError, match=message):
        replace(batch, **change(batch)).compress(impl)
    assert_identical(batch, before)


def test_a_tensor_on_another_device_is_named():
    batch = make_batch([(0, 16)])
    mixed = replace(batch, ape=batch.ape.to("meta"))
    with pytest.raises(ContractError, match="ape is on meta; expected cpu, the device of kv_score"):
        mixed.compress("cpu")


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize(
    "argument, index, value, message", VALUES, ids=[f"{a}={v}" for a, _, v, _ in VALUES]
)
def test_a_broken_value_is_named_and_nothing_is_written(argument, index, value, message, impl):
    batch = make_batch([(8, 17)])
    getattr(batch, argument)[index] = value
    before = batch.clone()
    with pytest.raises(ContractError, match=message):
        batch.compress(impl)
    assert_identical(batch, before)


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
@pytest.mark.parametrize("columns", (0, 1))
def test_a_table_that_is_too_narrow_for_a_window_is_named(impl, columns):
    batch = make_batch([(8, 4)])
    narrow = replace(batch, inner_state_block_table=batch.inner_state_block_table[:, :columns])
    message = rf"has {columns} columns, but the window that token 3 closes .* needs column 1 "
    with pytest.raises(ContractError, match=message):
        narrow.compress(impl)


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_freed_table_entries_are_legal_until_a_window_needs_them(impl):
    batch = make_batch([(8, 17)])
    batch.inner_state_block_table[:, 3:] = 0  # positions 12.. are rows of this call
    batch.compress(impl)


@pytest.mark.parametrize("seed", range(150))
def test_every_implementation_reports_the_same_first_violation(seed):
    pick = random.Random(seed)
    batch = make_batch([(8, 17), (0, 6), (21, 3)], padding=2, page=pick.choice((2, 4, 8)))
    table = batch.inner_state_block_table
    for _ in range(pick.randrange(1, 4)):
        token = pick.randrange(len(batch.positions))
        argument, values = pick.choice(
            (
                ("inner_state_slot_mapping", (-2, -1, 10**6, 0, 2**62)),
                ("k_slot_mapping", (-2, -1, 10**6, 3, -(2**62))),
                ("positions", (-1, 3, 7, 511, 512, 2**62, -(2**62))),
                ("token_to_req", (-1, 0, 1, 2, 3, 2**31 - 1)),
                ("inner_state_block_table", (-1, 0, 1, 10**6)),
            )
        )
        index = (
            (pick.randrange(3), pick.randrange(table.shape[1]))
            if argument.endswith("table")
            else token
        )
        getattr(batch, argument)[index] = pick.choice(values)
    if pick.random() < 0.2:
        batch = replace(batch, inner_state_block_table=table[:, : pick.randrange(4)])
    expected = outcome(batch.clone(), batch, "reference")
    if isinstance(expected, Batch):
        assert_close(outcome(batch.clone(), batch, "cpu"), expected, f"seed {seed}")
    else:
        for impl in IMPLS_WHERE_ROWS_ARE_UNIQUE:
            assert outcome(batch.clone(), batch, impl) == expected, f"seed {seed}, {impl}"


def outcome(batch: Batch, before: Batch, impl: str) -> Batch | str:
    try:
        return batch.compress(impl)
    except ContractError as error:
        assert_identical(batch, before)
        return str(error)


def test_an_unknown_impl_lists_those_for_the_device_and_the_format():
    batch = make_batch([(0, 4)])
    unknown = (
        "impl 'triton' is not one for device 'cpu' and k_format 'fp8_pow2'; "
        "available by name: cpu, reference"
    )
    with pytest.raises(UserError, match=unknown):
        batch.compress("triton")
    elsewhere = (
        "impl 'cpu' is not one for device 'cuda' and k_format 'fp8_pow2'; "
        "available by name: reference"
    )
    with pytest.raises(UserError, match=elsewhere):
        ops.prepare("cpu", "cuda", "fp8_pow2")
    with pytest.raises(
        UserError,
        match="there is no default impl for device 'cuda' .*; available by name: reference",
    ):
        ops.prepare(None, "cuda", "fp8_pow2")


def test_a_format_that_the_default_implementation_lacks_is_refused_by_name():
    batch = make_batch([(0, 4)], k_format="fp8_amax")
    without = (
        "there is no default impl for device 'cpu' and k_format 'fp8_amax'; "
        "available by name: reference"
    )
    with pytest.raises(UserError, match=without):
        batch.compress()
    batch.compress("reference")


def test_layout_h_and_the_contract_hold_the_same_numbers():
    numbers = {
        "kHeadDim": contract.HEAD_DIM,
        "kRatio": contract.RATIO,
        "kWindow": contract.WINDOW,
        "kKvWidth": contract.KV_WIDTH,
        "kRowWidth": contract.ROW_WIDTH,
        "kRopeDim": contract.ROPE_DIM,
        "kFp8PageEntries": contract.FP8_PAGE_ENTRIES,
        "kFp8ScaleOffset": contract.FP8_SCALE_OFFSET,
        "kAmaxMin": f"{contract.AMAX_MIN}f",
        "kFp8Max": f"{contract.FP8_MAX}f",
        "kInt8Max": f"{contract.INT8_MAX}f",
        "kDsMlaBlock": contract.DS_MLA_BLOCK,
        "kDsMlaDataBytes": contract.DS_MLA_DATA_BYTES,
        "kDsMlaDataBytes + kDsMlaScaleBytes": contract.DS_MLA_ENTRY_BYTES,
        "kDsMlaScaleMin": f"{contract.DS_MLA_SCALE_MIN}f",
    }
    for geometry, name in zip(contract.GEOMETRIES, ("Indexer", "Main4", "Main128"), strict=True):
        numbers |= {
            f"{name}::kHeadDim": geometry.head_dim,
            f"{name}::kRatio": geometry.ratio,
            f"{name}::kWindow": geometry.window,
            f"{name}::kOverlap": int(geometry.overlap),
            f"{name}::kKvWidth": geometry.kv_width,
            f"{name}::kRowWidth": geometry.row_width,
        }
    layout = Path(__file__).parents[2] / "csrc" / "layout.h"
    lines = [f"static_assert({name} == {number});" for name, number in numbers.items()]
    source = "\n".join([f'#include "{layout}"', "using namespace dsv4;", *lines])
    command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    derived = {"kDsMlaCodes", "kDsMlaBlocks", "kDsMlaScaleBytes", "kOverlap"}
    named = set(re.findall(r"constexpr \w+ (k\w+) =", layout.read_text()))
    assert named - derived == {name for name in numbers if name.isidentifier()}
