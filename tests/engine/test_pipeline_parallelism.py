"""Two pipeline stages, each in a worker of its own, against one worker that has all layers."""

from engine import MIXED_LENGTHS, largest_difference
from test_generation import SHAPE_TOLERANCE

ROUNDS = 2  # each prompt alone, all together
TOKENS = ROUNDS * sum(length + 7 for length in MIXED_LENGTHS)
ENTRIES = ROUNDS * sum((length + 7) // 4 for length in MIXED_LENGTHS)


def test_two_stages_answer_bit_for_bit_as_one(two_stages, one_stage):
    """What a stage hands to the next is what a layer hands to the next, and no sum has another
    order."""
    for one, two in zip(one_stage.rounds[:-1], two_stages.rounds[:-1], strict=True):
        assert one == two


def test_two_stages_with_two_steps_in_flight_answer_as_one(two_stages, one_stage):
    """Together the prompts are divided into other steps than in one worker, so that batches have
    other shapes."""
    for one, two in zip(one_stage.rounds[-1], two_stages.rounds[-1], strict=True):
        assert largest_difference(one, two) <= SHAPE_TOLERANCE


def test_each_stage_gives_an_account_of_its_own_indexers(two_stages):
    """Layers 0 to 2 have one, layers 3 to 5 two."""
    for rank, indexers in enumerate((1, 2)):
        assert f"compresses for the indexers of {indexers} layers" in two_stages.log
        _, tokens, entries, _ = two_stages.work(rank)
        assert (tokens, entries) == (indexers * TOKENS, indexers * ENTRIES)
