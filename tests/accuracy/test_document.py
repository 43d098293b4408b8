"""The haystacks: every kind of place has a needle, and every needle has a decoy on both sides."""

from collections import Counter

import pytest
from burst import BURST, make_burst

from vllm_dsv4_indexer.accuracy.document import PAGE, make_document
from vllm_dsv4_indexer.checkpoint.needle import DECOYS, KEYS, VALUES

CHUNK = 509


@pytest.fixture(scope="module", params=range(3), ids="seed {}".format)
def document(request):
    return make_document(8192, seed=request.param, chunk=CHUNK)


def test_every_entry_hosts_one_pair_and_no_key_occurs_twice(document):
    keys = [
        position
        for position, token in enumerate(document.tokens)
        if token in KEYS or token in DECOYS
    ]
    assert [(position + 1) // 4 for position in keys] == list(range(2048))
    assert all(document.tokens[position + 1] in VALUES for position in keys)
    assert len({document.tokens[position] for position in keys}) == 2048


def test_a_needle_has_a_decoy_in_the_entry_before_and_after_it(document):
    decoys = {
        (position + 1) // 4 for position, token in enumerate(document.tokens) if token in DECOYS
    }
    beside = {needle.entry + side for needle in document.needles for side in (-1, 1)} - {-1, 2048}
    assert decoys == beside


def test_needles_say_where_their_key_and_value_are(document):
    for needle in document.needles:
        assert document.tokens[needle.position] == KEYS[needle.key]
        assert document.tokens[needle.position + 1] == needle.value
        assert needle.entry == (needle.position + 1) // 4


def test_keys_stand_at_every_position_of_a_group(document):
    assert min(Counter(needle.position % 4 for needle in document.needles).values()) >= 20


def test_needles_lie_in_the_first_and_last_entry_and_at_the_borders_of_pages(document):
    entries = {needle.entry for needle in document.needles}
    assert {0, 2047} <= entries
    at_pages = sum(bool({page, page - 1} & entries) for page in range(PAGE, 2048, PAGE))
    assert at_pages >= 2048 // PAGE - 2  # one may be too near to the border of a chunk


def test_windows_of_needles_lie_across_the_borders_of_chunks(document):
    across = [n for n in document.needles if n.position // CHUNK < (4 * n.entry + 3) // CHUNK]
    assert len(across) == 16


def test_the_same_arguments_give_the_same_document():
    assert make_document(1024, seed=1) == make_document(1024, seed=1) != make_document(1024, seed=2)


def test_documents_of_a_burst_part_behind_the_key_of_their_needle():
    documents = make_burst(512, seed=1)
    assert len(documents) == BURST == len({document.tokens[512] for document in documents})
    for document in documents:
        assert document.tokens[:512] == documents[0].tokens[:512]
        (needle,) = document.needles
        assert (needle.position, needle.entry) == (511, 128) and len(document.tokens) % 4 == 0
        assert document.tokens[511:513] == [KEYS[needle.key], needle.value]
