"""A vLLM plugin for the DeepSeek-V4 indexer compressor; its heart is one op,
`vllm_dsv4_indexer.ops.compress`.

Importing this package imports neither torch nor vLLM.
"""

__version__ = "0.1.0"
