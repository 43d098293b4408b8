"""vllm-ascend's worker; its model's indexers call our op."""

from functools import cached_property
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm_ascend.worker.worker import NPUWorker

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines import indexers_of_stage
from vllm_dsv4_indexer.engines.account import Accountable
from vllm_dsv4_indexer.engines.vllm_ascend import found
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import k_format
from vllm_dsv4_indexer.engines.vllm_ascend.loading import (
    check_signatures,
    family,
    finish_loading,
)
from vllm_dsv4_indexer.settings import Settings

# 0.23.0 (not its post1) does it after a dummy run's metadata are built, which so have the slots of
# the step before.
SLOTS_ARE_VOIDED_LATE = found().vllm_ascend == "0.23.0"

logger = init_logger("vllm.dsv4_indexer")


class Worker(Accountable, NPUWorker):
    """vllm-ascend's worker; its model's indexers call our op."""

    @cached_property
    def settings(self) -> Settings:
        return Settings.read(self.vllm_config.additional_config.settings)

    def load_model(self) -> None:
        impl = self.settings.on("ascend").impl
        indexers = indexers_of_stage(self.vllm_config)
        if impl == "stock":
            super().load_model()
            logger.info(
                "DSV4_INDEXER: vllm-ascend's own compressor compresses for the indexers of %d "
                "layers",
                indexers,
            )
            return
        ops.prepare(impl, current_platform.device_type, k_format())
        check_signatures()
        with family().while_loading():
            super().load_model()
        finish_loading(
            self.model_runner.get_model(),
            impl,
            indexers,
            self.vllm_config.model_config.max_model_len,
        )
        logger.info(
            "DSV4_INDEXER: impl=%s compresses for the indexers of %d layers", impl, indexers
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens == 0:  # maybe a dummy run
            self._void_slots()
        return super().execute_model(scheduler_output)

    def execute_dummy_batch(self) -> None:
        self._void_slots()
        super().execute_dummy_batch()

    def _void_slots(self) -> None:
        """Have the tokens of a dummy run say "write nothing" before their metadata are built."""
        if not SLOTS_ARE_VOIDED_LATE:
            return
        for table in self.model_runner.input_batch.block_table.block_tables:
            table.slot_mapping.gpu.fill_(-1)
