"""When a worker captures the inputs of a layer's step: settings `capture` and `capture_when`.
Nothing here stops the engine, or hides the error that is captured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_dsv4_indexer.capture import Capture
from vllm_dsv4_indexer.contract import FP8_PAGE_ENTRIES, HEAD_DIM, ContractError, Layer, Step

MOST_FILES = 8  # in a folder, of all its workers
NOT_A_NUMBER = 0x7F  # the code in e4m3fn, but for its sign

logger = init_logger("vllm.dsv4_indexer")


class Captures:
    """Of one worker. Its layers share it."""

    def __init__(self, folder: str, when: str | int, rank: int):
        self._folder, self._when, self._rank = Path(folder), when, rank
        self._steps, self._first = 0, ""

    @contextmanager
    def around(
        self, name: str, layer: Layer, step: Step, kv_score: Tensor, eps: float
    ) -> Iterator[None]:
        """Of what happens meanwhile: a step of the layer of that name."""
        self._first = self._first or name
        first = name == self._first
        self._steps += first
        inputs = layer, step, kv_score, eps
        if first and self._steps == self._when:
            self._save(name, f"step {self._steps}", *inputs)
        try:
            yield
        except ContractError as error:
            if self._when == "error":
                self._save(name, str(error), *inputs)
            raise
        # What the step has saved by now, it does not read: its own rows come first.
        if self._when == "not_finite" and len(tokens := _not_finite(layer, step)):
            self._save(name, f"token {int(tokens[0])} has an entry that is not finite", *inputs)

    def _save(
        self, name: str, why: str, layer: Layer, step: Step, kv_score: Tensor, eps: float
    ) -> None:
        if len(list(self._folder.glob("*.safetensors"))) >= MOST_FILES:
            return logger.warning_once("DSV4_INDEXER: %s is full of captures", self._folder)
        about = dict(layer=name, why=why, step=str(self._steps), rank=str(self._rank))
        when = time.strftime("%Y%m%d-%H%M%S")
        file = self._folder / f"{when}-rank{self._rank}-step{self._steps}-{name}.safetensors"
        try:
            Capture.of(layer, step, kv_score, eps, about).save(file)
            logger.warning("DSV4_INDEXER: captured %s: %s", file, why)
        except Exception as error:
            logger.warning("DSV4_INDEXER: no capture in %s: %s", file, error)


def _not_finite(layer: Layer, step: Step) -> Tensor:
    """The tokens whose entries have a code that is not a number. An infinite value gives none
    other."""
    tokens = (step.k_slot_mapping >= 0).nonzero()[:, 0]
    slots = step.k_slot_mapping[tokens]
    first = slots % FP8_PAGE_ENTRIES * HEAD_DIM
    channels = first[:, None] + torch.arange(HEAD_DIM)
    codes = layer.k_cache.flatten(1)[slots[:, None] // FP8_PAGE_ENTRIES, channels]
    return tokens[(codes & NOT_A_NUMBER == NOT_A_NUMBER).any(dim=1)]
