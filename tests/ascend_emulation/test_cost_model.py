"""The cost model's counts are those of the kernels as they are."""

from dataclasses import replace
from pathlib import Path

import pytest

import cost_model
import count

COUNTS = cost_model.load_counts()
DOCS = Path(__file__).parents[2] / "docs" / "ascend.md"


# Without the 17 million position tests of the overlay scan at T=8192: they take too long to repeat.
REPEATED = [
    (n, t)
    for n, lengths in count.LENGTHS.items()
    for t in lengths
    if (n, t) != ("overlay_scan", 8192)
]
TOKENS = count.LENGTHS["one_pass"]


@pytest.mark.parametrize("name, tokens", REPEATED)
def test_the_counts_are_up_to_date(ascend_emulation, name, tokens):
    expected = COUNTS[name][tokens]
    assert count.count(ascend_emulation, name, tokens) == expected, (
        "run tests/ascend_emulation/count.py"
    )


@pytest.mark.parametrize("tokens", [t for t in TOKENS if t >= 2048])
def test_one_pass_moves_at_most_4_and_a_half_kib_a_token(tokens):
    (launch,) = COUNTS["one_pass"][tokens]
    assert launch["all"]["read_bytes"] + launch["all"]["write_bytes"] <= 4.5 * 1024 * tokens


@pytest.mark.parametrize("name", cost_model.PLANS)
def test_a_plan_is_one_launch(name):
    assert all(len(launches) == 1 for launches in COUNTS[name].values())


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_plan_of_a_step_told_by_its_requests_takes_less_than_one_of_its_layers(tokens):
    plan, layer = plan_and_layer(tokens, cost_model.Assumptions())
    assert plan < layer


@pytest.mark.parametrize("tokens", TOKENS)
def test_it_takes_less_than_two_layers_under_every_assumption(tokens):
    for assumed in cost_model.variations():
        plan, layer = plan_and_layer(tokens, assumed)
        assert plan < 2 * layer, assumed


def plan_and_layer(tokens: int, assumed: cost_model.Assumptions) -> list[float]:
    return [
        cost_model.kernel_cycles(COUNTS[name][tokens], assumed)
        for name in ("plan_requests", "one_pass")
    ]


@pytest.mark.parametrize("part, published", cost_model.PUBLISHED.items())
def test_the_change_that_was_published_is_within_the_assumptions_and_the_docs_say_how_far_off(
    part, published
):
    central, least, most = cost_model.published_change(COUNTS)[part]
    assert least < published < most
    assert all(f"{100 * saved:.1f} %" in DOCS.read_text() for saved in (published, central))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("other", ["overlay_scan", "scatter_pool"])
def test_one_pass_takes_fewer_modelled_cycles_under_every_assumption(tokens, other):
    _, least, most = cost_model.saving(COUNTS[other][tokens], COUNTS["one_pass"][tokens])
    assert 0 < least <= most < 1


ASSUMED = cost_model.Assumptions(transfer=5, head=20, issue=1, scalar_local=2, scalar_global=9)
CORE = {
    "read_bytes": 182,
    "write_bytes": 91,
    "reads": 1,
    "writes": 1,
    "scalar_local": 3,
    "scalar_global": 1,
    "tiles": 1,
    "vector": {"Exp/float": [1, 10, 1, 10], "Add/float": [1, 5, 0, 10]},
    "after": {"Div/float": [1, 2, 1, 2]},
}
SCALAR, LOAD, COMPUTE, STORE = 2 * 1 + 3 * 2 + 9, 10 + 5, 20 + 2 * 10 + 10, 5 + 5
AFTER = 20 + 2 * 4


def test_each_unit_takes_what_the_vendor_says_and_what_is_assumed():
    assert cost_model.unit_cycles(CORE, 48, ASSUMED) == (SCALAR, LOAD, COMPUTE, STORE)


def test_a_core_alone_gets_three_times_the_bandwidth_of_one_among_48():
    _, load, _, _ = cost_model.unit_cycles(CORE | {"read_bytes": 545}, 1, ASSUMED)
    assert load == 10 + 5


def test_the_bytes_alone_take_the_longer_of_the_two_ways_in_each_launch():
    launches = [{"cores": cores, "busiest": CORE} for cores in (48, 1)]
    assert cost_model.bytes_cycles(launches, ASSUMED) == pytest.approx(10 + 182 / 54.5)


def test_vector_instructions_that_wait_for_nothing_are_made_one_after_the_other():
    slow = cost_model.Assumptions(issue=30)
    assert cost_model.vector_cycles({"Add/float": [4, 4, 0, 8]}, slow) == 4 * 30


def test_one_tile_passes_the_units_in_turn_and_what_comes_after_overlaps_its_store():
    before = SCALAR + LOAD + COMPUTE
    assert cost_model.core_cycles(CORE, 48, ASSUMED) == before + max(STORE, AFTER)


def test_tiles_overlap_and_the_slowest_unit_decides():
    def cycles(tiles: int, loads: int, computes: int) -> float:
        core = CORE | {
            "read_bytes": 0,
            "write_bytes": 0,
            "reads": loads * tiles,
            "writes": 2 * tiles,
            "scalar_local": 0,
            "scalar_global": 0,
            "tiles": tiles,
            "vector": {"Add/float": [tiles, computes * tiles, 0, computes * tiles]},
            "after": {},
        }
        return cost_model.core_cycles(core, 48, replace(ASSUMED, issue=0.75))

    assert [cycles(n, 2, 10) for n in (1, 2, 5)] == [33, 33 + 10, 33 + 4 * 10]
    assert [cycles(n, 2, 30) for n in (1, 2, 5)] == [53, 53 + 30, 53 + 4 * 30]
    assert cycles(2, 6, 10) == 6 + 30 + 10 + 10 + 30


def test_with_two_buffers_two_tiles_take_what_all_units_do_with_one():
    """A tile is loaded, computed and stored in 10 cycles each."""
    core = CORE | {
        "read_bytes": 0,
        "write_bytes": 0,
        "reads": 6,
        "writes": 6,
        "scalar_local": 0,
        "scalar_global": 0,
        "tiles": 3,
        "vector": {"Add/float": [3, 30, 0, 30]},
        "after": {},
    }
    assumed = replace(ASSUMED, issue=0.75)
    cycles = [cost_model.core_cycles(core, 48, assumed, buffers) for buffers in (3, 2)]
    assert cycles == [33 + 2 * 10, 33 + 2 * 30 / 2]


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_documented_figures_are_the_models(tokens):
    before, after = (COUNTS[name][tokens] for name in ("scatter_pool", "one_pass"))
    central = cost_model.Assumptions()
    cycles = [f"{cost_model.kernel_cycles(x, central):.0f}" for x in (before, after)]
    cycles.append(f"{cost_model.bytes_cycles(after, central):.0f}")
    saved = [f"{100 * part:.1f}" for part in cost_model.saving(before, after)]
    row = f"| {tokens} | {' | '.join(cycles)} | {saved[0]} % ({saved[1]} to {saved[2]}) |"
    assert row in DOCS.read_text()


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_documented_figures_of_the_main_compressor_are_the_models(tokens):
    cycles, low, high = (f"{n:.0f}" for n in cost_model.main_cycles(COUNTS, tokens))
    alone = cost_model.bytes_cycles(COUNTS[cost_model.MAIN][tokens], cost_model.Assumptions())
    row = f"| {tokens} | {cycles} ({low} to {high}) | {alone:.0f} |"
    assert row in DOCS.read_text()


def test_the_yardstick_is_printed_before_the_result():
    printed = cost_model.report()
    places = [
        printed.index(text)
        for text in (
            "45.6%",
            "Counts a token",
            "Modelled cycles",
            "the main compressor",
            "Counts and modelled cycles of a step",
            "A step of 21",
            "Hadamard",
            "Assumptions",
        )
    ]
    assert places == sorted(places) and "nothing here was measured on an NPU" in printed
