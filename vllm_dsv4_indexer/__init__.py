"""A vLLM plugin for the DeepSeek-V4 indexer compressor; its heart is one op,
`vllm_dsv4_indexer.ops.compress`.

Importing this package imports neither torch nor vLLM.
"""

import importlib.metadata

BACKEND = "DSV4_INDEXER"  # our name among vLLM's attention backends
try:
    __version__ = importlib.metadata.version("vllm-dsv4-indexer")  # of pyproject.toml
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
