"""A worker's account of what the op did in its process: the proof that an engine calls it."""

import json
import time
from dataclasses import asdict
from functools import cached_property
from typing import Any

from vllm.logger import init_logger

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines.metrics import Published
from vllm_dsv4_indexer.settings import Settings

SECONDS = 10  # as often as vLLM logs its own statistics

logger = init_logger("vllm.dsv4_indexer")


class Accountable:
    """Mixed into a worker of vLLM's. It gives its account not at shut-down alone: vLLM kills the
    workers of a server when it stops."""

    rank: int
    vllm_config: Any
    _account_due = 0.0

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        published = self._published  # made before its first step, which counts
        output = super().execute_model(*args, **kwargs)  # type: ignore[misc]
        published.update(ops.work)
        if time.monotonic() > self._account_due:
            self._give_account()
        return output

    def shutdown(self) -> None:
        self._give_account()
        super().shutdown()  # type: ignore[misc]

    @cached_property
    def settings(self) -> Settings:
        """The user's, as they were when the worker began: a step does not check them again."""
        return Settings.read(self.vllm_config.additional_config)

    @cached_property
    def _published(self) -> Published:
        return Published(self.rank, ops.work)

    def _give_account(self) -> None:
        """Log what the op did in this process so far, and add it to the file that the settings
        name."""
        logger.info("DSV4_INDEXER: rank %d: %s", self.rank, ops.work)
        self._account_due = time.monotonic() + SECONDS
        file = self.settings.account
        if file is None:
            return
        try:
            with open(file, "a") as accounts:  # one write of a short line: ranks may share the file
                accounts.write(json.dumps({"rank": self.rank, **asdict(ops.work)}) + "\n")
        except OSError as error:
            logger.warning("DSV4_INDEXER: no account in %s: %s", file, error)
