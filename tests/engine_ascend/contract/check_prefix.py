"""Requests that share a prefix which one of them computes in the same step store what each stores
alone.

vLLM's scheduler gives a request the pages of another's prefix as computed when that one is
scheduled, not when it has run. So a step can hold a prompt and others that begin where its full
pages end; their first windows need its rows.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from layer import BLOCKS, Layer, Rows
from schedule import store
from torch import Tensor
from vllm_ascend import utils

from vllm_dsv4_indexer.contract import RATIO, WINDOW


@dataclass
class Prompt:
    hidden: Tensor  # [tokens, hidden size]
    state_pages: list[int]
    k_pages: list[int]


@dataclass
class Chunk:
    """The tokens of a prompt that a step computes."""

    prompt: Prompt
    start: int
    end: int


class Burst:
    """A layer, and prompts in pages of its caches."""

    def __init__(self, config, path: str, decode_tokens: int):
        self.layer = Layer(config, multistream=path == "two_streams")
        self.run = self.layer.run_context_parallel if path == "context_parallel" else self.layer.run
        self.decode_tokens = decode_tokens
        for builder in self.layer.builders:
            builder.decode_threshold = decode_tokens
        self.free, self.k_free = (
            random.Random(seed).sample(range(1, BLOCKS), BLOCKS - 1) for seed in range(2)
        )
        self.page, self.k_page = self.layer.page, self.layer.k_page * RATIO  # in positions
        self.before = [storage.clone() for storage in self.layer.storages]
        self.prompts: list[Prompt] = []

    def prompt(self, own: int, like: Prompt | None = None, hit: int = 0) -> Prompt:
        """A prompt of the first `hit` tokens of another, in its pages, and `own` ones."""
        hidden, state_pages, k_pages = self.layer.hidden_states(own), [], []
        if like:
            hidden = torch.cat([like.hidden[:hit], hidden])
            state_pages = like.state_pages[: hit // self.page]
            k_pages = like.k_pages[: hit // self.k_page]
        state_pages += [self.free.pop() for _ in range(hit, len(hidden), self.page)]
        k_pages += [self.k_free.pop() for _ in range(hit, len(hidden), self.k_page)]
        self.prompts.append(Prompt(hidden, state_pages, k_pages))
        return self.prompts[-1]

    def step(self, *chunks: Chunk) -> None:
        """One step of these chunks. Those as short as a decode come first, as in vllm-ascend."""
        chunks = sorted(chunks, key=lambda chunk: chunk.end - chunk.start > self.decode_tokens)
        rows = Rows(
            starts=[chunk.start for chunk in chunks],
            lengths=[chunk.end - chunk.start for chunk in chunks],
            state_tables=[self._state_table(chunk) for chunk in chunks],
            k_tables=[chunk.prompt.k_pages for chunk in chunks],
        )
        x = torch.cat([chunk.prompt.hidden[chunk.start : chunk.end] for chunk in chunks])
        self.run(x, self.layer.metadata(rows))

    def _state_table(self, chunk: Chunk) -> list[int]:
        """The pages a window can still read, and the chunk's; vLLM frees or never hits others."""
        kept, pages = chunk.start - (WINDOW - 1), chunk.prompt.state_pages
        return [page if (i + 1) * self.page > kept else 0 for i, page in enumerate(pages)]

    def assert_each_stored_what_it_stores_alone(self) -> None:
        expected = [storage.clone() for storage in self.before]
        for prompt in self.prompts:
            rows = Rows([0], [len(prompt.hidden)], [prompt.state_pages], [prompt.k_pages])
            with torch.inference_mode():
                store(self.layer, expected, rows, prompt.hidden)
        for name, actual, wanted in zip(("state", "K"), self.layer.storages, expected):
            assert not (differ := (actual != wanted).sum()), f"{differ} bytes of {name} differ"


@pytest.fixture(params=["one_stream", "two_streams", "context_parallel"])
def burst(request, config, monkeypatch):
    if request.param == "context_parallel":
        monkeypatch.setattr(utils, "enable_dsa_cp", lambda: True)
    return lambda decode_tokens=1: Burst(config, request.param, decode_tokens)


@pytest.fixture(scope="module", params=[128, 64, 32], ids="block_size_{}".format)
def config(request, configure):
    """Long enough for prefixes of two pages of keys."""
    return configure(block_size=request.param, max_model_len=2048, max_num_batched_tokens=2048)


@pytest.mark.parametrize("decode_tokens", [1, 4], ids="decode_{}".format)
def test_prompts_behind_one_whose_prefix_they_share(burst, decode_tokens):
    """Those of few own tokens count as decodes, which vllm-ascend calls after the prefills."""
    burst = burst(decode_tokens)
    hit = burst.k_page
    owner = burst.prompt(hit + 60)
    others = [burst.prompt(own, like=owner, hit=hit) for own in (1, 3, 4, 5, 8, 61)]
    burst.step(Chunk(owner, 0, hit + 60), *(Chunk(o, hit, len(o.hidden)) for o in others))
    burst.assert_each_stored_what_it_stores_alone()


def test_prompts_that_are_the_same(burst):
    burst = burst()
    hit = burst.k_page
    owner = burst.prompt(hit + 7)
    same = burst.prompt(7, like=owner, hit=hit)
    same.hidden = owner.hidden
    burst.step(Chunk(owner, 0, hit + 7), Chunk(same, hit, hit + 7))
    burst.assert_each_stored_what_it_stores_alone()


def test_a_prompt_behind_one_that_is_itself_behind_another(burst):
    burst = burst()
    hit = burst.k_page
    first = burst.prompt(hit + 5)
    second = burst.prompt(hit + 3, like=first, hit=hit)
    third = burst.prompt(9, like=second, hit=2 * hit)
    burst.step(
        Chunk(third, 2 * hit, 2 * hit + 9),
        Chunk(first, 0, hit + 5),
        Chunk(second, hit, 2 * hit + 3),
    )
    burst.assert_each_stored_what_it_stores_alone()


@pytest.mark.parametrize("last", [1, 4], ids="last_{}".format)
@pytest.mark.parametrize("own", [4, 50], ids="own_{}".format)
def test_a_prompt_behind_the_last_tokens_of_another(burst, last, own):
    """Such last tokens count as a decode, which vllm-ascend calls after the prefills that need its
    rows."""
    burst = burst(decode_tokens=4)
    hit = burst.k_page
    owner = burst.prompt(hit)
    other = burst.prompt(own, like=owner, hit=hit)
    burst.step(Chunk(owner, 0, hit - last))
    burst.step(Chunk(owner, hit - last, hit), Chunk(other, hit, hit + own))
    burst.assert_each_stored_what_it_stores_alone()


def test_a_prompt_behind_a_prefix_of_an_earlier_step(burst):
    burst = burst()
    hit = burst.k_page
    owner = burst.prompt(hit + 2)
    other = burst.prompt(30, like=owner, hit=hit)
    burst.step(Chunk(owner, 0, hit + 1))
    burst.step(Chunk(owner, hit + 1, hit + 2), Chunk(other, hit, hit + 30))
    burst.assert_each_stored_what_it_stores_alone()
