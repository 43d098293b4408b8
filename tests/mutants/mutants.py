"""Small faults in the op, each with the test that must catch it.

run.py plants them one at a time in a copy of the tree. A text that is replaced stands exactly once
in its file.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    test: str = ""  # a file in tests/, or one of its tests
    equivalent: str = ""  # why no test can catch it


SEMANTICS, CONTRACT = "op/test_semantics.py", "op/test_contract.py"
PLANNING, INVARIANCE = "op/test_planning.py", "op/test_invariance.py"
KERNELS, PLANS = "ascend_emulation/test_kernels.py", "ascend_emulation/test_plan.py"

MIXED = f"{SEMANTICS}::test_a_mixed_batch_with_padding_equals_the_reference"
INT8 = f"{SEMANTICS}::test_int8_entries_equal_the_reference"
RANDOM = f"{SEMANTICS}::test_random_batches_equal_the_reference"  # with gaps, far gates, two eps
TIES = f"{SEMANTICS}::test_what_lies_halfway_is_rounded_to_even_as_by_the_reference"
FAR = f"{SEMANTICS}::test_offsets_beyond_32_bits_change_no_byte"
STATE_ROW = f"{SEMANTICS}::test_a_state_row_is_kv_and_gate_plus_bias_bit_for_bit"
UNSAVED = f"{SEMANTICS}::test_a_token_without_a_state_slot_counts_in_its_own_call_but_is_not_saved"
TWICE = f"{SEMANTICS}::test_of_two_tokens_with_one_slot_the_last_wins"
ENDS = f"{SEMANTICS}::test_the_first_and_the_last_entry_of_the_cache_are_as_good_as_others"
EXTREME = f"{SEMANTICS}::test_extreme_values_equal_the_reference"
NAN = f"{SEMANTICS}::test_a_nan_of_any_bits_counts_as_infinity"
VALUE = f"{CONTRACT}::test_a_broken_value_is_named_and_nothing_is_written"
NARROW = f"{CONTRACT}::test_a_table_that_is_too_narrow_for_a_window_is_named"
SAME_PLAN = f"{PLANNING}::test_the_native_plan_is_that_of_the_reference"
HIDDEN = f"{PLANNING}::test_a_later_token_in_the_slot_hides_no_token_at_the_window_s_position"
UNFIT = f"{PLANNING}::test_a_plan_that_does_not_fit_is_refused_and_nothing_is_written"
STRIDES = f"{INVARIANCE}::test_strides_of_the_inputs_change_no_byte"
THREADS = f"{INVARIANCE}::test_the_number_of_threads_changes_no_byte"
ROW_RULE = "op/test_row_rule.py"
GEOMETRY = "op/test_geometry.py"
MAIN_RANDOM = f"{GEOMETRY}::test_random_batches_equal_the_reference"
MAIN_SCALES = f"{GEOMETRY}::test_scales_are_vllms_at_any_size_of_the_values"
MAIN_NO_WEIGHT = f"{GEOMETRY}::test_a_row_whose_gate_is_minus_infinity_has_no_weight"

NPU_BLOCKS = f"{KERNELS}::test_a_mixed_batch_in_the_layout_of_each_block_size_equals_the_reference"
NPU_RANDOM = f"{KERNELS}::test_random_batches_equal_the_reference"  # with gaps, far gates, two eps
NPU_TIES = f"{KERNELS}::test_what_lies_halfway_is_rounded_to_even_as_by_the_reference"
NPU_FAR = f"{KERNELS}::test_offsets_beyond_32_bits_change_no_byte"
NPU_UNFIT = f"{KERNELS}::test_a_plan_for_other_caches_changes_nothing"
NPU_ENTRIES = f"{KERNELS}::test_neighbouring_entries_in_two_pages_and_entry_0_are_as_good_as_others"
NPU_ZEROS = f"{KERNELS}::test_large_gates_and_zeros_equal_the_reference"
NPU_128 = f"{KERNELS}::test_the_ratio_128_is_refused_by_name_and_nothing_is_written"
NPU_ROWS = f"{KERNELS}::test_rows_that_lie_in_each_other_are_refused"
NPU_PAGE_0 = (
    f"{KERNELS}::test_page_0_is_not_written_"
    "and_a_window_without_a_page_is_pooled_from_its_other_rows"
)
NPU_MIXED_PLAN = f"{PLANS}::test_a_mixed_batch_with_padding_is_planned_as_by_the_reference"
NPU_NO_PAGE = f"{PLANS}::test_what_has_no_page_is_masked_and_what_is_out_of_range_is_not_written"
NPU_STRAY = f"{PLANS}::test_a_token_that_is_out_of_range_closes_no_window"
NPU_LAST = f"{PLANS}::test_the_last_page_entry_and_column_are_in_range"
NPU_REQUEST = f"{PLANS}::test_a_request_out_of_range_has_no_pages"
NPU_COLUMN = f"{PLANS}::test_a_column_out_of_range_has_no_page"
NPU_ANEW = f"{PLANS}::test_what_changes_between_launches_is_read_anew"

REFERENCE = "vllm_dsv4_indexer/ops/reference.py"
PAGES, ENTRY, ENTRIES = "csrc/cpu/pages.h", "csrc/cpu/entry.h", "csrc/cpu/entries.h"
FORMATS, VEC, KERNEL = "csrc/cpu/formats.h", "csrc/cpu/vec.h", "csrc/cpu/kernel.cpp"
PLANNER, EXPORTS = "csrc/cpu/planner.cpp", "csrc/cpu/exports.cpp"
TILE, TABLE, FINISH = "csrc/ascend/tile.h", "csrc/ascend/table.h", "csrc/ascend/finish.h"
COMPRESS, POOL = "csrc/ascend/compress.h", "csrc/ascend/pool.h"
PLANNED, NPU_PLANNER = "csrc/ascend/planned.h", "csrc/ascend/planner.h"

STATE_PAGE = "slot / l.state_page * l.state_page_stride"
NPU_STATE_PAGE = "paging_.Page(slot) * args_.state_page_stride"

MUTANTS = [
    # The reference.
    Mutant(REFERENCE, "keepdim=True) + eps)", "keepdim=True) + 1e-6)", TIES),
    Mutant(REFERENCE, "= -torch.inf", "= -1e4", RANDOM),
    Mutant(
        REFERENCE,
        "layer.ape[step.positions % ratio]",
        "layer.ape[(step.positions + 1) % ratio]",
        STATE_ROW,
    ),
    Mutant(REFERENCE, "torch.tensor(INT8_MAX) / amax", "INT8_MAX / amax", TIES),
    Mutant(REFERENCE, "inverse[:, None]).round()", "inverse[:, None]).trunc()", INT8),
    Mutant(REFERENCE, "entries.bfloat16().float()", "entries.float()", TIES),
    Mutant(REFERENCE, "> 0x600000)", ">= 0x600000)", MIXED),
    Mutant(REFERENCE, "(state_slots, -1, state_rows,", "(state_slots, -1, state_rows + 1,", VALUE),
    Mutant(
        REFERENCE, "(k_slots, -1, extents.k_entries,", "(k_slots, -1, extents.k_entries + 1,", VALUE
    ),
    Mutant(
        REFERENCE, "(positions, 0, extents.max_pos,", "(positions, 0, extents.max_pos + 1,", VALUE
    ),
    Mutant(REFERENCE, "(positions, 0, extents.max_pos,", "(positions, -1, extents.max_pos,", VALUE),
    Mutant(REFERENCE, "(token_to_req, 0, len(table),", "(token_to_req, 0, len(table) + 1,", VALUE),
    Mutant(REFERENCE, "(value > 0)", "(value >= 0)", VALUE),
    Mutant(REFERENCE, "(value < extents.state_pages)", "(value <= extents.state_pages)", VALUE),
    Mutant(REFERENCE, "wide = column < table.shape[1]", "wide = column <= table.shape[1]", NARROW),
    Mutant(
        REFERENCE,
        "last[:-1] = ordered[1:] != ordered[:-1]",
        "last[1:] = ordered[1:] != ordered[:-1]",
        TWICE,
    ),
    Mutant(
        REFERENCE,
        "other = torch.where(same, index, -1).amax(dim=1)",
        "other = torch.where(same, -1, -1).amax(dim=1)",
        ROW_RULE,
    ),
    Mutant(REFERENCE, "slots < extents.state_page", "slots < 0", UNSAVED),
    # Places and strides on the CPU.
    Mutant(PAGES, STATE_PAGE, "slot / l.state_page * l.state_page * l.state_row_stride", MIXED),
    Mutant(PAGES, STATE_PAGE, f"static_cast<int32_t>({STATE_PAGE})", FAR),
    Mutant(PAGES, STATE_PAGE, f"static_cast<uint32_t>({STATE_PAGE})", FAR),
    Mutant(
        PAGES, "slot % l.state_page * l.state_row_stride", "slot % l.state_page * kRowWidth", RANDOM
    ),
    Mutant(
        PAGES,
        "slot / kFp8PageEntries * l.k_page_stride",
        "slot / kFp8PageEntries * (kFp8PageEntries * 132)",
        MIXED,
    ),
    Mutant(
        PAGES,
        "slot / kFp8PageEntries * l.k_page_stride",
        "static_cast<uint32_t>(slot / kFp8PageEntries * l.k_page_stride)",
        FAR,
    ),
    Mutant(PAGES, "entry * l.k_entry_stride", "entry * kHeadDim", INT8),
    Mutant(PAGES, "page * l.k_page_stride +", "page * l.k_page * l.k_entry_stride +", INT8),
    Mutant(PAGES, "entry * l.k_scale_entry_stride", "entry", INT8),
    Mutant(PAGES, "page * l.k_scale_page_stride", "page * l.k_page * l.k_scale_entry_stride", INT8),
    Mutant(ENTRY, "token * call.kv_score_stride", "token * kRowWidth", STRIDES),
    Mutant(
        ENTRY,
        "token * call.kv_score_stride",
        "static_cast<uint32_t>(token * call.kv_score_stride)",
        FAR,
    ),
    Mutant(ENTRIES, "position * a_.cos_sin_stride", "position * kRopeDim", RANDOM),
    Mutant(ENTRIES, "- G::kRatio + 1;", "- G::kRatio + 2;", MIXED),
    Mutant(
        PAGES,
        "at.page * l.k_page_stride;",
        "at.page * l.k_page * (kDsMlaDataBytes + kDsMlaScaleBytes);",
        MAIN_RANDOM,
    ),
    Mutant(PLANNER, "* a_.block_table_stride + q", "* a_.table_columns + q", STRIDES),
    Mutant(
        PLANNER,
        "a_.token_to_req[token] * a_.block_table_stride",
        "static_cast<int32_t>(a_.token_to_req[token] * a_.block_table_stride)",
        FAR,
    ),
    # Arithmetic on the CPU.
    Mutant(ENTRY, "-__builtin_inff()", "-1e4f", RANDOM),
    Mutant(ENTRY, "j < G::kRatio ? 0 : G::kHeadDim", "j < G::kRatio ? G::kHeadDim : 0", MIXED),
    Mutant(ENTRY, "sum / channels + eps", "sum / channels", TIES),
    Mutant(ENTRY, "most = larger(most, sums.most);", "", MAIN_RANDOM),
    Mutant(ENTRY, "kLowest = -__FLT_MAX__", "kLowest = -__builtin_inff()", MAIN_NO_WEIGHT),
    Mutant(FORMATS, "kFp8Max * kDsMlaScaleMin", "kAmaxMin", MAIN_SCALES),
    Mutant(FORMATS, "place.exponents[kDsMlaBlocks] = 0;", "", MAIN_RANDOM),
    Mutant(ENTRY, "odd = b * cos + a * sin", "odd = b * cos - a * sin", MIXED),
    Mutant(ENTRIES, "static_cast<float>(a_.eps)", "1e-6f", TIES),
    Mutant(FORMATS, "(bits + 0x7fffu + (bits >> 16 & 1u))", "(bits + 0x8000u)", TIES),
    Mutant(FORMATS, "(bits + 0x7ffffu + (bits >> 20 & 1u))", "(bits + 0x80000u)", TIES),
    Mutant(FORMATS, "(bits + 0xfff + (bits >> 13 & 1))", "(bits + 0x1000)", TIES),
    Mutant(FORMATS, "(bits + 0xfff + (bits >> 13 & 1))", "(bits + 0xfff)", TIES),
    Mutant(FORMATS, "magnitude < 0x1p-6f", "magnitude < 0x1p-7f", MIXED),
    Mutant(FORMATS, "> 0x600000)", ">= 0x600000)", MIXED),
    Mutant(
        FORMATS,
        "largest < bits_of(least) ? bits_of(least)",
        "largest < bits_of(least) ? largest",
        EXTREME,
    ),
    Mutant(FORMATS, "largest < kInfinity ? largest : kInfinity", "largest", NAN),
    Mutant(FORMATS, "v == v ? code : broadcast(0x7f)", "v == v ? code : broadcast(0x7e)", NAN),
    Mutant(FORMATS, "0.08838834764831845f;", "0.0883883f;", TIES),
    Mutant(
        FORMATS,
        "code > 127 ? broadcast(127)",
        "code > 128 ? broadcast(127)",
        equivalent="the scale brings the largest magnitude to 127: no product is beyond 127.5",
    ),
    Mutant(VEC, "kSmallest = -87.0f", "kSmallest = -6.0f", MIXED),
    # Order and phases on the CPU.
    Mutant(
        KERNEL,
        "static_cast<uint64_t>(call.positions[token]) % G::kRatio",
        "static_cast<uint64_t>(call.positions[token] + 1) % G::kRatio",
        STATE_ROW,
    ),
    Mutant(
        KERNEL,
        "begin < G::kWindow ? 0 : begin - G::kWindow + 1",
        "begin < G::kWindow ? 0 : begin - G::kWindow + 2",
        THREADS,
    ),
    Mutant(
        KERNEL,
        "token = between_windows<G>(call, begin);",
        "token = begin;",
        equivalent="two threads save the same rows with the same bits: a race and work for nothing",
    ),
    Mutant(
        KERNEL,
        "if (call.windows[last] == kLate) return last + 1;",
        "return last + 1;",
        MAIN_RANDOM,
    ),
    Mutant(KERNEL, "if (!call.unique) {", "if (false) {", TWICE),
    Mutant(KERNEL, "call.early == 0 ||", "call.early != 0 ||", MIXED),
    # The CPU's plan.
    Mutant(
        PLANNER, "a_.state_slots[token] >= a_.state_page", "a_.state_slots[token] >= 0", UNSAVED
    ),
    Mutant(
        PLANNER, "in_range(slot, -1, state_rows())", "in_range(slot, -1, state_rows() + 1)", VALUE
    ),
    Mutant(
        PLANNER,
        "in_range(k_slot, -1, a_.k_entries)",
        "in_range(k_slot, -1, a_.k_entries + 1)",
        VALUE,
    ),
    Mutant(
        PLANNER,
        "in_range(k_slot, -1, a_.k_entries)",
        "in_range(k_slot, -1, a_.k_entries - 1)",
        ENDS,
    ),
    Mutant(
        PLANNER,
        "in_range(a_.positions[token], 0, a_.max_pos)",
        "in_range(a_.positions[token], 0, a_.max_pos + 1)",
        VALUE,
    ),
    Mutant(
        PLANNER,
        "in_range(a_.positions[token], 0, a_.max_pos)",
        "in_range(a_.positions[token], -1, a_.max_pos)",
        VALUE,
    ),
    Mutant(
        PLANNER,
        "in_range(a_.token_to_req[token], 0, a_.requests)",
        "in_range(a_.token_to_req[token], 0, a_.requests + 1)",
        VALUE,
    ),
    Mutant(
        PLANNER,
        ">= a_.table_columns) return kTableColumn",
        "> a_.table_columns) return kTableColumn",
        NARROW,
    ),
    Mutant(
        PLANNER,
        "in_range(page_of(token, q), 1, a_.state_pages)",
        "in_range(page_of(token, q), 0, a_.state_pages)",
        VALUE,
    ),
    Mutant(
        PLANNER,
        "in_range(page_of(token, q), 1, a_.state_pages)",
        "in_range(page_of(token, q), 1, a_.state_pages + 1)",
        VALUE,
    ),
    Mutant(PLANNER, "if (slot < 0 && k_slot < 0) return kNoViolation;", "", MIXED),
    Mutant(PLANNER, "return a_.k_slots[token] >= 0 &&", "return a_.k_slots[token] > 0 &&", ENDS),
    Mutant(PLANNER, "if (own >= 0) return own;", "", UNSAVED),
    Mutant(PLANNER, "other = unique_ ? -1 : other - 1;", "other = -1;", HIDDEN),
    Mutant(PLANNER, "windows_[token] == kNoWindow ? -1 :", "false ? -1 :", SAME_PLAN),
    Mutant(EXPORTS, "plan.max_pos <= layer.cos_sin_rows", "true", UNFIT),
    Mutant(EXPORTS, "plan.k_entries <= layer.k_pages * layer.k_page", "true", UNFIT),
    Mutant(EXPORTS, "plan.state_pages <= layer.state_pages", "true", UNFIT),
    Mutant(EXPORTS, "plan.state_page == layer.state_page", "true", UNFIT),
    # Places and strides on NPUs.
    Mutant(
        TILE,
        "source * args_.kv_score_stride : StateRow",
        "source * kRowWidth : StateRow",
        NPU_RANDOM,
    ),
    Mutant(
        TILE,
        "kv_score_gm_[token * args_.kv_score_stride]",
        "kv_score_gm_[token * kRowWidth]",
        NPU_RANDOM,
    ),
    Mutant(
        TILE,
        "kv_score_gm_[token * args_.kv_score_stride]",
        "kv_score_gm_[static_cast<uint32_t>(token * args_.kv_score_stride)]",
        NPU_FAR,
    ),
    Mutant(TILE, "Gap(args_.kv_score_stride)", "0", NPU_RANDOM),
    Mutant(TILE, "Gap(args_.state_row_stride)", "0", NPU_RANDOM),
    Mutant(
        TILE,
        NPU_STATE_PAGE,
        "paging_.Page(slot) * args_.state_page * args_.state_row_stride",
        NPU_BLOCKS,
    ),
    Mutant(TILE, NPU_STATE_PAGE, f"static_cast<uint32_t>({NPU_STATE_PAGE})", NPU_FAR),
    Mutant(
        TILE,
        "paging_.InPage(slot) * args_.state_row_stride",
        "paging_.InPage(slot) * kRowWidth",
        NPU_RANDOM,
    ),
    Mutant(TILE, "starts_[w] * stride", "starts_[w] * kRopeDim", NPU_RANDOM),
    Mutant(TILE, "kRatio * stride - kRopeDim", "kRatio * kRopeDim - kRopeDim", NPU_RANDOM),
    Mutant(TILE, "starts_[end] == starts_[end - 1] + kRatio", "true", NPU_RANDOM),
    Mutant(TILE, "paging_.InPage(to) != 0", "true", NPU_RANDOM),
    Mutant(TABLE, "request * stride_ + column", "request * columns_ + column", NPU_RANDOM),
    Mutant(FINISH, "entry * args_.k_entry_stride;", "entry * kHeadDim;", NPU_RANDOM),
    Mutant(FINISH, "args_.k_entry_stride - G::kHeadDim", "0", NPU_RANDOM),
    Mutant(FINISH, "(stride - 1) * sizeof(T)", "(stride - stride) * sizeof(T)", NPU_RANDOM),
    Mutant(
        FINISH,
        "page * args_.k_scale_page_stride",
        "page * args_.k_page * args_.k_scale_entry_stride",
        NPU_RANDOM,
    ),
    Mutant(FINISH, "paging_.InPage(slots_[end]) != 0", "true", NPU_ENTRIES),
    # Arithmetic on NPUs.
    Mutant(TILE, "kWeightless = -3e38f", "kWeightless = -1e4f", NPU_RANDOM),
    Mutant(TILE, "frames_[used_].raw |= raw << row;", "", NPU_BLOCKS),
    Mutant(POOL, "Max(sum_, sum_, sum_[row_], row_);", "", NPU_RANDOM),
    Mutant(
        FINISH,
        "Adds(factor_, factor_, args_.eps, Windows())",
        "Adds(factor_, factor_, 1e-6f, Windows())",
        NPU_TIES,
    ),
    Mutant(
        FINISH,
        "Cast(rounded, x_, RoundMode::CAST_RINT",
        "Cast(rounded, x_, RoundMode::CAST_ROUND",
        NPU_TIES,
    ),
    Mutant(
        FINISH,
        "Cast(integer, y_, RoundMode::CAST_RINT",
        "Cast(integer, y_, RoundMode::CAST_ROUND",
        NPU_TIES,
    ),
    Mutant(
        FINISH,
        "<fp8_e4m3fn_t>(), y_, RoundMode::CAST_RINT",
        "<fp8_e4m3fn_t>(), y_, RoundMode::CAST_ROUND",
        NPU_TIES,
    ),
    Mutant(
        FINISH,
        "Cast(narrow, scale_, RoundMode::CAST_RINT",
        "Cast(narrow, scale_, RoundMode::CAST_ROUND",
        NPU_TIES,
    ),
    Mutant(
        FINISH,
        "Cast(narrow, integer, RoundMode::CAST_RINT",
        "Cast(narrow, integer, RoundMode::CAST_ROUND",
        equivalent="a half holds every integer to 127",
    ),
    Mutant(
        FINISH,
        "Cast(codes, narrow, RoundMode::CAST_RINT",
        "Cast(codes, narrow, RoundMode::CAST_ROUND",
        equivalent="they are integers already",
    ),
    Mutant(
        FINISH,
        "Maxs(factor_, factor_, kAmaxMin, Windows())",
        "Maxs(factor_, factor_, 0.0f, Windows())",
        NPU_ZEROS,
    ),
    Mutant(FINISH, "windows_ > kBlockFloats ?", "windows_ > kBlockFloats + 1 ?", NPU_RANDOM),
    Mutant(COMPRESS, "full_ = last - next_ + 1 == kRatio;", "full_ = true;", NPU_BLOCKS),
    # The main compressor on NPUs.
    Mutant(COMPRESS, "(full_ || fetched_) &&", "full_ &&", NPU_ZEROS),
    Mutant(POOL, "kCarried ? G::kHeadDim :", "kCarried ? G::kKvWidth :", NPU_ZEROS),
    Mutant(POOL, "part * (kByRow ? row :", "part * (kByRow ? row / 2 :", NPU_ZEROS),
    Mutant(POOL, "(kByRow ? kLanes : row) / kBlock", "row / kBlock", NPU_ZEROS),
    Mutant(FINISH, "kTurned<G> == 1 ? width : kBlockFloats", "width", NPU_ZEROS),
    Mutant(FINISH, "y_ = kBoth ? x_[kPlanes * kPlane] : pooled_", "y_ = x_[0]", NPU_ZEROS),
    Mutant(FINISH, "at * kElementBytes", "at", NPU_ZEROS),
    Mutant(FINISH, "G::kHeadDim) * kElementBytes", "G::kHeadDim)", NPU_RANDOM),
    Mutant(
        FINISH,
        "Cast(out, y_, RoundMode::CAST_RINT",
        "Cast(out, y_, RoundMode::CAST_ROUND",
        NPU_TIES,
    ),
    Mutant("csrc/ascend/tiling.h", "a.ratio == kRatio", "a.ratio > 0", NPU_128),
    Mutant("csrc/ascend/tiling.h", "main ? Main4::kRowWidth :", "main ? 0 :", NPU_ROWS),
    Mutant(
        "csrc/ascend/launch.h",
        "compared = head_dim == Indexer::kHeadDim",
        "compared = head_dim >= Indexer::kHeadDim",
        f"{KERNELS}::test_the_algorithms_for_comparison_are_the_indexers_alone",
    ),
    # The NPU's plan, and the scalar unit's cache.
    Mutant(PLANNED, "sources_.GetValue(kMaxPosPlace) <= args_.cos_sin_rows", "true", NPU_UNFIT),
    Mutant(
        PLANNED,
        "sources_.GetValue(kKEntriesPlace) <= args_.k_pages * args_.k_page",
        "true",
        NPU_UNFIT,
    ),
    Mutant(PLANNED, "sources_.GetValue(kStatePagesPlace) <= args_.state_pages", "true", NPU_UNFIT),
    Mutant(TABLE, "request < 0 || request >= requests_ ||", "", NPU_REQUEST),
    Mutant(TABLE, "request >= requests_", "request > requests_", NPU_REQUEST),
    Mutant(TABLE, " || column >= columns_", "", NPU_COLUMN),
    Mutant(TABLE, "column >= columns_", "column > columns_", NPU_COLUMN),
    Mutant(TABLE, "found_ > 0", "found_ >= 0", NPU_PAGE_0),
    Mutant(TABLE, "found_ < pages_", "found_ <= pages_", NPU_NO_PAGE),
    Mutant(
        TABLE,
        "ReadFresh(gm_[request * stride_ + column])",
        "gm_.GetValue(request * stride_ + column)",
        NPU_ANEW,
    ),
    Mutant(
        "csrc/ascend/device.h",
        "DcciDst::CACHELINE_OUT>(source)",
        "DcciDst::CACHELINE_OUT>(source[64])",
        NPU_ANEW,
    ),
    Mutant(
        "csrc/ascend/listed.h",
        "ReadFresh(state_slots_gm_[next_])",
        "state_slots_gm_.GetValue(next_)",
        NPU_ANEW,
    ),
    Mutant(
        "csrc/ascend/requests.h",
        "ReadFresh(mapping_gm_[token * stride_])",
        "mapping_gm_.GetValue(token * stride_)",
        NPU_ANEW,
    ),
    Mutant(
        "csrc/ascend/comparison/baselines.h",
        "ReadFresh(positions[token])",
        "positions.GetValue(token)",
        f"{KERNELS}::test_the_algorithms_for_comparison_store_the_same",
    ),
    Mutant(NPU_PLANNER, " && position < args_.max_pos", "", NPU_STRAY),
    Mutant(NPU_PLANNER, "position < args_.max_pos", "position <= args_.max_pos", NPU_STRAY),
    Mutant(NPU_PLANNER, "slot < args_.k_entries", "slot <= args_.k_entries", NPU_LAST),
    Mutant(NPU_PLANNER, "slot >= 0 && slot", "slot > 0 && slot", NPU_ENTRIES),
    Mutant(NPU_PLANNER, "row < args_.state_page ||", "", NPU_PAGE_0),
    Mutant(NPU_PLANNER, "row >= args_.state_pages", "row > args_.state_pages", NPU_NO_PAGE),
    Mutant(
        NPU_PLANNER, "consecutive >= kWindow &&", "consecutive >= kWindow - 1 &&", NPU_MIXED_PLAN
    ),
    Mutant(
        "csrc/ascend/span.h",
        "end < tokens ? end : tokens",
        "end < tokens ? end : end",
        NPU_MIXED_PLAN,
    ),
]
