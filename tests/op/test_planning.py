"""A plan: the same from every implementation, right for every layer, and refused where it does not
fit."""

import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import pytest
import torch

from batches import assert_identical, make_batch, random_case
from vllm_dsv4_indexer import contract, ops
from vllm_dsv4_indexer.contract import (
    EARLY,
    LATE,
    NO_WINDOW,
    ContractError,
    Extents,
    Geometry,
    Layer,
    Plan,
    PlanHeader,
    Requests,
    Step,
    arguments_of,
)
from vllm_dsv4_indexer.ops import arguments, cpu

IMPLS = ("reference", "cpu")
CSRC = Path(__file__).parents[2] / "csrc"
MIXED = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (0, 3), (62, 41)]


@pytest.mark.parametrize("seed", range(40))
def test_the_native_plan_is_that_of_the_reference(seed):
    pick = random.Random(seed)
    batch = make_batch(**random_case(pick))
    saved = (batch.inner_state_slot_mapping >= 0).nonzero()[:, 0].tolist()
    if pick.random() < 0.3:  # a slot twice
        tokens = pick.choices(saved, k=2)
        batch.inner_state_slot_mapping[tokens] = batch.inner_state_slot_mapping[tokens[0]].clone()
    if pick.random() < 0.3:  # a K slot at any position
        batch.k_slot_mapping[pick.choice(saved)] = 0
    native, reference = (Plan.of(batch.plan(impl)) for impl in ("cpu", "reference"))
    for name in Plan._fields[:-1]:
        assert torch.equal(getattr(native, name), getattr(reference, name)), f"{name}, seed {seed}"
    early = native.windows == EARLY
    assert torch.equal(native.sources[early], reference.sources[early]), f"sources, seed {seed}"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_later_token_in_the_slot_hides_no_token_at_the_window_s_position(impl):
    batch = make_batch([(0, 16), (16, 8), (40, 1)], prefixes={1: (0, 16)})
    batch.inner_state_slot_mapping[-1] = batch.inner_state_slot_mapping[12]
    assert Plan.of(batch.plan(impl)).sources[19].tolist() == [12, 13, 14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_plan_serves_every_layer(impl):
    """Layers differ in weights, caches and where these lie; the step is the same."""
    layers = [make_batch(MIXED, seed=0, layout=layout) for layout in ("dense", "padded", "vllm")]
    layers = [replace(layer, **layers[0].call.step._asdict()) for layer in layers]
    for scale, layer in enumerate(layers):
        layer.kv_score.mul_(1 + scale)
    plan = layers[0].plan(
        impl, Extents(*map(min, *(Extents.of(layer.call.layer) for layer in layers)))
    )
    for layer in layers:
        expected = layer.clone().compress(impl)
        assert_identical(layer.run_planned(plan, impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_plan_outlives_the_tensors_that_it_was_made_from(impl):
    batch = make_batch(MIXED)
    expected, plan = batch.clone().compress(impl), batch.plan(impl)
    for tensor in batch.call.step:
        tensor.fill_(-7)
    assert_identical(batch.run_planned(plan, impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_plan_is_replayed_from_a_buffer_that_is_refreshed_in_place(impl):
    """As a captured graph does."""
    first, second = (
        make_batch(MIXED, seed=1),
        make_batch([(5, 9), (0, 130), (67, 1), (128, 3), (7, 1), (4, 3), (62, 41)]),
    )
    buffer = first.plan(impl).clone()
    first.run_planned(buffer, impl)
    buffer.copy_(second.plan(impl))
    assert_identical(second.clone().run_planned(buffer, impl), second.clone().compress(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sections_say_what_the_step_is(impl):
    batch = make_batch([(4, 12)], padding=2)
    plan = Plan.of(batch.plan(impl))
    assert PlanHeader.of(plan.header) == PlanHeader(
        contract.PLAN_LAYOUT,
        14,
        entries=3,
        early=1,
        unique=1,
        saved=12,
        shared=0,
        **Extents.of(batch.call.layer)._asdict(),
    )
    assert plan.windows.tolist() == [0, 0, 0, EARLY, 0, 0, 0, LATE, 0, 0, 0, LATE, 0, 0]
    assert torch.equal(plan.k_slots, batch.k_slot_mapping)


WRONG = [
    (lambda b, p: (b.take(slice(0, 12)), p), "plan has 224 numbers; expected 172 for 12 tokens"),
    (lambda b, p: (b, p.int()), "plan is torch.int32"),
    (
        lambda b, p: (b, torch.zeros_like(p)),
        "plan was not made for this implementation by this version's `plan`",
    ),
    (lambda b, p: (b, p.to("meta")), "plan is on meta; expected cpu"),
    (
        lambda b, p: (replace(b, cos_sin_cache=b.cos_sin_cache[:20]), p),
        "plan is for caches of max_pos 512, .* have 20",
    ),
    (
        lambda b, p: (replace(b, inner_state_cache=b.inner_state_cache[:3]), p),
        "of state_pages 7, .* have 3",
    ),
    (lambda b, p: (replace(b, k_cache=b.k_cache[:1]), p), "of k_entries 192, .* have 64"),
    (
        lambda b, p: (replace(b, inner_state_cache=b.inner_state_cache[:, :2]), p),
        "of state_page 4, .* have 2",
    ),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change, message", WRONG, ids=[m for _, m in WRONG])
def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_written(impl, change, message):
    batch = make_batch([(0, 16)])
    before = batch.clone()
    changed, plan = change(batch, batch.plan(impl))
    with pytest.raises(ContractError, match=message):
        changed.run_planned(plan, impl)
    assert_identical(batch, before)


@pytest.mark.parametrize(
    "impl, other", [("cpu", "scatter_pool"), ("scatter_pool", "cpu"), ("scatter_pool", "reference")]
)
def test_a_plan_of_a_baseline_is_for_baselines_alone(impl, other):
    batch = make_batch([(0, 16)])
    with pytest.raises(ContractError, match="for this implementation"):
        batch.run_planned(batch.plan(impl), other)


def test_a_layer_whose_tensor_has_moved_is_followed():
    batch, other = make_batch(MIXED), make_batch(MIXED, seed=5)
    bound = ops.BoundLayer(batch.call.layer)
    plan = batch.plan("cpu")
    bound.run(batch.kv_score, plan)
    batch.ape.data = other.ape.clone()  # as weights that are loaded again may come
    bound.run(batch.kv_score, plan)
    expected = make_batch(MIXED).compress()
    expected.ape.copy_(other.ape)
    assert_identical(batch, expected.compress())


def test_without_memory_for_the_plan_the_native_code_says_so_and_the_process_goes_on():
    """The look-up of so many tokens takes more memory than the process may have."""
    code = """
import ctypes, resource
from vllm_dsv4_indexer.ops import cpu
library, violation = cpu.native().library, cpu.Violation()
step = cpu.STEP.pack(1 << 32, *[0] * (len(cpu.STEP_FIELDS) - 1))
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
made = library.dsv4_indexer_plan(step, 4, cpu.ROW_RULE, 0, ctypes.byref(violation))
print(made == cpu._NO_MEMORY)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"


def test_without_memory_for_the_plan_nothing_is_written(monkeypatch):
    batch = make_batch([(0, 16)])
    before = batch.clone()
    library = type("Library", (), {"dsv4_indexer_plan": staticmethod(lambda *_: cpu._NO_MEMORY)})
    monkeypatch.setattr(cpu, "native", lambda native=cpu.native(): native._replace(library=library))
    with pytest.raises(
        MemoryError, match="no memory for the plan of 16 tokens; nothing was written"
    ):
        batch.compress("cpu")
    assert_identical(batch, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "extents, message",
    [
        ({"state_page": 0}, r"state_page is 0; expected one of \(2, 4, 8\)"),
        ({"state_page": 3}, "state_page is 3; expected one of"),
        ({"state_pages": -1}, "state_pages is -1; expected at least 0"),
        ({"k_entries": -64}, "k_entries is -64; expected at least 0"),
    ],
)
def test_extents_that_no_cache_has_are_refused(impl, extents, message):
    batch = make_batch([(0, 16)])
    with pytest.raises(ContractError, match=message):
        batch.plan(impl, Extents.of(batch.call.layer)._replace(**extents))


REQUESTS = {
    "query_start_loc": torch.tensor([0, 3, 9], dtype=torch.int32),
    "start_pos": torch.tensor([5, 0], dtype=torch.int32),
    "state_block_table": torch.ones(2, 4, dtype=torch.int32),
    "k_block_table": torch.ones(2, 4, dtype=torch.int32),
}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"query_start_loc": torch.tensor([0, 3, 9])},
            "query_start_loc has dtype torch.int64; expected torch.int32",
        ),
        (
            {"query_start_loc": REQUESTS["query_start_loc"][:2]},
            "query_start_loc has 2 elements; expected 3, one more",
        ),
        (
            {"state_block_table": torch.ones(3, 4, dtype=torch.int32)},
            r"state_block_table has shape \[3, 4\]; expected \[R=2",
        ),
        (
            {"k_block_table": torch.ones(2, 4)},
            "k_block_table has dtype torch.float32; expected torch.int32",
        ),
        (
            {"slot_mapping": torch.zeros(8, dtype=torch.int32)},
            "slot_mapping has 8 elements for 9 tokens",
        ),
        ({"start_pos": REQUESTS["start_pos"].to("meta")}, "start_pos is on meta; expected cpu"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_requests_that_no_kernel_could_read_are_refused(change, message):
    with pytest.raises(ContractError, match=message):
        ops.plan_requests(
            Requests(**REQUESTS | change), 9, Extents(9, 4, 640, 100), 64, impl="reference"
        )


def fields_of(header: str, struct: str) -> list[tuple[str, str]]:
    """Type and name of the struct's fields, in order."""
    body = re.search(rf"struct {struct} {{(.*?)\n}};", (CSRC / header).read_text(), re.DOTALL)[1]
    return re.findall(r"^\s*([\w ]+?[ *]+)(\w+);", re.sub(r"//.*", "", body), re.MULTILINE)


@pytest.mark.parametrize(
    "struct, names, packed",
    [
        ("StepArguments", arguments.STEP_FIELDS, cpu.STEP),
        ("LayerArguments", arguments.LAYER_FIELDS, cpu.LAYER),
        ("KvScore", arguments.KV_SCORE_FIELDS, cpu.KV_SCORE),
        ("Violation", tuple(name for name, _ in cpu.Violation._fields_), None),
    ],
)
def test_abi_h_has_the_fields_that_python_fills_in_the_same_order_and_width(struct, names, packed):
    fields = fields_of("cpu/abi.h", struct)
    assert tuple(name for _, name in fields) == names
    codes = ["d" if kind.strip() == "double" else "q" for kind, _ in fields]
    assert all(
        kind.strip() in ("double", "int64_t") or kind.strip().endswith("*") for kind, _ in fields
    )
    if packed:
        assert "".join(codes) == re.sub(r"(\d+)(\w)", lambda m: int(m[1]) * m[2], packed.format)


@pytest.mark.parametrize("struct, tensors", [("StepArguments", Step), ("LayerArguments", Layer)])
def test_abi_h_points_to_the_types_of_the_contract(struct, tensors):
    """The K caches' is their format's."""
    pointers = [kind.strip(" *") for kind, _ in fields_of("cpu/abi.h", struct) if "*" in kind]
    types = {(torch.int32,): "int32_t", (torch.int64,): "int64_t", (torch.float32,): "float"}
    declared = [types.get(dtypes, "void") for _, dtypes, *_ in arguments_of(tensors).values()]
    k_caches = ["void"] * (len(tensors._fields) - len(declared))
    assert [kind.removeprefix("const ") for kind in pointers] == declared + k_caches


@pytest.mark.parametrize("fields", (Geometry, Step, Extents, Requests, PlanHeader, Plan))
def test_the_contract_says_what_each_field_is(fields):
    for name, hint in get_type_hints(fields, include_extras=True).items():
        assert get_origin(hint) is Annotated, name
        (meaning,) = hint.__metadata__
        assert meaning if hint.__origin__ is int else meaning.meaning, name


@pytest.mark.parametrize("tokens", (0, 1, 9))
def test_the_sections_of_a_plan_are_those_of_the_contract(tokens):
    plan = Plan.of(make_batch([(7, 9)]).take(slice(tokens)).plan())
    numbers = {"T": tokens, "window": contract.WINDOW}
    for name, (sizes, dtypes, *_) in arguments_of(Plan).items():
        section = getattr(plan, name)
        assert section.shape == tuple(numbers.get(size, size) for size in sizes), name
        assert (section.dtype, section.is_contiguous()) == (*dtypes, True), name


def test_plan_h_has_the_layout_of_the_contract():
    text = (CSRC / "plan.h").read_text()
    assert tuple(name for _, name in fields_of("plan.h", "PlanHeader")) == PlanHeader._fields
    assert {kind for kind, _ in fields_of("plan.h", "PlanHeader")} == {"int64_t "}
    assert PlanHeader._fields[-len(Extents._fields) :] == Extents._fields
    numbers = dict(re.findall(r"constexpr \w+ (k\w+) = ([^;]+);", text))
    assert int(numbers["kPlanLayout"], 16) == contract.PLAN_LAYOUT == -contract.STATE_ONLY_LAYOUT
    expected = (
        contract.PLAN_HEADER,
        contract.PLAN_SECTIONS,
        NO_WINDOW,
        EARLY,
        LATE,
        contract.MASKED,
    )
    assert (
        tuple(
            int(numbers[name])
            for name in ("kPlanHeader", "kPlanSections", "kNoWindow", "kEarly", "kLate", "kMasked")
        )
        == expected
    )
    sections = re.findall(
        r"plan_(\w+)\(int64_t ?\w*\) { return kPlanHeader(?: \+ (?:(\d) \* )?(tokens))?", text
    )
    assert [name for name, *_ in sections] == list(Plan._fields[1:])
    assert [int(times or bool(tokens)) for _, times, tokens in sections] == list(range(6))
