"""The AscendC kernels, run by the emulation, against the reference.

State rows are equal bit for bit. The sums of an entry are taken in another order than torch's, so
that now and then a channel is rounded to the other bfloat16; the whole entry, rotated, then differs
by a little: codes of int8 by one.

An entry of bf16 is not rotated. Of its channels those alone differ that were rounded to the other
bfloat16, by one step; or, where the rows of a window cancel, by 2^-20 of the entry's largest.
"""

import random
from dataclasses import replace

import pytest
import torch

from batches import (
    MAIN_4,
    MAIN_128,
    TIES,
    assert_close,
    assert_identical,
    assert_same_caches,
    far_apart,
    make_batch,
    on_ties,
    one_after_the_other,
)
from batches import random_case as random_op_case
from emulator import A2, A2_NAME, A5, A5_NAME
from steps import SHARED, shared_batch
from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import (
    FP8_MAX,
    HEAD_DIM,
    INDEXER,
    ContractError,
    Extents,
    plan_size,
)
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.ops import ascend

STARTS = (*range(10), 63, 64, 65, 127, 128, 129)
LENGTHS = (*range(1, 10), 127, 128, 129)
MIXED = [(5, 9), (0, 130), (67, 1), (128, 3), (3, 1), (0, 3), (62, 41)]
CASES, CASES_PER_TEST = 3000, 250
# Of vLLM Ascend, in K entries; a state page has a sixteenth as many rows.
BLOCK_SIZES = (128, 64, 32)
FORMATS = (
    {"k_format": "int8_hadamard", "scale_dtype": torch.float16},
    {"k_format": "int8_hadamard", "scale_dtype": torch.float32},
    {"k_format": "fp8_amax"},
)
MAIN = {"geometry": MAIN_4, "k_format": "bf16"}
EVERY = (*FORMATS, MAIN)


def product_of(options: dict) -> str:
    return A5_NAME if options["k_format"] == "fp8_amax" else A2_NAME


class Comparison:
    """Counts how many entries differ from the reference's, and fails where one differs by too
    much. One of 512 channels counts as four."""

    def __init__(self):
        self.entries = self.different = self.rescaled = 0

    def add(self, actual, expected, case) -> None:
        slots = expected.k_slot_mapping[expected.k_slot_mapping >= 0]
        written = slots // expected.k_cache.shape[1], slots % expected.k_cache.shape[1]
        pairs = zip(actual.entries(), expected.entries(), strict=True)
        if expected.k_format == "bf16":
            size = 2 * HEAD_DIM
            parts = [(a[i:][:size], b[i:][:size]) for a, b in pairs for i in range(0, len(a), size)]
            self.entries += len(parts)
            self.different += sum(a != b for a, b in parts)
            assert_close(actual, expected, case)
            return
        self.entries += len(slots)
        for a, b in pairs:
            self.different += a[:HEAD_DIM] != b[:HEAD_DIM]
            self.rescaled += a[HEAD_DIM:] != b[HEAD_DIM:]
        if expected.k_format == "int8_hadamard":
            assert_close(actual, expected, case, scale_rtol=1e-2)
            return
        # Small values have small steps of fp8: a value is one code away, or by a little of the
        # entry's largest.
        apart = (actual.ordered_codes() - expected.ordered_codes())[written].abs()
        values = [
            b.codes()[written].view(torch.float8_e4m3fn).float() * b.scales()[written][:, None]
            for b in (actual, expected)
        ]
        error = (values[0] - values[1]).abs() / (expected.scales()[written][:, None] * FP8_MAX)
        assert ((apart <= 1) | (error <= 1 / 256)).all(), case
        torch.testing.assert_close(
            actual.scales()[written], expected.scales()[written], rtol=1e-2, atol=0
        )
        blended = actual.clone()
        blended.codes()[written] = expected.codes()[written]
        blended.scales()[written] = expected.scales()[written]
        assert_identical(blended, expected, case)

    def judge(self, codes: float, scales: float) -> None:
        assert self.entries
        assert self.different <= codes * self.entries, (
            f"codes of {self.different} of {self.entries} entries differ"
        )
        assert self.rescaled <= scales * self.entries, (
            f"scales of {self.rescaled} of {self.entries} entries differ"
        )


def compare(
    emulation, cases: list[dict], codes: float = 0.01, scales: float = 0.01, **machine
) -> None:
    comparison = Comparison()
    for case in cases:
        batch = make_batch(**case)
        emulation.use(**{"product": product_of(case), **machine})
        comparison.add(
            batch.clone().compress("ascend"), batch.compress("reference"), f"{case}, {machine}"
        )
    comparison.judge(codes, scales)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_every_start_and_length_equals_the_reference(ascend_emulation, options):
    cases = [
        {"requests": [(s, n) for n in LENGTHS], "seed": s, "k_page": 128, **options} for s in STARTS
    ]
    compare(ascend_emulation, cases)


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_mixed_batch_in_the_layout_of_each_block_size_equals_the_reference(
    ascend_emulation, options, block_size
):
    layout = {"k_page": block_size, "page": block_size // 16, "layout": "ascend"}
    compare(
        ascend_emulation,
        [{"requests": MIXED, "seed": s, "padding": 5, **layout, **options} for s in range(20)],
    )


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_the_number_and_the_order_of_the_cores_change_no_byte(ascend_emulation, options):
    batch = make_batch(MIXED, k_page=32, padding=5, **options)
    ascend_emulation.use(product_of(options), cores=1)
    one = batch.clone().compress("ascend")
    for cores in range(2, 49):
        ascend_emulation.use(product_of(options), cores=cores, order=cores)
        assert_identical(batch.clone().compress("ascend"), one, f"{cores} cores")


@pytest.mark.parametrize("vector_cores", (1, 7, 40, 48))
def test_the_host_gives_every_token_to_a_core_and_no_core_is_idle(ascend_emulation, vector_cores):
    for tokens in (1, 3, 4, 5, 127, 128, 1000, 8192, 49151, 49152, 100001):
        per_core, cores = ascend_emulation.cut(tokens, vector_cores)
        assert (cores - 1) * per_core < tokens <= cores * per_core and cores <= vector_cores
        # Sixteens of entries where there are many.
        assert per_core % (64 if tokens >= 64 * 16 * vector_cores else 4) == 0


@pytest.mark.parametrize("options", FORMATS[:1], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_decode_step_for_each_position_in_a_page_equals_the_reference(
    ascend_emulation, options, block_size
):
    requests = [(start, 1) for start in range(40)] + [(start, 2) for start in range(8)]
    compare(
        ascend_emulation,
        [{"requests": requests, "k_page": block_size, "page": block_size // 16, **options}],
    )


@pytest.mark.parametrize("cores", (1, 2))
def test_a_core_with_more_tokens_than_it_holds_metadata_of_equals_the_reference(
    ascend_emulation, cores
):
    requests = [(0, 401), (7, 300), (3, 450), *((start, 1) for start in range(300))]
    case = {"requests": requests, "k_format": "int8_hadamard", "k_page": 128, "page": 8}
    compare(ascend_emulation, [case], cores=cores)


@pytest.mark.parametrize("page", (2, 4, 8))
@pytest.mark.parametrize("name", SHARED)
def test_a_prefix_that_the_call_fills_stores_what_it_would_one_after_the_other(
    ascend_emulation, name, page
):
    """Also without a conflict between cores: the emulation would refuse the call."""
    for options in (FORMATS[0], MAIN) if page < 8 else EVERY:
        batch = shared_batch(name, page=page, padding=3, k_page=32, **options)
        ascend_emulation.use(product_of(options), cores=11, order=page)
        together = batch.clone().compress("ascend")
        assert_identical(together, one_after_the_other(batch.clone(), "ascend"), name)
        comparison = Comparison()
        comparison.add(together, batch.compress("reference"), name)
        comparison.judge(0.05, 0.05)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_shared_prefixes_store_what_they_would_one_after_the_other(ascend_emulation, first):
    for seed in range(first, first + 50):
        pick = random.Random(seed)
        options = pick.choice((FORMATS[0], MAIN))
        fixed = {
            "ring": None,
            "layout": "dense",
            "kv_dtype": torch.float32,
            "k_page": 32,
            **options,
        }
        batch = make_batch(**random_op_case(pick, options.get("geometry", INDEXER)) | fixed)
        ascend_emulation.use(cores=pick.randrange(1, 49), order=seed)
        assert_identical(
            batch.clone().compress("ascend"), one_after_the_other(batch, "ascend"), seed
        )


def test_a_prefix_in_pages_that_were_another_s_stores_what_it_would_one_after_the_other(
    ascend_emulation,
):
    """Recycled: the pages that the call fills hold an earlier request's rows."""
    ascend_emulation.use(cores=7)
    batch = shared_batch("one sharer", page=8, k_page=32, **FORMATS[0])
    replace(batch, kv_score=torch.randn_like(batch.kv_score)).compress("ascend")
    assert_identical(batch.clone().compress("ascend"), one_after_the_other(batch, "ascend"))


@pytest.mark.parametrize("options", FORMATS[1:], ids=str)
@pytest.mark.parametrize("algorithm", ["overlay_scan", "scatter_pool"])
def test_the_algorithms_for_comparison_store_the_same(ascend_emulation, options, algorithm):
    for seed, page in enumerate((2, 4, 8)):
        batch = make_batch(MIXED, seed=seed, page=page, k_page=32, **options)
        ascend_emulation.use(product_of(options), cores=7)
        expected = batch.clone().compress("ascend")
        call = batch.call
        plan = ascend.plan(call.step, Extents.of(call.layer), algorithm=algorithm)
        ascend.bind(call.layer, eps=1e-6, k_format=batch.k_format, algorithm=algorithm)(
            call.kv_score, plan
        )
        assert_identical(batch, expected)


def test_the_op_says_that_entries_on_a_device_are_not_counted(ascend_emulation):
    ascend_emulation.use()
    before = replace(ops.work)
    make_batch([(0, 8)], k_format="int8_hadamard", k_page=32).compress("ascend")
    assert (ops.work.calls, ops.work.entries) == (before.calls + 1, before.entries)
    assert f"not counting {before.uncounted + 1} calls whose entries only the device knows" in str(
        ops.work
    )


@pytest.mark.parametrize("options", (FORMATS[1], MAIN), ids=str)
def test_chunks_of_a_prompt_store_the_same_bytes_as_the_whole(ascend_emulation, options):
    whole = make_batch([(0, 150)], k_page=32, **options)
    cut = whole.clone()
    ascend_emulation.use()
    for begin, end in ((0, 1), (1, 7), (7, 70), (70, 73), (73, 150)):
        cut.take(slice(begin, end)).compress("ascend")
    assert_identical(cut, whole.compress("ascend"))


def random_case(pick: random.Random) -> tuple[dict, dict]:
    """A batch and a machine. `pick` decides everything. It is not the op's random case: an NPU has
    no rings, no projection in bf16, and pages and formats of its own."""
    lengths = pick.choice(((1,), (1, 2, 3, 4, 5), (1, 7, 30, 90), (128, 200)))
    requests = [
        (pick.choice((0, pick.randrange(10), pick.randrange(300))), pick.choice(lengths))
        for _ in range(pick.choice((1, 2, 5, 9) if max(lengths) < 128 else (1, 2)))
    ]
    block_size = pick.choice(BLOCK_SIZES)
    case = {
        "requests": requests,
        "seed": pick.randrange(1 << 30),
        "page_seed": pick.randrange(1 << 30),
        "page": pick.choice((2, 4, 8)),
        "k_page": block_size,
        "layout": pick.choice(("dense", "padded")),
        "norm_dtype": pick.choice((torch.bfloat16, torch.float32)),
        "padding": pick.choice((0, 0, 1, 6)),
        **pick.choice(EVERY),
        "eps": pick.choice((1e-6, 0.3)),
        "extreme": pick.random() < 0.2,
        "gaps": pick.random() < 0.4,
    }
    if pick.random() < 0.4:
        case |= {"page": block_size // 16, "layout": "ascend"}
    machine = {"cores": pick.randrange(1, 49), "order": pick.randrange(1 << 30)}
    return case, machine


@pytest.mark.parametrize("first", range(0, CASES, CASES_PER_TEST))
def test_random_batches_equal_the_reference(ascend_emulation, first):
    comparison = Comparison()
    for seed in range(first, first + CASES_PER_TEST):
        case, machine = random_case(random.Random(seed))
        batch = make_batch(**case)
        ascend_emulation.use(product_of(case), **machine)
        repeat = f"random_case(random.Random({seed})): {case}, {machine}"
        try:
            comparison.add(batch.clone().compress("ascend"), batch.compress("reference"), repeat)
        except ContractError as error:
            raise AssertionError(repeat) from error
    comparison.judge(0.01, 0.01)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_a_last_bit_in_exp_div_and_sqrt_turns_few_entries(ascend_emulation, options):
    cases = [{"requests": [(0, 400)], "seed": seed, "k_page": 128, **options} for seed in range(5)]
    for noise in (1, 2):
        # An fp32 scale is itself a quotient.
        compare(ascend_emulation, cases, codes=0.1, scales=0.7, noise=noise)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_what_lies_halfway_is_rounded_to_even_as_by_the_reference(ascend_emulation, options):
    ascend_emulation.use(product_of(options), cores=3)
    for kind in TIES[options["k_format"]]:
        batch = on_ties(kind=kind, k_page=32, **options)
        assert_identical(batch.clone().compress("ascend"), batch.compress("reference"), kind)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_offsets_beyond_32_bits_change_no_byte(ascend_emulation, options):
    ascend_emulation.use(product_of(options))
    batch = far_apart(make_batch([(0, 4400), (5, 9)], max_pos=4400, k_page=32, **options))
    near = batch.clone()
    assert_same_caches(batch.compress("ascend"), near.compress("ascend"))


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_neighbouring_entries_in_two_pages_and_entry_0_are_as_good_as_others(
    ascend_emulation, options
):
    ascend_emulation.use(product_of(options), cores=1)
    batch = make_batch([(60, 100)], k_page=32, gaps=True, **options)
    expected = batch.clone().compress("ascend").entries()
    closing = batch.k_slot_mapping >= 0
    batch.k_slot_mapping[closing] = torch.tensor([0, *range(20, 44)])
    assert batch.compress("ascend").entries() == expected


@pytest.mark.parametrize("options", (FORMATS[1], MAIN), ids=str)
def test_large_gates_and_zeros_equal_the_reference(ascend_emulation, options):
    ascend_emulation.use()
    comparison = Comparison()
    batch = make_batch([(0, 64), (9, 40)], k_page=32, **options)
    batch.kv_score[:16] = 0
    batch.kv_score[20:40] *= 300
    batch.kv_score[41, :] = -0.0
    comparison.add(
        batch.clone().compress("ascend"), batch.compress("reference"), "large gates and zeros"
    )
    comparison.judge(0.01, 0.01)


def test_a_token_without_a_state_slot_counts_in_its_own_call_but_is_not_saved(ascend_emulation):
    ascend_emulation.use(cores=3)
    batch = make_batch([(4, 12)], k_format="int8_hadamard", k_page=32)
    batch.inner_state_slot_mapping[[2, 6]] = -1
    assert_close(batch.clone().compress("ascend"), batch.compress("reference"), scale_rtol=1e-2)


def test_page_0_is_not_written_and_a_window_without_a_page_is_pooled_from_its_other_rows(
    ascend_emulation,
):
    """Where the reference refuses, a kernel that must not wait goes on: as if the request had begun
    after the gap."""
    ascend_emulation.use(cores=5)
    batch = make_batch([(8, 4)], k_format="int8_hadamard", k_page=32)
    fresh = make_batch([(0, 4)], k_format="int8_hadamard", k_page=32)
    fresh.kv_score[:], fresh.ape[:], fresh.norm_weight[:] = (
        batch.kv_score,
        batch.ape,
        batch.norm_weight,
    )
    fresh.cos_sin_cache[0] = fresh.cos_sin_cache[8]
    batch.inner_state_block_table[0, 1] = 0  # the page of positions 4 to 7
    batch.inner_state_slot_mapping[:] = torch.arange(4)
    before = batch.inner_state_cache.view(torch.int32).clone()
    assert batch.compress("ascend").entries() == fresh.compress("ascend").entries()
    assert torch.equal(batch.inner_state_cache.view(torch.int32), before)


@pytest.mark.parametrize("options", (FORMATS[1], MAIN), ids=str)
def test_a_core_that_reads_a_row_that_the_call_writes_is_found(ascend_emulation, options):
    """A ring of eight rows: the condition that the kernel's lack of synchronisation rests on,
    broken."""
    ascend_emulation.use(cores=4)
    batch = make_batch([(11, 33)], page=2, ring=8, k_page=32, **options)
    with pytest.raises(
        ContractError, match="^(conflict: core|order: two transfers of one core meet)"
    ):
        batch.compress("ascend")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"k_format": "fp8_amax"},
            f"{A2_NAME}: k_format fp8_amax on this product, number 2 is not supported; supported: "
            "int8",
        ),
        (
            {"k_format": "int8_hadamard", "k_page": 16},
            f"{A2_NAME}: a K page, in entries, of 16 is not supported; supported: 32, 64 and 128",
        ),
        (
            {"k_format": "int8_hadamard", "kv_dtype": torch.bfloat16},
            "kv_score has dtype torch.bfloat16; on NPUs",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(ascend_emulation, options, message):
    ascend_emulation.use()
    batch = make_batch([(0, 8)], **options)
    before = batch.clone()
    with pytest.raises(ContractError, match=message):
        batch.compress("ascend")
    assert_identical(batch, before)


@pytest.mark.parametrize(
    "other",
    [
        lambda extents: extents._replace(state_pages=extents.state_pages + 1),
        lambda extents: extents._replace(state_page=2),
        lambda extents: extents._replace(k_entries=extents.k_entries + 1),
        lambda extents: extents._replace(max_pos=extents.max_pos + 1),
    ],
    ids=Extents._fields,
)
def test_a_plan_for_other_caches_changes_nothing(ascend_emulation, other):
    ascend_emulation.use(cores=3)
    batch = make_batch([(0, 30), (5, 9)], page=4, k_page=32, k_format="int8_hadamard")
    before, call = batch.clone(), batch.call
    run = ascend.bind(call.layer, eps=1e-6, k_format=batch.k_format)
    run(call.kv_score, ascend.plan(call.step, other(Extents.of(call.layer))))
    run(call.kv_score, ascend.plan(call.step, Extents.of(call.layer), algorithm="scatter_pool"))
    run(call.kv_score, torch.full((plan_size(39),), 7))
    assert_identical(batch, before)
    run(call.kv_score, ascend.plan(call.step, Extents.of(call.layer)))
    assert_identical(batch, before.compress("ascend"))


@pytest.mark.parametrize("launch", ("plan", "run"))
def test_what_the_runtime_says_of_a_launch_is_raised_and_is_no_user_error(ascend_emulation, launch):
    ascend_emulation.use()
    call = make_batch([(0, 8)], k_format="int8_hadamard", k_page=32).call
    plan = ascend.plan(call.step, Extents.of(call.layer))
    run = ascend.bind(call.layer, eps=1e-6, k_format="int8_hadamard")
    ascend_emulation.use(failing=True)
    with pytest.raises(RuntimeError, match="the launch of an emulated kernel failed") as error:
        ascend.plan(call.step, Extents.of(call.layer)) if launch == "plan" else run(
            call.kv_score, plan
        )
    assert not isinstance(error.value, UserError)


def test_a_format_without_a_kernel_is_refused_by_name(ascend_emulation):
    with pytest.raises(
        UserError, match="impl 'ascend' is not one for device 'cpu' and k_format 'fp8_pow2'"
    ):
        make_batch([(0, 8)]).compress("ascend")


@pytest.mark.parametrize("product, built_for", [(A5_NAME, A2), (A2_NAME, A5)])
def test_a_library_for_another_architecture_is_refused(ascend_emulation, product, built_for):
    ascend_emulation.use(product, built_for=built_for)
    with pytest.raises(
        ContractError,
        match=f"{product}: a library built for architecture {built_for} is not supported",
    ):
        make_batch([(0, 8)], k_format="int8_hadamard", k_page=32).compress("ascend")


def test_a_chip_of_the_first_generation_is_refused(ascend_emulation):
    ascend_emulation.use("Ascend910B")
    with pytest.raises(ContractError, match="Ascend910B: the product 0 is not supported"):
        make_batch([(0, 8)], k_format="int8_hadamard", k_page=32).compress("ascend")


@pytest.mark.parametrize(
    "options, name, least",
    [
        (FORMATS[1], "kv_score", 512),
        (MAIN, "kv_score", 2048),
        (FORMATS[1], "cos_sin_cache", 64),
    ],
)
def test_rows_that_lie_in_each_other_are_refused(ascend_emulation, options, name, least):
    ascend_emulation.use()
    batch = make_batch([(0, 8)], k_page=32, **options)
    rows = getattr(batch, name)
    batch = replace(batch, **{name: rows[:1].expand(len(rows), -1)})
    with pytest.raises(
        ContractError,
        match=f"a row stride of {name} of 0 is not supported; supported: {least} to 2\\^20",
    ):
        batch.compress("ascend")


# ---- the main compressor of the ratio 4 alone ----------------------------------------------------


@pytest.mark.parametrize("by_requests", (False, True))
def test_the_compressors_of_a_layer_share_a_plan(ascend_emulation, by_requests):
    ascend_emulation.use(cores=5)
    indexer, main = (make_batch(MIXED, k_page=32, **options) for options in (FORMATS[0], MAIN))
    expected = main.clone().compress("ascend")
    call, tokens = indexer.call, len(indexer.positions)
    main = replace(main, **call.step._asdict())
    extents = Extents(*map(min, Extents.of(call.layer), Extents.of(main.call.layer)))
    if by_requests:
        plan = ascend.plan_requests(indexer.requests, tokens, extents, 32)
    else:
        plan = ascend.plan(call.step, extents)
    assert main.run_planned(plan, "ascend").entries() == expected.entries()


def test_on_an_a5_it_stores_the_same(ascend_emulation):
    batch = make_batch(MIXED, k_page=32, **MAIN)
    ascend_emulation.use(A5_NAME)
    on_a5 = batch.clone().compress("ascend")
    ascend_emulation.use(A2_NAME)
    assert_identical(on_a5, batch.compress("ascend"))


def test_the_ratio_128_is_refused_by_name_and_nothing_is_written(ascend_emulation):
    ascend_emulation.use()
    batch = make_batch([(0, 128)], geometry=MAIN_128, page=8, k_page=32, k_format="bf16")
    before, call = batch.clone(), batch.call
    message = r"'bf16' \(head dimension 512 and ratio 128\); available by name: cpu, reference"
    with pytest.raises(UserError, match=message):
        batch.compress("ascend")
    run = ascend.bind(call.layer, eps=1e-6, k_format="bf16")
    message = "a ratio of 128 is not supported; supported: 4; leave layers of the ratio 128 to the "
    with pytest.raises(ContractError, match=message):
        run(call.kv_score, batch.plan("reference"))
    assert_identical(batch, before)


@pytest.mark.parametrize("algorithm", ["overlay_scan", "scatter_pool"])
def test_the_algorithms_for_comparison_are_the_indexers_alone(ascend_emulation, algorithm):
    ascend_emulation.use()
    call = make_batch([(0, 8)], k_page=32, **MAIN).call
    plan = ascend.plan(call.step, Extents.of(call.layer), algorithm=algorithm)
    run = ascend.bind(call.layer, eps=1e-6, k_format="bf16", algorithm=algorithm)
    with pytest.raises(ContractError, match=f"no algorithm {algorithm} for the head dimension 512"):
        run(call.kv_score, plan)
