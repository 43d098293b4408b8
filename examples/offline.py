"""Generates text offline with the dsv4_indexer backend: `python examples/offline.py MODEL`.

The backend is an option of vLLM. Everything else is plain vLLM.
"""

import sys

from vllm import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(
        model,
        attention_backend="dsv4_indexer",
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 30,  # leave this out to let vLLM take what the machine has
    )
    prompts = ["The capital of France is", "A window closes every four tokens, so"]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts its workers by importing this file again
    main(*sys.argv[1:])
