"""Whatever vLLM's scheduler does: every row that a window takes is what its request's own tokens
give, so is every row and entry that a token reads, and checked mode refuses no step.

Hypothesis draws the cases, the same in every run, and shrinks one that fails. So many others:
CASES=2000 pytest tests/engine/test_schedules.py
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from random import Random
from typing import Any

import hypothesis
import pytest
import torch
from symbolic import random_case, run, symbolic_core
from torch import Tensor
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import SlidingWindowMLASpec

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines.vllm_cpu.state import ReadableStateSpec
from vllm_dsv4_indexer.errors import UserError
from vllm_dsv4_indexer.ops import reference
from vllm_dsv4_indexer.settings import Settings

CASES = int(os.environ.get("CASES", 0))
SEEDS = range(8)  # of cases in which a planted fault is found
DRAFTS = dict(method="custom_class", model="symbolic.Drafts", num_speculative_tokens=6)
CPU, REFERENCE = Settings(impl="cpu", check="on"), Settings(impl="reference")


@pytest.fixture(scope="module", params=[None, DRAFTS], ids=["no drafts", "drafts"])
def core(request, tmp_path_factory) -> Iterator[EngineCore]:
    folder = tmp_path_factory.mktemp("symbolic")
    with symbolic_core(folder, speculative_config=request.param) as core:
        yield core


def test_every_row_and_entry_that_is_read_is_what_the_requests_own_tokens_give(core):
    found = Counter()

    @hypothesis.settings(
        max_examples=CASES or 60,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        print_blob=True,
    )
    @hypothesis.given(hypothesis.strategies.randoms(note_method_calls=True))
    def serve(draw: Random) -> None:
        found.update(run(core, random_case(core, draw), CPU))

    serve()
    # Else it would show nothing.
    assert found["preemptions"] > 0 and found["rows of other requests"] > 0
    if core.use_spec_decode:
        assert found["drafts"] > found["accepted drafts"] > 0


def without_rule_2(windows: Any, step: Any, page: int) -> Tensor:
    """The history as it was before the call, whoever fills it in the call."""
    alone = step._replace(inner_state_slot_mapping=torch.full_like(step.positions, -1))
    return SOURCES(windows, alone, page)


SOURCES, PLAN = reference._sources, ops.plan
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def next_entry(positions, requests, slots, table, k_slots) -> Step:
    return positions, requests, slots, table, k_slots + (k_slots >= 0).long()


def table_of_another(positions, requests, slots, table, k_slots) -> Step:
    return positions, requests, slots, table.roll(1, 0), k_slots


def null_blocks(positions, requests, slots, table, k_slots) -> Step:
    return positions, requests, slots, torch.zeros_like(table), k_slots


def last_rows_not_saved(positions, requests, slots, table, k_slots) -> Step:
    ends = requests != torch.cat([requests[1:], requests.new_tensor([-1])])
    return positions, requests, slots.masked_fill(ends, -1), table, k_slots


def planned_of(fault: Callable[..., Step]) -> Callable[..., Tensor]:
    """`ops.plan`, given a step that a faulty engine would give it."""
    return lambda *step, **options: PLAN(*fault(*step), **options)


def no_group_before(spec: ReadableStateSpec, start: int) -> int:
    return start - start % spec.ratio


FAULTS = {
    "the group before the open one has no page": (ReadableStateSpec, "first_read", no_group_before),
    "history as it was before the call": (reference, "_sources", without_rule_2),
    "K slot off by one": (ops, "plan", planned_of(next_entry)),
    "the table of another request": (ops, "plan", planned_of(table_of_another)),
    "null blocks": (ops, "plan", planned_of(null_blocks)),
    "the last row of a call is not saved": (ops, "plan", planned_of(last_rows_not_saved)),
}


def test_rejected_drafts_need_the_rows_that_they_go_back_to(core, monkeypatch):
    if not core.use_spec_decode:
        assert not any(spec.rollback for spec in state_specs(core))
        return
    monkeypatch.setattr(ReadableStateSpec, "rollback", 0)
    with pytest.raises(UserError, match="which the window that token"):
        for seed in SEEDS:
            run(core, random_case(core, Random(seed)), CPU)


def test_prefixes_hit_where_they_do_with_full_saving(core):
    cases = [replace(random_case(core, Random(seed)), blocks=4000) for seed in SEEDS]
    hits = [run(core, case, CPU)["cached tokens"] for case in cases]
    config = core.scheduler.kv_cache_config
    groups = list(map(all_rows, config.kv_cache_groups))
    core.scheduler.kv_cache_config = replace(config, kv_cache_groups=groups)
    try:
        assert hits == [run(core, case, CPU)["cached tokens"] for case in cases]
    finally:
        core.scheduler.kv_cache_config = config
    assert sum(hits) > 0


def state_specs(core: EngineCore) -> list[ReadableStateSpec]:
    specs = [group.kv_cache_spec for group in core.scheduler.kv_cache_config.kv_cache_groups]
    return [spec for spec in specs if isinstance(spec, ReadableStateSpec)]


def all_rows(group: Any) -> Any:
    """With the spec that vLLM has for a state."""
    spec = group.kv_cache_spec
    if isinstance(spec, ReadableStateSpec):
        given = {field.name: getattr(spec, field.name) for field in fields(SlidingWindowMLASpec)}
        given["sliding_window"] += spec.ratio - 1
        spec = SlidingWindowMLASpec(**given)
    return replace(group, kv_cache_spec=spec)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(core, fault, monkeypatch):
    monkeypatch.setattr(*fault)
    # Then block 0 is read, as in a kernel that does not check.
    monkeypatch.setattr(reference, "_check_windows", lambda *_: None)
    with pytest.raises(AssertionError, match="what (the request's|its) tokens give"):
        for seed in SEEDS:
            run(core, random_case(core, Random(seed)), REFERENCE)
