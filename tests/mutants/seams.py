"""Small faults between the engines and the op: in the metadata, in where our code takes the
engine's place, and in what it saves. Each has the test that must catch it. See mutants.py.
"""

from mutants import Mutant

CONTRACT = "engine_ascend/contract"  # run beside a vllm-ascend: that of the file's family
FAMILIES = {"family1": "0.23.0.post1", "": "0.30.0rc2"}

ROWS = (
    "engine/test_schedules.py::"
    "test_every_row_and_entry_that_is_read_is_what_the_requests_own_tokens_give"
)
METADATA, ONE_PLAN = "engine/test_metadata.py", "engine/test_one_plan.py"
REQUEST = f"{METADATA}::test_each_token_is_mapped_to_its_request_and_padding_to_the_first"
K_SLOT = f"{METADATA}::test_the_last_token_of_a_group_gets_the_slot_of_its_entry"
SCORED = f"{METADATA}::test_a_prefill_token_may_score_the_entries_up_to_its_own"
LOOKED_UP = (
    f"{METADATA}::"
    "test_a_token_that_may_score_entries_is_found_to_be_of_its_own_request_and_any_token_of_one"
)
NO_ENTRY = f"{METADATA}::test_prefills_without_an_entry_get_an_empty_chunk_of_all_their_tokens"
DRAFTS = f"{METADATA}::test_a_token_and_each_of_its_drafts_become_a_request_of_one_token"
OURS_ALONE = f"{METADATA}::test_only_a_step_of_our_own_engine_meets_our_metadata"
AFTER_FAILURE = f"{METADATA}::test_vllms_own_objects_are_back_when_a_step_fails"
OTHERS_PLAN = f"{ONE_PLAN}::test_other_metadata_or_other_extents_have_a_plan_of_their_own"
EQUAL = f"{ONE_PLAN}::test_metadata_that_is_equal_and_not_the_same_is_other_metadata"
KEPT = f"{ONE_PLAN}::test_a_later_pass_plans_anew_although_its_metadata_was_refreshed_in_place"
BOUND_AGAIN = f"{ONE_PLAN}::test_a_layer_is_bound_once_and_again_when_the_engine_replaces_a_tensor"
OWN_LAYER = f"{ONE_PLAN}::test_a_layer_runs_with_its_own_tensors_and_the_models_epsilon"
SELECTION, PAGES = "plugin/test_selection.py", "engine/test_state_pages.py"
OTHER_MODEL = f"{SELECTION}::test_a_model_class_that_another_plugin_replaced_is_refused"
OTHER_INDEXER = f"{SELECTION}::test_an_indexer_that_another_plugin_changed_is_refused"
OTHER_PROJECTION = f"{SELECTION}::test_a_projection_that_vllm_builds_otherwise_is_refused"
BUILT_AS_BEFORE = (
    f"{SELECTION}::test_attention_is_built_as_before_once_a_model_is_loaded_or_could_not_be"
)
OWN_SCHEDULER = (
    f"{SELECTION}::test_with_another_scheduler_all_rows_are_saved_and_no_other_way_is_accepted"
)
REFUSED = f"{SELECTION}::test_what_the_engine_cannot_do_is_refused"
RESTORED = f"{SELECTION}::test_selecting_the_backend_runs_our_worker_with_what_the_user_asked_for"
OF_PROMPT = f"{PAGES}::test_of_a_prompt_the_open_groups_and_what_stands_before_a_hit_get_pages"
ENOUGH = (
    f"{PAGES}::test_after_any_steps_a_request_has_what_its_next_step_reads_and_no_more_than_it_may"
)
ANY_HIT = f"{PAGES}::test_a_hit_of_any_length_reads_no_row_where_windows_do_not_overlap"
SAME_HITS = "engine/test_schedules.py::test_prefixes_hit_where_they_do_with_full_saving"
NEIGHBOURS = (
    "engine/test_verification.py::test_one_code_in_ten_thousand_may_be_the_neighbour_of_the_engines"
)
STRAY = "engine/test_verification.py::test_a_write_where_no_token_is_is_told"

INVARIANTS, CHECKED = "op/test_invariants.py", "engine/test_checked.py"
TOLD = f"{INVARIANTS}::test_a_fault_is_told_with_its_token_and_value_and_nothing_is_written"
FREED = f"{INVARIANTS}::test_of_the_ratio_128_the_group_before_a_request_s_own_may_be_freed"
GIVEN_AWAY = f"{CHECKED}::test_rows_in_a_page_that_other_caches_have_got_are_no_more"
LEFT_OUT = f"{CHECKED}::test_a_row_of_the_null_page_may_be_left_out_and_no_other"
NOT_FINITE = (
    "engine/test_captures.py::test_a_number_that_is_not_finite_is_found_wherever_it_is_in_the_entry"
)
OF_EACH_KIND = (
    "engine/test_captures.py::test_of_the_step_of_a_number_the_first_layer_of_each_kind_is_captured"
)

STEP, LAYER = f"{CONTRACT}/check_step.py", f"{CONTRACT}/check_layer.py"
PREFIX, LOADED = f"{CONTRACT}/check_prefix.py", f"{CONTRACT}/check_selection.py"
SECOND = f"{CONTRACT}/check_second_family.py"
SLOTS = f"{STEP}::test_positions_requests_and_slots_are_those_of_the_tables"
NULL = f"{STEP}::test_a_block_that_is_null_gives_no_slots"
BEYOND = f"{STEP}::test_a_token_beyond_the_tables_of_its_request_has_no_slots"
TOO_EARLY = f"{STEP}::test_a_request_that_would_start_before_its_first_token_has_no_slots"
NOT_WRITTEN = f"{STEP}::test_a_token_that_is_not_to_be_written_has_no_slots"
PARTS = f"{STEP}::test_the_parts_of_a_step_are_one_batch"
STORES = f"{LAYER}::test_prefill_decode_and_mixed_steps_store_the_reference"
PARALLEL = f"{LAYER}::test_context_parallel_steps_store_the_reference"
BESIDE = f"{LAYER}::test_the_op_runs_beside_the_query_and_before_the_keys_are_read"
CAPTURE = f"{LAYER}::test_a_capture_makes_a_plan_of_its_own"
NEW_CACHES = f"{LAYER}::test_caches_that_are_replaced_are_written_from_then_on"
NEW_WEIGHTS = f"{LAYER}::test_weights_that_are_loaded_again_reach_the_joined_projection"
STOCK = f"{LAYER}::test_the_stock_compressor_is_not_called_for_the_indexer"
IN_ONE_CALL = f"{LAYER}::test_a_step_of_prefills_and_decodes_is_compressed_in_one_call"
BEHIND_LAST = f"{PREFIX}::test_a_prompt_behind_the_last_tokens_of_another"
WAITS = f"{SECOND}::test_a_step_waits_for_what_another_stream_makes_of_its_metadata"
NOT_TO_WRITE = f"{SECOND}::test_an_indexer_that_is_not_to_write_writes_nothing"
OWN_KEYS = f"{LOADED}::test_our_worker_gives_every_indexer_our_attention_under_the_stock_backend"
TOO_FEW = f"{LOADED}::test_a_model_with_another_number_of_indexers_is_refused"
QUANTISED = f"{LOADED}::test_a_quantised_projection_is_refused_by_its_name"
COULD_NOT = f"{LOADED}::test_a_model_that_cannot_be_loaded_leaves_the_stock_backend"
DRAFT_MODEL = f"{LOADED}::test_a_draft_model_with_an_indexer_is_refused_by_the_name_of_its_layer"

ENGINES = "vllm_dsv4_indexer/engines"
MADE, PATCHES = f"{ENGINES}/vllm_cpu/metadata.py", f"{ENGINES}/vllm_cpu/patches.py"
COMPRESSOR, WORKER = f"{ENGINES}/vllm_cpu/compressor.py", f"{ENGINES}/vllm_cpu/worker.py"
CONFIGURED = f"{ENGINES}/vllm_cpu/configuration.py"
PROJECTION, PLANS = f"{ENGINES}/vllm_cpu/projection.py", f"{ENGINES}/plans.py"
VERIFIED = f"{ENGINES}/verification.py"
ASCEND = f"{ENGINES}/vllm_ascend"
KEYS, PARTED = f"{ASCEND}/indexer.py", f"{ASCEND}/step.py"
FIRST, SECOND_FAMILY, LOADING = (
    f"{ASCEND}/{name}.py" for name in ("family1", "family2", "loading")
)
INVARIANTS_FILE, CHECKS = "vllm_dsv4_indexer/ops/invariants.py", f"{ENGINES}/vllm_cpu/checks.py"
CAPTURES = f"{ENGINES}/captures.py"
STATE, LATER = f"{ENGINES}/vllm_cpu/state.py", "vllm_dsv4_indexer/read_later.py"
LISTED = "vllm_dsv4_indexer/ops/requests.py"

SEAMS = [
    # The metadata of vLLM's CPU engine.
    Mutant(MADE, "query_start_loc[1:], tokens, right=True", "query_start_loc[1:], tokens", REQUEST),
    Mutant(MADE, "    output[num_mapped:num_tokens] = 0\n", "", REQUEST),
    Mutant(MADE, "(position + 1) % COMPRESS_RATIO == 0", "position % COMPRESS_RATIO == 0", K_SLOT),
    Mutant(MADE, " & (slot_mapping_ptr[: len(request)] != PAD_ID)", "", K_SLOT),
    Mutant(MADE, "+ entry % block_size", "+ entry % block_size + 1", K_SLOT),
    Mutant(MADE, "[request, entry // block_size]", "[request - 1, entry // block_size]", K_SLOT),
    Mutant(
        MADE,
        "    slots.fill_(PAD_ID)\n",
        "",
        equivalent="vLLM fills them before (get_compressed_slot_mapping)",
    ),
    Mutant(MADE, "seq_lens[: len(query_lens)] - query_lens", "seq_lens[: len(query_lens)]", ROWS),
    Mutant(MADE, "(position[rows] + 1) // COMPRESS", "position[rows] // COMPRESS", SCORED),
    Mutant(MADE, ".clamp(max=last_entry)", "", LOOKED_UP),
    Mutant(MADE, "- drafts_to_come).clamp(min=0)", "- drafts_to_come)", DRAFTS),
    Mutant(MADE, "block_table_ptr.repeat_interleave(max_decode_len, dim=0)", "0", DRAFTS),
    Mutant(PATCHES, "name, vars(owner)[name])", "name, ours)", AFTER_FAILURE),
    Mutant(PATCHES, "if chunk is not None:", "if True:", NO_ENTRY),
    Mutant(PATCHES, "int(query_start_loc_cpu[start_idx])", "0", NO_ENTRY),
    # Our compressor in vLLM's CPU engine.
    Mutant(
        COMPRESSOR, "            state.block_table,", "            state.block_table * 0,", ROWS
    ),
    Mutant(
        COMPRESSOR,
        "            state.block_table,",
        "            state.block_table.roll(1, 0),",
        ROWS,
    ),
    Mutant(
        COMPRESSOR, "            entries.slot_mapping,", "            state.slot_mapping,", ROWS
    ),
    Mutant(
        COMPRESSOR,
        "            entries.slot_mapping,",
        "            entries.slot_mapping + 1,",
        ROWS,
    ),
    Mutant(
        COMPRESSOR, "            state.slot_mapping,\n", "            entries.slot_mapping,\n", ROWS
    ),
    Mutant(COMPRESSOR, "eps=self.rms_norm_eps", "eps=1e-6", OWN_LAYER),
    Mutant(COMPRESSOR, "            self.ape,", "            self.ape.roll(1, 0),", OWN_LAYER),
    Mutant(COMPRESSOR, "any(new is not old for", "any(False for", BOUND_AGAIN),
    Mutant(COMPRESSOR, "    compressor.__class__ = OnePassCompressor\n", "", ROWS),
    Mutant(COMPRESSOR, "if len(layers) != indexers:", "if False:", OTHER_MODEL),
    Mutant(
        COMPRESSOR,
        "type(compressor) is not DeepseekV4CPU",
        "False and DeepseekV4CPU",
        OTHER_INDEXER,
    ),
    Mutant(PLANS, "all(map(operator.is_,", "any(map(operator.is_,", OTHERS_PLAN),
    Mutant(PLANS, " and known_extents == extents", "", OTHERS_PLAN),
    Mutant(PLANS, "operator.is_", "operator.eq", EQUAL),
    Mutant(PLANS, "get_forward_context().additional_kwargs", "vars(operator)", KEPT),
    Mutant(
        PLANS,
        "    made.append((metadata, extents, plan := make()))\n    return plan",
        "    return make()",
        f"{ONE_PLAN}::test_layers_with_the_same_metadata_share_the_plan_of_the_pass",
    ),
    Mutant(WORKER, "with metadata_on_cpu():", "with nullcontext():", OURS_ALONE),
    Mutant(
        PROJECTION,
        "        DeepseekV4CPUAttention.__init__ = build\n",
        "        pass\n",
        BUILT_AS_BEFORE,
    ),
    Mutant(PROJECTION, "        or linear.bias is not None\n", "", OTHER_PROJECTION),
    Mutant(CONFIGURED, "if vllm_config.scheduler_config.scheduler_cls", "if None", OWN_SCHEDULER),
    Mutant(CONFIGURED, "        if asked:\n", "        if False:\n", REFUSED),
    Mutant(CONFIGURED, "    scheduler.max_num_batched_tokens = tokens\n", "", RESTORED),
    Mutant(VERIFIED, ".abs() > 1)", ".abs() > 999)", NEIGHBOURS),
    Mutant("vllm_dsv4_indexer/entries.py", "TIES = 1e-4", "TIES = 1e-3", NEIGHBOURS),
    Mutant(VERIFIED, "if not all(map(torch.equal,", "if False and all(map(torch.equal,", STRAY),
    # Which rows have a page.
    Mutant(
        LATER,
        "start - start % ratio - rows_at_hit(ratio))",
        "start - start % ratio)",
        OF_PROMPT,
    ),
    Mutant(
        LATER,
        "start - start % ratio - rows_at_hit(ratio))",
        "start - rows_at_hit(ratio))",
        OF_PROMPT,
    ),
    Mutant(STATE, "return self.drafts * self.steps", "return 0", ENOUGH),
    Mutant(STATE, "rows_at_hit(ratio) + 1", "stock.sliding_window", OF_PROMPT),
    Mutant(STATE, " if self.enable_caching else 0", " * 0", SAME_HITS),
    Mutant(
        STATE, "(first * size // hits + 1) * hits", "(first * size // hits + 2) * hits", OF_PROMPT
    ),
    Mutant(STATE, "if kv_cache_spec.rows_at_hit:", "if True:", ANY_HIT),
    Mutant(STATE, "if not blocks[place].is_null]", "if place == first]", ENOUGH),
    Mutant(STATE, "return min(hits + left, all_rows)", "return 3", ENOUGH),
    # What checked mode and captures see.
    Mutant(INVARIANTS_FILE, "start % ratio - (window - ratio))", "start % ratio)", TOLD),
    Mutant(INVARIANTS_FILE, "start % ratio - (window - ratio))", "start % ratio - ratio)", FREED),
    Mutant(
        INVARIANTS_FILE, "closes = positions % ratio == ratio - 1", "closes = k_slots >= 0", TOLD
    ),
    Mutant(CHECKS, "            ledger.forget(keys)\n", "", GIVEN_AWAY),
    Mutant(CHECKS, "if geometry.ratio != written.ratio:", "if False:", GIVEN_AWAY),
    Mutant(CHECKS, "if geometry.ratio != written.ratio:", "if True:", GIVEN_AWAY),
    Mutant(COMPRESSOR, 'all_saved=self.settings.state_save == "full"', "all_saved=True", LEFT_OUT),
    Mutant(CAPTURES, "wrong | ~rotated.isfinite().all(dim=1)", "wrong", NOT_FINITE),
    Mutant(CAPTURES, ".setdefault(bound.geometry, name)", ".setdefault(0, name)", OF_EACH_KIND),
    # The tokens of vllm-ascend's requests.
    Mutant(LISTED, "right=True, out_int32=True", "out_int32=True", SLOTS),
    Mutant(LISTED, "    real &= position >= 0\n", "", TOO_EARLY),
    Mutant(LISTED, "(block > 0)", "(block >= 0)", NULL),
    Mutant(LISTED, " & (column < table.shape[1])", "", BEYOND),
    Mutant(LISTED, "position // RATIO, k_page", "position // RATIO + 1, k_page", SLOTS),
    Mutant(
        LISTED, "requests.k_block_table, position", "requests.state_block_table, position", SLOTS
    ),
    Mutant(LISTED, "% RATIO == RATIO - 1", "% RATIO == 0", SLOTS),
    Mutant(LISTED, "(requests.slot_mapping[:tokens] >= 0)", "True", NOT_WRITTEN),
    Mutant(PARTED, "slots[:, 0]", "slots[:, 1]", PARTS),
    Mutant(PARTED, "[1:] + tokens_of(first)", "[1:]", PARTS),
    Mutant(PARTED, "state.block_table[:count]", "keys.block_table[:count]", STORES),
    # Our keys in vllm-ascend.
    Mutant(KEYS, "        main.wait_stream(beside)\n", "", BESIDE),
    Mutant(KEYS, "            beside.wait_event(projected)\n", "", BESIDE),
    Mutant(KEYS, "eps=self.compressor.norm_eps", "eps=1e-6", STORES),
    Mutant(KEYS, "(*metadata, capturing)", "metadata", CAPTURE),
    Mutant(KEYS, "any(new is not old for", "any(False for", NEW_CACHES),
    Mutant(KEYS, "wkv.weight.data, wgate.weight.data = self", "_ = self", NEW_WEIGHTS),
    Mutant(
        KEYS, "[wkv.weight.data, wgate.weight.data]", "[wgate.weight.data, wkv.weight.data]", STORES
    ),
    Mutant(KEYS, "in (compressor.wkv, compressor.wgate):", "in (compressor.wkv,):", QUANTISED),
    Mutant(LOADING, "if len(found) != indexers:", "if False:", TOO_FEW),
    Mutant(LOADING, "for table in tables]", "for table in tables[::-1]]", STORES),
    Mutant(
        SECOND_FAMILY,
        "return hidden_states.new_empty(0, self.head_dim), None",
        "return super().forward(hidden_states, state_cache, metadata)",
        STOCK,
    ),
    Mutant(
        SECOND_FAMILY,
        "wait_for_device_metadata(DeviceMetadataStage.COMPRESSOR, group)",
        "DeviceMetadataStage",
        WAITS,
    ),
    Mutant(
        SECOND_FAMILY, "    if group is None:  # of context", "    if False:  # of context", WAITS
    ),
    Mutant(SECOND_FAMILY, "        if write_cache:\n", "        if True:\n", NOT_TO_WRITE),
    Mutant(SECOND_FAMILY, "type(attention) is AscendDSACPImpl:", "False:", PARALLEL),
    Mutant(
        SECOND_FAMILY,
        "indexer.keys = keys_of(indexer,",
        "indexer.keys = keys_of(found[0].indexer,",
        OWN_KEYS,
    ),
    Mutant(
        FIRST,
        "attention.keys = keys_of(attention.indexer,",
        "attention.keys = keys_of(found[0].indexer,",
        OWN_KEYS,
    ),
    Mutant(FIRST, "        if self.mixed is None:\n", "        if True:\n", BEHIND_LAST),
    Mutant(FIRST, "self.mixed if with_prefill else None", "self.mixed", IN_ONE_CALL),
    Mutant(FIRST, "            self.mixed = None\n", "            pass\n", STORES),
    Mutant(FIRST, "return q, None, *caches,", "return q, q, *caches,", STOCK),
    Mutant(
        FIRST,
        "(state.decode, keys.decode), (state.prefill, keys.prefill)",
        "(state.prefill, keys.prefill), (state.decode, keys.decode)",
        STORES,
    ),
    Mutant(FIRST, "        AscendDSABackend.get_impl_cls = stock\n", "        pass\n", COULD_NOT),
    Mutant(FIRST, "            self.made.append(self)\n", "            pass\n", DRAFT_MODEL),
]
