"""What the backend accepts with vllm-ascend, and the worker that it names."""

from collections.abc import Callable

from packaging.version import Version
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm_ascend.ascend_config import get_ascend_config

from vllm_dsv4_indexer.engines import refuse, require_impl, require_indexer, require_model_runner_v1
from vllm_dsv4_indexer.engines.vllm_ascend import NOT_VERIFIED, found
from vllm_dsv4_indexer.engines.vllm_ascend.carried import Carried
from vllm_dsv4_indexer.settings import Settings

STOCK_WORKER = "vllm_ascend.worker.worker.NPUWorker"
WORKER = "vllm_dsv4_indexer.engines.vllm_ascend.worker.Worker"
# vllm-ascend's weight_nz_mode that keeps unquantised weights in the device's private layout, too;
# from 0.28 on not wkv and wgate
NZ_FOR_BF16 = 2
WKV_AND_WGATE_STAY_PLAIN = Version(found().vllm_ascend) >= Version("0.28.0rc1")

logger = init_logger("vllm.dsv4_indexer")


def configure(
    vllm_config: VllmConfig, check_and_update_config: Callable[[VllmConfig], None]
) -> None:
    """Check that the backend can do what is asked, and have vLLM run our worker.

    vllm-ascend drops the name of the backend twice: its platform resets it to None, and ignores it
    where it chooses attention classes. The worker's name survives, in every process.

    vllm_config: the configuration, complete but for what the platform sets.
    check_and_update_config: the platform's own function, called in between.
    Raises UserError that says what was found, what is supported and what to do. Afterwards
    `additional_config` is a `Carried`.
    """
    if vllm_config.model_config is None:  # as vLLM's own tools have it
        return check_and_update_config(vllm_config)
    require_indexer(vllm_config)
    _check_settings(
        Settings.read(vllm_config.additional_config).on("ascend"),
        vllm_config.model_config.enforce_eager,
    )
    _refuse_unsupported(vllm_config)
    vllm_config.additional_config = Carried.of(vllm_config.additional_config or {})
    check_and_update_config(vllm_config)

    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in (STOCK_WORKER, WORKER):  # the 310P's, xlite's, the user's own
        refuse(
            f"the worker is {parallel.worker_cls!r}",
            f"{STOCK_WORKER!r} (A2, A3, A5)",
            "leave the option out",
        )
    if get_ascend_config().weight_nz_mode == NZ_FOR_BF16 and not WKV_AND_WGATE_STAY_PLAIN:
        refuse(
            "weight_nz_mode is 2",
            "0 and 1: wkv and wgate are joined, in the plain layout",
            "set one of them",
        )
    parallel.worker_cls = WORKER
    logger.info(
        "DSV4_INDEXER: vllm-ascend has reset the attention backend; %s honours it all the same",
        WORKER,
    )


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    config, cache_dtype = vllm_config.model_config.hf_config, vllm_config.cache_config.cache_dtype
    require_model_runner_v1(vllm_config)
    if str(cache_dtype).startswith("turboquant"):
        refuse(f"the KV cache is {cache_dtype}", "it without", "leave --kv-cache-dtype out")
    if getattr(config, "use_index_cache", False):
        refuse("use_index_cache is set", "an indexer in every layer", "leave it out")
    if getattr(config, "vision_n_layers", 0):
        refuse("the model has a vision tower", "text alone", "leave the option out")


def _check_settings(settings: Settings, eager: bool) -> None:
    require_impl(settings.impl, "ascend", "reference", "stock")
    if settings.impl == "reference" and not eager:
        refuse(
            "dsv4_indexer.impl is 'reference', which reads values on the host",
            "it without graphs",
            "pass --enforce-eager",
        )
    if settings.untested == "verify":
        refuse("untested is 'verify'", f"'refuse' with vllm-ascend: {NOT_VERIFIED}", "leave it out")
    if settings.state_save == "readable":
        refuse(f"state_save is {settings.state_save!r}", "'full' with vllm-ascend", "leave it out")
    if settings.check == "on":
        refuse("check is 'on', which reads values on the host", "'off' on an NPU", "leave it out")
    if settings.capture is not None:
        refuse("capture is set, which reads values on the host", "it without", "leave it out")
    if settings.projection == "engine":
        refuse(
            "projection is 'engine'",
            "'exact' with vllm-ascend: stock's is in its compressor",
            "leave it out",
        )
