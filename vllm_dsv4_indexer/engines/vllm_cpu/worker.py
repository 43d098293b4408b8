"""The worker of vLLM's CPU engine that runs our compressor.

It loads the model, replaces the compressor of every indexer and the projection in front of it,
supplies each step with metadata, and logs what the op did.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines import indexers_of_stage, refuse
from vllm_dsv4_indexer.engines.account import Accountable
from vllm_dsv4_indexer.engines.captures import Captures
from vllm_dsv4_indexer.engines.vllm_cpu import projects_exactly
from vllm_dsv4_indexer.engines.vllm_cpu.checks import Checks
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import FORMATS, replace_compressors
from vllm_dsv4_indexer.engines.vllm_cpu.configuration import resolve_state_save
from vllm_dsv4_indexer.engines.vllm_cpu.patches import metadata_on_cpu
from vllm_dsv4_indexer.engines.vllm_cpu.projection import exact_projections
from vllm_dsv4_indexer.engines.vllm_cpu.signatures import check_signatures
from vllm_dsv4_indexer.engines.vllm_cpu.verification import verify
from vllm_dsv4_indexer.settings import Settings

if TYPE_CHECKING:
    from vllm_dsv4_indexer.engines.vllm_cpu.explanation import Explanation

logger = init_logger("vllm.dsv4_indexer")


class Worker(Accountable, CPUWorker):
    """vLLM's CPU worker with our compressor in the model and our metadata under it."""

    def load_model(self, **kwargs: Any) -> None:
        settings = resolve_state_save(self.settings.on("cpu"), self.vllm_config)
        exact = projects_exactly(settings)
        impl = settings.impl
        if impl != "stock":
            for k_format in FORMATS:
                ops.prepare(impl, "cpu", k_format)
        check_signatures()
        with exact_projections() if exact else nullcontext():
            super().load_model(**kwargs)
        indexers = indexers_of_stage(self.vllm_config)
        layers = replace_compressors(
            self.get_model(),
            settings,
            indexers,
            request_ids=lambda: self.model_runner.input_batch.req_ids,
            **self._watch(settings),
        )
        if settings.untested == "verify" and impl != "stock":
            verify(layers)
        make_stage_input(self.model_runner)
        who = "vLLM's own compressor" if impl == "stock" else f"impl={impl}"
        what = "exact" if exact else "the engine's own, rounded to bfloat16"
        message = "DSV4_INDEXER: %s compresses for the indexers of %d layers; projection: %s"
        logger.info(message, who, indexers, what)
        if settings.check == "on":
            logger.info("DSV4_INDEXER: checked: a step that breaks an invariant is refused")

    def _watch(self, settings: Settings) -> dict[str, Any]:
        """What the compressors share, to look at a step with."""
        when, folder = settings.capture_when, settings.capture
        return dict(
            checks=Checks() if settings.check == "on" else None,
            captures=None if folder is None else Captures(folder, when, self.rank),
        )

    def determine_available_memory(self) -> int:
        """vLLM's error about too little of it does not name the size of a step as a remedy."""
        available: int = super().determine_available_memory()
        config = self.vllm_config
        told = self._explain()
        if (
            told
            and available < told.least_bytes
            # Else vLLM takes another number of bytes, or a context that fits.
            and config.cache_config.num_gpu_blocks_override is None
            and config.model_config.original_max_model_len != -1
        ):
            logger.warning("DSV4_INDEXER: %s", told.too_little(available))
        return available

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if told := self._explain(kv_cache_config.kv_cache_groups):
            logger.info("DSV4_INDEXER: %s", told)

    def _explain(self, groups: list[KVCacheGroupSpec] | None = None) -> "Explanation | None":
        """groups: of the caches; None: those that vLLM will make of their specs."""
        try:
            from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

            from vllm_dsv4_indexer.engines.vllm_cpu.explanation import Explanation

            if groups is None:
                groups = get_kv_cache_groups(self.vllm_config, dict(self.get_kv_cache_spec()))
            return Explanation.of(self.vllm_config, groups)
        except (ImportError, AttributeError, TypeError) as error:  # in a version nobody has tested
            logger.warning_once("DSV4_INDEXER: the caches cannot be explained: %s", error)
            return None

    def reload_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: vLLM 0.32 packs its CPU experts a second time, and they answer otherwise."""
        refuse(
            "the weights are to be reloaded",
            "the weights of the start, on vLLM's CPU engine",
            "start a new engine",
        )

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        with metadata_on_cpu():
            return super().execute_model(*args, **kwargs)


def make_stage_input(runner: CPUModelRunner) -> None:
    """Make the buffer into which a pipeline stage receives what the stage before it sends.

    vLLM 0.32 makes it in the dummy run that warms a compiled model up, and does not compile
    DeepSeek-V4 on a CPU.
    """
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            runner.max_num_tokens, runner.dtype, runner.device
        )
