"""The cost model's counts are those of the kernels as they are."""

import pytest

import cost_model
import count

COUNTS = cost_model.load_counts()


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
def test_the_plan_of_a_step_told_by_its_requests_takes_less_than_one_layer(tokens):
    for assumed in cost_model.variations():
        plan, layer = (
            cost_model.kernel_cycles(COUNTS[n][tokens], assumed)
            for n in ("plan_requests", "one_pass")
        )
        assert plan < layer, assumed


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("other", ["overlay_scan", "scatter_pool"])
def test_one_pass_takes_fewer_modelled_cycles_under_every_assumption(tokens, other):
    _, least, most = cost_model.saving(COUNTS[other][tokens], COUNTS["one_pass"][tokens])
    assert 0 < least <= most < 1


def test_a_core_takes_as_long_as_its_busiest_unit():
    core = {
        "read_bytes": 180,
        "write_bytes": 0,
        "reads": 1,
        "writes": 0,
        "scalar_local": 3,
        "scalar_global": 0,
        "vector": {"Exp/float": [1, 10], "Cast/int8_t": [1, 5]},
    }
    assumed = cost_model.Assumptions(
        bytes_per_cycle=18, transfer=5, vector_issue=1, scalar_local=2, scalar_global=9
    )
    assert cost_model.core_cycles(core, assumed) == 1 + 20 + 1 + 5
    assert cost_model.core_cycles(core | {"vector": {}}, assumed) == 10 + 5
    assert cost_model.core_cycles(core | {"vector": {}, "scalar_global": 9}, assumed) == 6 + 81


def test_the_yardstick_is_printed_before_the_result():
    printed = cost_model.report()
    places = [
        printed.index(text)
        for text in (
            "45.6%",
            "Counts a token",
            "Modelled cycles",
            "Counts and modelled",
            "A step of 21",
            "Hadamard",
            "Assumptions",
        )
    ]
    assert places == sorted(places) and "nothing here was measured on an NPU" in printed
