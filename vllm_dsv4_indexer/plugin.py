"""vLLM's two entry points: they give the backend its name and watch the configuration.

vLLM calls both in every process it starts. Nothing here touches an engine that uses another
backend: the engine's own code is only entered when a configuration that selects `dsv4_indexer` is
checked. Where this vLLM cannot be served, nothing stays behind.
"""

import importlib
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import Any

BACKEND = "DSV4_INDEXER"
# By the platform's device type.
ENGINES = {
    "cpu": "vllm_dsv4_indexer.engines.vllm_cpu",
    "npu": "vllm_dsv4_indexer.engines.vllm_ascend",
}


def announce() -> None:
    """Give the backend its name before any configuration is parsed (`vllm.platform_plugins`).

    vLLM calls platform plugins when it is imported and looks for its platform. It calls the others
    later: `LLM(attention_config={"backend": ...})` and `AttentionConfig(...)` have parsed the name
    by then. Returning None says that no platform of ours is here.
    """
    with suppress(Exception):  # `register` comes later, and logs what is wrong
        _name_backend()


def register() -> None:
    """Register the backend with vLLM (`vllm.general_plugins`). Idempotent.

    Logs instead of raising, since vLLM does not catch what a plugin raises, and a plugin that
    cannot register must not take down an engine that does not use it. For the same reason it then
    undoes what it has done: the name would be accepted and ignored, the watch could fail.
    """
    try:
        with ExitStack() as if_it_fails:
            if_it_fails.callback(_forget_name)
            _watch_configuration(if_it_fails)
            _name_backend()
            if_it_fails.pop_all()
    except Exception as error:
        from vllm_dsv4_indexer import __version__

        _logger().error(
            "vllm-dsv4-indexer %s could not register with this vLLM, so "
            "`--attention-backend dsv4_indexer` is not available: %s: %s. "
            "See the compatibility table in its README.",
            __version__,
            type(error).__name__,
            error,
        )


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.dsv4_indexer")  # below `vllm`, whose logging configuration applies


# ---- the name ------------------------------------------------------------------------------------


def _name_backend() -> Any:
    """Make `AttentionBackendEnum.DSV4_INDEXER`, which the option's value is parsed into."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND not in AttentionBackendEnum.__members__:
        path = f"{ENGINES['cpu']}.compressor.Dsv4IndexerBackend"
        _add_member(AttentionBackendEnum, BACKEND, path)
    return AttentionBackendEnum[BACKEND]


def _add_member(enum: Any, name: str, value: str) -> None:
    if hasattr(enum, "register"):
        from vllm.v1.attention.backends.registry import register_backend

        register_backend(name, value)
    else:  # before vLLM 0.32 the enumeration has no `register`: do what that one does
        member: Any = object.__new__(enum)
        member._name_, member._value_ = name, value
        setattr(enum, name, member)
        enum._member_map_[name] = enum._value2member_map_[value] = member
        enum._member_names_.append(name)
    # A spawned engine or worker unpickles its configuration before vLLM loads plugins there, when
    # the member does not exist yet: let the pickle itself create it.
    enum._member_map_[name].__reduce_ex__ = lambda protocol: (_name_backend, ())


def _forget_name() -> None:
    """Undo `_name_backend`, also where it stopped halfway."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as enum

    member = vars(enum).get(BACKEND)
    if member is None:
        return
    member.clear_override()  # the path to our class, which vLLM's registry keeps beside the member
    enum._member_map_.pop(BACKEND, None)
    enum._value2member_map_.pop(member.value, None)
    enum._member_names_[:] = [name for name in enum._member_names_ if name != BACKEND]
    delattr(enum, BACKEND)


# ---- the configuration ---------------------------------------------------------------------------


def _watch_configuration(if_it_fails: ExitStack) -> None:
    """Enter our engine file where vLLM has the platform check its configuration.

    The platform sees the whole configuration and may change any of it. It only logs when it ignores
    a backend, so this is also where a selection that cannot be honoured is refused.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config
    if getattr(original, "watched_by_dsv4_indexer", False):
        return

    def ours(vllm_config: Any, *others: Any, **named: Any) -> None:
        from vllm_dsv4_indexer import selection

        if selection.is_selected(vllm_config):
            _engine(current_platform).configure(vllm_config, original)
        else:
            if idle := selection.idle_settings(vllm_config):
                _logger().warning_once(idle)
            original(vllm_config, *others, **named)

    ours.watched_by_dsv4_indexer = True  # type: ignore[attr-defined]
    if_it_fails.callback(_restore, platform, vars(platform).get("check_and_update_config"))
    platform.check_and_update_config = staticmethod(ours)


def _restore(platform: Any, method: Any) -> None:
    """method: what `platform` itself defined, None if it inherits."""
    if method is None:
        del platform.check_and_update_config
    else:
        platform.check_and_update_config = method


def _engine(platform: Any) -> ModuleType:
    from vllm_dsv4_indexer.engines import refuse

    if platform.device_type not in ENGINES:
        found = f"the platform is {platform.device_type!r}"
        refuse(
            found, ", ".join(sorted(ENGINES)), "choose another attention backend for this device"
        )
    return importlib.import_module(ENGINES[platform.device_type])
