"""Two pipeline stages, each in a worker of its own, against one worker that has all layers."""

from engine import MIXED_LENGTHS, SHAPE_TOLERANCE, largest_difference

ROUNDS = 2  # each prompt alone, all together
TOKENS = ROUNDS * sum(length + 7 for length in MIXED_LENGTHS)
ENTRIES = {
    ratio: ROUNDS * sum((length + 7) // ratio for length in MIXED_LENGTHS) for ratio in (4, 128)
}


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


def test_each_stage_gives_an_account_of_its_own_compressors(two_stages):
    """Layers 0 to 2 have one layer with an indexer, layers 3 to 5 two; both have one with the ratio
    128. A layer with an indexer has two compressors."""
    for rank, indexers in enumerate((1, 2)):
        assert f"compresses for the indexers of {indexers} layers" in two_stages.log
        _, tokens, entries, _ = two_stages.work(rank)
        assert tokens == (2 * indexers + 1) * TOKENS
        assert entries == 2 * indexers * ENTRIES[4] + ENTRIES[128]
