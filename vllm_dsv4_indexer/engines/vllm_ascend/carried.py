"""How a user's settings reach vllm-ascend's workers."""

from collections.abc import Mapping
from typing import Any

from vllm_dsv4_indexer.settings import NAMESPACE


class Carried(dict[str, Any]):
    """`additional_config` without our settings, which it carries as an attribute.

    From 0.27 on vllm-ascend refuses keys that it does not know, in every process. This class comes
    along wherever vLLM pickles its configuration."""

    settings: Mapping[str, Any]

    @classmethod
    def of(cls, additional_config: Mapping[str, Any]) -> "Carried":
        others = cls((key, value) for key, value in additional_config.items() if key != NAMESPACE)
        others.settings = {
            key: value for key, value in additional_config.items() if key == NAMESPACE
        }
        return others
