"""vLLM's entry point (`vllm.general_plugins`): gives the backend its name and watches the configuration.

vLLM calls `register` in every process it starts. Nothing here touches an engine that uses another backend: the
engine's own code is only entered when a configuration that selects `dsv4_indexer` is checked.
"""

import importlib
from types import ModuleType
from typing import Any

BACKEND = "DSV4_INDEXER"
# By the platform's device type.
ENGINES = {"cpu": "vllm_dsv4_indexer.engines.vllm_cpu", "npu": "vllm_dsv4_indexer.engines.vllm_ascend"}


def register() -> None:
    """Register the backend with vLLM. Idempotent; logs instead of raising, since vLLM does not catch what a
    plugin raises and a plugin that cannot register must not take down an engine that does not use it."""
    try:
        _watch_configuration()  # first: a name that is accepted and not watched would be ignored silently
        _name_backend()
    except Exception as error:
        from vllm_dsv4_indexer import __version__

        _logger().error(
            "vllm-dsv4-indexer %s could not register with this vLLM, so `--attention-backend dsv4_indexer` is not "
            "available: %s: %s. See the compatibility table in its README.",
            __version__,
            type(error).__name__,
            error,
        )


def _logger():
    from vllm.logger import init_logger

    return init_logger("vllm.dsv4_indexer")  # below `vllm`, so that vLLM's logging configuration applies


def _name_backend():
    """Make `AttentionBackendEnum.DSV4_INDEXER`, which `--attention-backend dsv4_indexer` is parsed into."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND not in AttentionBackendEnum.__members__:
        path = f"{ENGINES['cpu']}.Dsv4IndexerBackend"
        _add_member(AttentionBackendEnum, BACKEND, path)
    return AttentionBackendEnum[BACKEND]


def _add_member(enum: type, name: str, value: str) -> None:
    if hasattr(enum, "register"):
        from vllm.v1.attention.backends.registry import register_backend

        register_backend(name, value)
    else:  # before vLLM 0.32 the enumeration has no `register`: do what that one does
        member = object.__new__(enum)
        member._name_, member._value_ = name, value
        setattr(enum, name, member)
        enum._member_map_[name] = enum._value2member_map_[value] = member
        enum._member_names_.append(name)
    # A spawned engine or worker unpickles its configuration before vLLM loads plugins there, when the member does
    # not exist yet: let the pickle itself create it.
    enum._member_map_[name].__reduce_ex__ = lambda protocol: (_name_backend, ())


def _watch_configuration() -> None:
    """Enter our engine file where vLLM has the platform check its configuration.

    The platform sees the whole configuration and may change any of it. It only logs when it ignores a backend, so
    this is also where a selection that cannot be honoured is refused.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config
    if getattr(original, "watched_by_dsv4_indexer", False):
        return

    def check_and_update_config(vllm_config) -> None:
        backend = vllm_config.attention_config.backend
        if backend is None or backend.name != BACKEND:
            original(vllm_config)
        else:
            _engine(current_platform).configure(vllm_config, original)

    check_and_update_config.watched_by_dsv4_indexer = True
    platform.check_and_update_config = staticmethod(check_and_update_config)


def _engine(platform: Any) -> ModuleType:
    if platform.device_type not in ENGINES:
        raise ValueError(
            f"--attention-backend dsv4_indexer: the platform is {platform.device_type!r}; supported are "
            f"{sorted(ENGINES)}. Choose another attention backend for this device."
        )
    return importlib.import_module(ENGINES[platform.device_type])
