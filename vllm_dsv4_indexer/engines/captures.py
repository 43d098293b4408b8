"""When a worker captures the inputs of a layer's step: settings `capture` and `capture_when`.
Nothing here stops the engine, or hides the error that is captured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from vllm.logger import init_logger

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.capture import Capture
from vllm_dsv4_indexer.contract import ContractError, Geometry, Step
from vllm_dsv4_indexer.entries import NOT_A_NUMBER, Entries

MOST_FILES = 8  # in a folder, of all its workers

logger = init_logger("vllm.dsv4_indexer")


class Captures:
    """Of one worker. Its layers share it."""

    def __init__(self, folder: str, when: str | int, rank: int):
        self._folder, self._when, self._rank = Path(folder), when, rank
        self._steps: dict[str, int] = {}  # by layer, how many it was in
        self._first: dict[Geometry, str] = {}  # the first layer of each kind

    @contextmanager
    def around(
        self, name: str, bound: ops.BoundLayer, step: Step, kv_score: Tensor
    ) -> Iterator[None]:
        """Captures, where it is asked for, the step of layer `name` that runs meanwhile."""
        number = self._steps[name] = self._steps.get(name, 0) + 1
        first = self._first.setdefault(bound.geometry, name) == name
        inputs = bound, step, kv_score
        if first and number == self._when:
            self._save(name, f"step {number}", *inputs)
        try:
            yield
        except ContractError as error:
            if self._when == "error":
                self._save(name, str(error), *inputs)
            raise
        # What the step has saved by now, it does not read: its own rows come first.
        if self._when == "not_finite" and len(tokens := _not_finite(bound, step)):
            self._save(name, f"token {int(tokens[0])} has an entry that is not finite", *inputs)

    def _save(
        self, name: str, why: str, bound: ops.BoundLayer, step: Step, kv_score: Tensor
    ) -> None:
        if len(list(self._folder.glob("*.safetensors"))) >= MOST_FILES:
            return logger.warning_once("DSV4_INDEXER: %s is full of captures", self._folder)
        number = self._steps[name]
        about = dict(layer=name, why=why, step=str(number), rank=str(self._rank))
        when = time.strftime("%Y%m%d-%H%M%S")
        file = self._folder / f"{when}-rank{self._rank}-step{number}-{name}.safetensors"
        try:
            Capture.of(bound.layer, bound.k_format, step, kv_score, bound.eps, about).save(file)
            logger.warning("DSV4_INDEXER: captured %s: %s", file, why)
        except Exception as error:
            logger.warning("DSV4_INDEXER: no capture in %s: %s", file, error)


def _not_finite(bound: ops.BoundLayer, step: Step) -> Tensor:
    """The tokens whose entries have a number that is not finite. Among codes only a NaN is none."""
    tokens = step.closing(bound.geometry.ratio)
    entries = Entries.of(bound.layer.k_cache, bound.k_format)
    codes, rotated, _ = entries.at(step.k_slot_mapping[tokens])
    wrong = (codes & NOT_A_NUMBER == NOT_A_NUMBER).any(dim=1)
    return tokens[wrong | ~rotated.isfinite().all(dim=1)]
