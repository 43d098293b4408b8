"""The main compressors of DeepSeek-V4: head dimension 512, with the ratio 4, whose windows overlap,
and with the ratio 128, whose windows do not.

They are compared with vLLM 0.32's CPU kernels and transformers 5.19's model.
"""

import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from batches import (
    MAIN_4,
    MAIN_128,
    MAX_POSITION,
    Batch,
    assert_close,
    assert_identical,
    make_batch,
    one_after_the_other,
    random_case,
)
from vllm_dsv4_indexer import contract, ops
from vllm_dsv4_indexer.contract import (
    DS_MLA_BLOCK,
    EARLY,
    LATE,
    ContractError,
    Extents,
    Geometry,
    Plan,
)
from vllm_dsv4_indexer.entries import bf16_differ, in_order
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.ops import cpu

IMPLS = ("reference", "cpu")
FORMATS = ("fp8_ds_mla", "bf16")
CODES = 448  # of an entry, in front of its rotated channels
every_main_compressor = pytest.mark.parametrize("geometry", (MAIN_4, MAIN_128), ids=str)
every_impl = pytest.mark.parametrize("impl", IMPLS)


def main_batch(geometry: Geometry, requests: list[tuple[int, int]], **options: Any) -> Batch:
    page = 4 if geometry == MAIN_4 else 8  # as vLLM has them
    options = {"page": page, "norm_dtype": torch.float32} | options
    return make_batch(requests, geometry=geometry, **options)


# ---- against vLLM --------------------------------------------------------------------------------


def run_vllm(batch: Batch) -> Batch:
    """Scatter, then pool, as vLLM's DeepseekV4CPUCompressor does after the projection."""
    kernels = pytest.importorskip("vllm._custom_ops")
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    call, geometry = batch.call, batch.geometry
    kernels.save_partial_states_cpu(
        *call.kv_score.float().chunk(2, dim=-1),
        call.ape,
        call.positions,
        call.inner_state_cache,
        call.inner_state_slot_mapping,
    )
    window = call.positions[:, None] - geometry.window + 1 + torch.arange(geometry.window)
    gather = map_local_to_global_slots_cpu(
        window, call.token_to_req, call.inner_state_block_table, call.inner_state_cache.shape[1]
    )
    pages, k_page, _ = call.k_cache.shape
    kernels.compress_norm_rope_store_cpu(
        call.inner_state_cache,
        gather,
        call.positions,
        call.k_slot_mapping,
        call.norm_weight,
        1e-6,
        call.cos_sin_cache,
        # The whole pages, with the unused bytes behind each.
        call.k_cache.as_strided((pages, call.k_cache.stride(0)), (call.k_cache.stride(0), 1)),
        k_page,
        geometry.ratio,
    )
    return batch


REQUESTS = [(5, 9), (0, 300), (67, 1), (128, 3), (255, 1), (0, 3), (190, 141)]


@every_main_compressor
@every_impl
@pytest.mark.parametrize("layout", ("dense", "padded"))
@pytest.mark.parametrize("kv_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_byte_is_vllms(geometry, impl, layout, kv_dtype):
    """State and scales exactly; of the codes at most one in ten thousand is one apart."""
    different = total = 0
    for seed in range(6):
        batch = main_batch(geometry, REQUESTS, seed=seed, layout=layout, kv_dtype=kv_dtype)
        d, n = assert_close(batch.clone().compress(impl), run_vllm(batch.clone()), f"seed {seed}")
        different, total = different + d, total + n
    assert total and different <= 1e-4 * total


@every_main_compressor
@every_impl
@pytest.mark.parametrize("start", (0, 1, 3, 4, 63, 127, 128, 255))
def test_every_start_stores_vllms_bytes(geometry, impl, start):
    batch = main_batch(geometry, [(start, 200)], seed=start)
    different, total = assert_close(batch.clone().compress(impl), run_vllm(batch.clone()))
    assert different <= max(1, 1e-4 * total)


@every_main_compressor
@every_impl
@pytest.mark.parametrize("factor", (1e-6, 1e-2, 1e3))
def test_scales_are_vllms_at_any_size_of_the_values(geometry, impl, factor):
    """vLLM keeps the scale of a small block at 2^-13."""
    batch = main_batch(geometry, [(0, 256)])
    batch.norm_weight.mul_(factor)
    ours = batch.clone().compress(impl)
    assert_close(ours, run_vllm(batch.clone()))
    scales = ours.written().scales
    assert (scales[:, :-1] >= 127 - 13).all() and not scales[:, -1].any()
    assert (scales[:, :-1] == 127 - 13).any() == (factor < 1)


# ---- against transformers ------------------------------------------------------------------------


def transformers_compressor(geometry: Geometry) -> tuple[Any, Any]:
    """The module of this geometry, with random weights, and its caches."""
    configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    config = configuration.DeepseekV4Config(
        hidden_size=256, q_lora_rank=16, index_n_heads=1, index_topk=4
    )
    name = "CSA" if geometry.overlap else "HCA"
    torch.manual_seed(0)
    module = getattr(modeling, f"DeepseekV4{name}Compressor")(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(module.kv_norm.weight, mean=0.7, std=0.26)

    class Caches:
        layers = [getattr(modeling, f"DeepseekV4{name}Cache")(config)]

    return module.requires_grad_(False), Caches


def quantised(entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, rotated channels and scales by the logarithm's definition, not by the op's bits."""
    x = entries.bfloat16().float()
    blocks = x[:, :CODES].unflatten(-1, (-1, DS_MLA_BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-4).log2().ceil()
    codes = (blocks / scale.exp2()).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    return codes, x[:, CODES:].bfloat16(), (scale[..., 0] + 127).to(torch.uint8)


@every_main_compressor
@every_impl
@pytest.mark.parametrize("chunks", ([391], [1, 2, 30, 4, 91, 263], [127, 2, 262], [1] * 9 + [382]))
def test_entries_are_those_of_the_transformers_compressor(geometry, impl, chunks):
    """fp32 throughout; its entries are quantised here."""
    module, caches = transformers_compressor(geometry)
    batch = main_batch(geometry, [(0, sum(chunks))])
    call = batch.call
    hidden = torch.randn(sum(chunks), 256, generator=torch.Generator().manual_seed(1))
    cos, sin = module.rotary_emb(hidden, torch.arange(MAX_POSITION)[None], layer_type="compress")
    call.norm_weight.copy_(module.kv_norm.weight)
    call.ape.copy_(module.position_bias)
    call.cos_sin_cache.copy_(torch.cat([cos, sin], dim=-1)[0])
    weight = torch.cat([module.kv_proj.weight, module.gate_proj.weight])
    for tokens in torch.arange(len(hidden)).split(chunks):
        x = hidden[tokens]
        module(x[None], torch.zeros(1, len(x), 16), tokens[None], caches, 0)
        call.kv_score[tokens] = x @ weight.T
        batch.take(tokens).compress(impl)
    theirs = caches.layers[0].compressed_kv["compressor"][0]
    codes, rotated, scales = quantised(theirs)
    our_codes, our_rotated, our_scales = batch.written()
    assert torch.equal(our_scales[:, :-1], scales)
    apart = (in_order(our_codes) - in_order(codes)).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 1e-3 * codes.numel()
    torch.testing.assert_close(our_rotated.float(), rotated.float(), rtol=2**-7, atol=1e-5)


# ---- the native kernel ---------------------------------------------------------------------------


@every_main_compressor
@pytest.mark.parametrize("seed", range(40))
def test_random_batches_equal_the_reference(geometry, seed):
    """With gaps, padding, shared prefixes, rings, far gates, two eps and either format."""
    batch = make_batch(**random_case(random.Random(seed), geometry))
    actual, expected = (batch.clone().compress(impl) for impl in ("cpu", "reference"))
    different, total = assert_close(
        actual, expected, f"random_case(random.Random({seed}), {geometry!r})"
    )
    assert different <= max(2, 1e-3 * total)


def digest() -> str:
    """A fingerprint of everything that the native kernel stores."""
    from hashlib import sha256

    fingerprint = sha256()
    dtypes = (torch.float32, torch.bfloat16)
    for geometry, kv_dtype, k_format in product((MAIN_4, MAIN_128), dtypes, FORMATS):
        batch = main_batch(geometry, REQUESTS, kv_dtype=kv_dtype, k_format=k_format)
        batch.kv_score[20:24].mul_(300)  # weights that underflow
        batch.kv_score[100] = torch.nan
        batch.kv_score[101] = -torch.nan
        for storage in batch.compress("cpu").storages:
            fingerprint.update(storage.numpy().tobytes())
    return fingerprint.hexdigest()


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_every_instruction_set_stores_the_same_bytes(isa):
    if not cpu.algorithm_for(cpu.native().library, "one_pass", isa):
        pytest.skip(f"this CPU or build lacks {isa}")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    code = "import test_geometry; print(test_geometry.digest())"
    told = subprocess.check_output(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "DSV4_INDEXER_ISA": isa},
        text=True,
    )
    assert told.strip() == digest()


# ---- the rules of the op -------------------------------------------------------------------------


@every_main_compressor
@every_impl
@pytest.mark.parametrize("seed", range(8))
def test_any_chunking_stores_the_same_bytes(geometry, impl, seed):
    pick = random.Random(seed)
    pages = contract.STATE_PAGES[geometry.ratio]
    requests = [(pick.randrange(260), pick.randrange(1, 250)) for _ in range(pick.randrange(1, 4))]
    whole = main_batch(geometry, requests, seed=seed, page=pick.choice(pages))
    cut, tokens = whole.clone(), torch.arange(len(whole.positions))
    while len(tokens):
        n = pick.choice((1, 2, 5, 40, 200))
        cut.take(tokens[:n]).compress(impl)
        tokens = tokens[n:]
    assert_identical(cut, whole.compress(impl), f"seed {seed}")


@every_main_compressor
@every_impl
@pytest.mark.parametrize("threads", (1, 2, 3, 8))
def test_any_number_of_threads_stores_the_same_bytes(geometry, impl, threads, set_threads):
    """Also where a thread's share begins or ends inside a window."""
    batch = main_batch(geometry, [(3, 300), (0, 140), (5, 1), (128, 384), (0, 130)])
    set_threads(1)
    expected = batch.clone().compress(impl)
    set_threads(threads)
    assert_identical(batch.compress(impl), expected)


@every_main_compressor
@every_impl
def test_a_prefix_that_is_filled_in_the_same_call_gives_the_entries_of_calls_one_by_one(
    geometry, impl
):
    """Rule 2: some rows of a window are another request's tokens of this call."""
    requests = [(0, 256), (64, 90), (192, 80), (248, 9)]
    prefixes = {request: (0, requests[request][0]) for request in (1, 2, 3)}
    together = main_batch(geometry, requests, prefixes=prefixes)
    apart = one_after_the_other(together.clone(), impl)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1))
    tokens = [(together.token_to_req == r).nonzero()[:, 0] for r in order]
    assert_identical(together.take(torch.cat(tokens)).compress(impl), apart)


@every_main_compressor
@every_impl
def test_of_two_tokens_with_one_slot_the_last_wins(geometry, impl, set_threads):
    set_threads(2)
    batch = main_batch(geometry, [(0, 300), (5, 140)])
    for slots in (batch.inner_state_slot_mapping, batch.k_slot_mapping):
        used = (slots >= 0).nonzero()[:, 0]
        slots[used[0]] = slots[used[-1]]
    different, total = assert_close(batch.clone().compress(impl), batch.compress("reference"))
    assert different <= max(1, 1e-4 * total)


@every_main_compressor
@every_impl
@pytest.mark.parametrize("none", [-1, 1], ids=["-1", "null page"])
def test_a_token_without_a_state_slot_counts_in_its_own_call(geometry, impl, none):
    batch = main_batch(geometry, [(0, 256)])
    entries = batch.clone().compress(impl).entries()
    state = batch.storages[0].clone()
    batch.inner_state_slot_mapping.fill_(none)
    batch.compress(impl)
    assert torch.equal(batch.storages[0], state)
    assert batch.entries() == entries


@every_main_compressor
@every_impl
def test_the_reads_of_a_ring_come_before_its_writes(geometry, impl):
    """Every position shares a row with the one that is a window later."""
    requests = [(0, 3 * geometry.window)]
    expected = main_batch(geometry, requests).compress(impl).entries()
    ring = main_batch(geometry, requests, ring=geometry.window)
    for tokens in torch.arange(len(ring.positions)).split(geometry.window + 3):
        ring.take(tokens).compress(impl)
    assert ring.entries() == expected


@every_main_compressor
@every_impl
@pytest.mark.parametrize("k_format", FORMATS)
def test_only_the_bytes_of_rows_and_entries_are_written(geometry, impl, k_format):
    batch = main_batch(geometry, [(5, 200), (0, 130)], layout="padded", k_format=k_format)
    before = batch.clone()
    batch.compress(impl)
    untouched = torch.ones(batch.k_cache.shape[:2], dtype=torch.bool)
    untouched.view(-1)[batch.k_slot_mapping[batch.k_slot_mapping >= 0]] = False
    for name in ("codes", "rotated", "scales"):
        part, old = (getattr(b, name)().view(torch.uint8) for b in (batch, before))
        assert torch.equal(part[untouched], old[untouched])
        part.copy_(old)
    rows, page = batch.inner_state_slot_mapping, batch.inner_state_cache.shape[1]
    state, old = (b.inner_state_cache.view(torch.int32) for b in (batch, before))
    state[rows // page, rows % page] = old[rows // page, rows % page]
    assert_identical(batch, before)


def test_where_rows_cancel_a_channel_is_as_exact_as_the_entry_s_largest():
    """Two sums of the same rows, of 512/128 in seed 50000003 of windows.py."""
    small, other, far = -3.4124e-06, -3.3677e-06, -9e-06
    expected, close, wrong, alone = (
        torch.tensor([row]).bfloat16()
        for row in ([2.0, small], [2.0, other], [2.0, far], [0.0, other])
    )
    assert bf16_differ(close, expected).tolist() == [[False, False]]
    assert bf16_differ(wrong, expected).tolist() == [[False, True]]
    assert bf16_differ(alone, torch.tensor([[0.0, small]]).bfloat16()).tolist() == [[False, True]]


@every_main_compressor
@every_impl
def test_a_nan_spoils_its_own_entries_alone(geometry, impl):
    batch = main_batch(geometry, [(0, 512)])
    expected = batch.clone().compress(impl).written()
    batch.kv_score[geometry.window + 1] = torch.nan
    spoiled = batch.compress(impl).written()
    entries = torch.arange(len(spoiled[0]))
    reached = 2 if geometry.overlap else 1  # the own group's, and the next one's
    first = (geometry.window + 1) // geometry.ratio
    right = (entries < first) | (entries >= first + reached)
    assert all(torch.equal(a[right], b[right]) for a, b in zip(spoiled, expected))
    assert (spoiled[0][~right] & 0x7F == 0x7F).all() and spoiled[1][~right].isnan().all()


@every_main_compressor
@every_impl
def test_a_row_whose_gate_is_minus_infinity_has_no_weight(geometry, impl):
    """Also where the first rows of a window, which are pooled together, all have none."""
    batch = main_batch(geometry, [(0, 2 * geometry.window)])
    first = (batch.positions // geometry.window == 1) & (
        batch.positions % geometry.window < geometry.window // 2
    )
    batch.kv_score[first, geometry.kv_width :] = -torch.inf
    other = batch.clone()
    other.kv_score[first, : geometry.kv_width] = 7.0
    assert batch.compress(impl).entries() == other.compress(impl).entries()
    assert not batch.written().rotated.isnan().any()


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_native_plan_of_the_ratio_128_is_that_of_the_reference(seed):
    pick = random.Random(seed)
    batch = make_batch(**random_case(pick, MAIN_128))
    if pick.random() < 0.3:  # a slot twice
        batch.inner_state_slot_mapping[0] = batch.inner_state_slot_mapping[-1]
    native, reference = (Plan.of(batch.plan(impl), 128) for impl in ("cpu", "reference"))
    for name in Plan._fields[:-1]:
        assert torch.equal(getattr(native, name), getattr(reference, name)), f"{name}, seed {seed}"
    early = native.windows == EARLY
    assert torch.equal(native.sources[early], reference.sources[early]), f"sources, seed {seed}"


@every_impl
def test_a_plan_of_the_ratio_128_names_the_sources_of_128_rows(impl):
    batch = main_batch(MAIN_128, [(100, 300)])
    plan = Plan.of(batch.plan(impl), 128)
    assert plan.windows[plan.windows > 0].tolist() == [EARLY, LATE, LATE]
    first = plan.sources[27]
    slots = -2 - first[:100]
    page = batch.inner_state_cache.shape[1]
    before = torch.arange(100)
    table = batch.inner_state_block_table[0].long()
    assert torch.equal(slots, table[before // page] * page + before % page)
    assert first[100:].tolist() == list(range(28))


@every_main_compressor
@every_impl
def test_plan_and_run_are_compress(geometry, impl):
    batch = main_batch(geometry, REQUESTS)
    assert_identical(batch.clone().run_planned(batch.plan(impl), impl), batch.compress(impl))


@every_main_compressor
def test_the_default_on_a_cpu_is_the_native_kernel(geometry):
    batch = main_batch(geometry, REQUESTS)
    assert_identical(batch.clone().compress(), batch.compress("cpu"))


@every_impl
def test_compressors_of_one_ratio_share_a_plan(impl):
    """Here one that was made for the indexer."""
    indexer, main = make_batch(REQUESTS), main_batch(MAIN_4, REQUESTS)
    main = replace(main, **indexer.call.step._asdict())
    extents = map(min, Extents.of(indexer.call.layer), Extents.of(main.call.layer))
    plan = indexer.plan(impl, Extents(*extents))
    assert_identical(main.clone().run_planned(plan, impl), main.compress(impl))


@every_main_compressor
@every_impl
def test_opcheck_passes(geometry, impl):
    call = main_batch(geometry, [(5, 150)]).call
    options = {"k_format": "fp8_ds_mla", "impl": impl}
    torch.library.opcheck(torch.ops.dsv4_indexer.compress.default, tuple(call), options)
    options = {**Extents.of(call.layer)._asdict(), "ratio": geometry.ratio, "impl": impl}
    # Not the one that compares results: only EARLY windows' sources are written.
    of_plan = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.dsv4_indexer.plan.default, tuple(call.step), options, test_utils=of_plan
    )


# ---- what is refused -----------------------------------------------------------------------------


@every_main_compressor
@every_impl
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: {"ape": c.ape[:3]},
            r"ape has shape \[3, .* expected \[4, 256\] with 'fp8_pow2'",
        ),
        (lambda c: {"kv_score": c.kv_score[:, :512]}, r"kv_score has shape \[9, 512\]; expected"),
        (lambda c: {"norm_weight": c.norm_weight[:128]}, r"norm_weight .* expected \[512\]"),
        (
            lambda c: {"inner_state_cache": c.inner_state_cache[..., :512]},
            r"inner_state_cache has shape .*, 512\]; expected \[pages=.*, page=., (2048|1024)\]",
        ),
        (
            lambda c: {"inner_state_cache": c.inner_state_cache[:, :3]},
            r"inner_state_cache has pages of 3 tokens; expected one of \((2, 4, 8|4, 8, 16, 32)\)",
        ),
        (lambda c: {"k_cache": c.k_cache[..., :132]}, r"k_cache .* expected \[k_pages=.*, 584\]"),
        (lambda c: {"k_scale_cache": torch.zeros(1)}, "k_scale_cache must be None"),
    ],
)
def test_a_wrong_shape_is_named_and_nothing_is_written(geometry, impl, change, message):
    batch = main_batch(geometry, [(0, 9)])
    before = batch.clone()
    with pytest.raises(ContractError, match=message):
        replace(batch, **change(batch)).compress(impl)
    assert_identical(batch, before)


@every_main_compressor
def test_a_format_of_another_compressor_is_refused(geometry):
    message = (
        rf"ape has shape \[{geometry.ratio}, .*\] and k_format is 'fp8_pow2'; expected .* or "
        rf"\[{geometry.ratio}, {geometry.kv_width}\] with 'fp8_ds_mla'"
    )
    with pytest.raises(ContractError, match=message):
        replace(main_batch(geometry, [(0, 9)]), k_format="fp8_pow2").compress()


@every_main_compressor
@pytest.mark.parametrize("impl", ("overlay_scan", "scatter_pool", "ascend"))
def test_other_implementations_name_the_geometry_and_those_that_serve_it(geometry, impl):
    message = (
        rf"'fp8_ds_mla' \(head dimension 512 and ratio {geometry.ratio}\); "
        "available by name: cpu, reference"
    )
    batch = main_batch(geometry, [(0, 9)])
    with pytest.raises(UserError, match=message):
        batch.compress(impl)
    with pytest.raises(UserError, match=message):
        ops.BoundLayer(batch.call.layer, k_format="fp8_ds_mla", impl=impl)


def test_a_plan_of_another_ratio_than_the_model_has_is_refused():
    batch = main_batch(MAIN_128, [(0, 9)])
    extents = Extents.of(batch.call.layer)._asdict()
    with pytest.raises(UserError, match="ratio 128.*available by name: cpu, reference"):
        batch.plan("overlay_scan")
    with pytest.raises(ContractError, match=r"ratio is 8; expected one of \(4, 128\)"):
        ops.plan(*batch.call.step, **extents, ratio=8)


@every_impl
def test_a_plan_of_another_ratio_than_the_layer_s_is_refused(impl):
    batch = main_batch(MAIN_128, [(0, 9)])
    plan = ops.plan(*batch.call.step, **Extents.of(batch.call.layer)._asdict(), impl=impl)
    with pytest.raises(ContractError, match="for 9 tokens and ratio 128: make a plan for each"):
        batch.run_planned(plan, impl)


@every_main_compressor
@every_impl
def test_a_freed_page_that_a_window_needs_is_named(geometry, impl):
    batch = main_batch(geometry, [(geometry.window - 4, 4)])
    batch.inner_state_block_table[:, 0] = 0
    before = batch.clone()
    message = rf"page 0 for position 0 of request 0.*keep the last {geometry.window} positions"
    with pytest.raises(ContractError, match=message):
        batch.compress(impl)
    assert_identical(batch, before)
