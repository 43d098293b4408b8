"""A worker's account of what the op did in its process: the proof, in the log, that an engine
really calls it."""

import time
from typing import Any

from vllm.logger import init_logger

from vllm_dsv4_indexer import ops

SECONDS = 10  # as often as vLLM logs its own statistics

logger = init_logger("vllm.dsv4_indexer")


class Accountable:
    """Mixed into a worker of vLLM's. It logs not at shut-down alone: vLLM kills the workers of a
    server when it stops."""

    _account_due = 0.0

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        output = super().execute_model(*args, **kwargs)
        if time.monotonic() > self._account_due:
            self._log_account()
        return output

    def shutdown(self) -> None:
        self._log_account()
        super().shutdown()

    def _log_account(self) -> None:
        """What the op did in this process so far."""
        logger.info("DSV4_INDEXER: rank %d: %s", self.rank, ops.work)
        self._account_due = time.monotonic() + SECONDS
