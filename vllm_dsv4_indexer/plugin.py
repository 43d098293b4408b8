"""The two functions that vLLM calls: they give the backend its name and watch the configuration.

vLLM calls both in every process that it starts. An engine that uses another backend is not touched:
our engine files are imported only when a configuration selects `dsv4_indexer`. If this vLLM cannot
be served, everything is undone.
"""

import importlib
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import Any

from vllm_dsv4_indexer import BACKEND

# By the platform's device type.
ENGINES = {
    "cpu": "vllm_dsv4_indexer.engines.vllm_cpu",
    "npu": "vllm_dsv4_indexer.engines.vllm_ascend",
}


def announce() -> None:
    """Gives the backend its name before any configuration is parsed (`vllm.platform_plugins`).

    vLLM calls platform plugins when it looks for its platform, and the others later. By then
    `LLM(attention_config={"backend": ...})` and `AttentionConfig(...)` have parsed the name. It
    returns None, because we bring no platform.
    """
    with suppress(Exception):  # `register` comes later and logs the reason
        _name_backend()


def register() -> None:
    """Registers the backend with vLLM (`vllm.general_plugins`). A second call changes nothing.

    If it fails it logs the error and undoes what it has done. It does not raise: vLLM would not
    catch it, and an engine that does not use us must not go down with us. It does not leave half
    behind: the name alone would be accepted and ignored.
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
            "Its documentation lists the versions that work: docs/compatibility.md.",
            __version__,
            type(error).__name__,
            error,
        )


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.dsv4_indexer")  # below `vllm`, whose logging configuration applies


# ---- the name ------------------------------------------------------------------------------------


def _name_backend() -> Any:
    """Adds `AttentionBackendEnum.DSV4_INDEXER`, to which vLLM parses the option."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND not in AttentionBackendEnum.__members__:
        path = f"{ENGINES['cpu']}.compressor.Dsv4IndexerBackend"
        _add_member(AttentionBackendEnum, BACKEND, path)
    return AttentionBackendEnum[BACKEND]


def _add_member(enum: Any, name: str, value: str) -> None:
    if hasattr(enum, "register"):
        from vllm.v1.attention.backends.registry import register_backend

        register_backend(name, value)
    else:  # before vLLM 0.32 the enumeration has no `register`: do the same by hand
        member: Any = object.__new__(enum)
        member._name_, member._value_ = name, value
        setattr(enum, name, member)
        enum._member_map_[name] = enum._value2member_map_[value] = member
        enum._member_names_.append(name)
    # A spawned engine or worker unpickles its configuration before vLLM loads plugins there. The
    # member does not exist then, so the pickle itself creates it.
    enum._member_map_[name].__reduce_ex__ = lambda protocol: (_name_backend, ())


def _forget_name() -> None:
    """Undoes `_name_backend`, even if it stopped halfway."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as enum

    member = vars(enum).get(BACKEND)
    if member is None:
        return
    member.clear_override()  # vLLM's registry keeps the path to our class beside the member
    enum._member_map_.pop(BACKEND, None)
    enum._value2member_map_.pop(member.value, None)
    enum._member_names_[:] = [name for name in enum._member_names_ if name != BACKEND]
    delattr(enum, BACKEND)


# ---- the configuration ---------------------------------------------------------------------------


def _watch_configuration(if_it_fails: ExitStack) -> None:
    """Makes vLLM call our engine file where its platform checks the configuration.

    The platform sees the whole configuration and may change it. If it ignores a backend it only
    logs, so this is also the place to refuse what cannot be honoured.
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
    """Gives `platform` its method back. None: it had inherited it."""
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
