"""One long prompt through `vllm serve` with our backend: how long until the first token, what of
that was the op, and whether its cost for a token grows with the context.

    python tests/accuracy/long_context.py MODEL [--tokens 32768] [--chunk 2048]

The op's time comes from the account that the server's worker writes every ten seconds of work and
when it stops (the setting `account`).
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve_and_chat

from vllm_dsv4_indexer import output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=2048)
    arguments = parser.parse_args()
    vocabulary = json.loads(Path(arguments.model, "config.json").read_text())["vocab_size"]
    prompt = random.Random(0).choices(range(vocabulary), k=arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        account = Path(folder) / "account.jsonl"
        settings = json.dumps({"dsv4_indexer": {"account": str(account)}})
        options = ("--max-model-len", str(arguments.tokens + 8), "--kv-cache-memory-bytes", "4G")
        options += ("--max-num-batched-tokens", str(arguments.chunk))
        options += ("--additional-config", settings)
        with serve_and_chat.server(arguments.model, options) as url:
            first_token = seconds_to_first_token(url, arguments.model, prompt)
            memory = peak_memory()
        accounts = [json.loads(line) for line in account.read_text().splitlines()]
    layers, seconds = accounts[-1]["tokens"] // arguments.tokens, accounts[-1]["seconds"]
    print(
        f"\n{arguments.tokens} tokens in chunks of {arguments.chunk}, {layers} layers with an "
        f"indexer: first token after {first_token:.1f} s, of which the op {seconds:.3f} s "
        f"({seconds / first_token:.2%}); peak memory {memory / 2**30:.1f} GiB\n"
    )
    print(
        output.text(output.table(["tokens of the prompt", "op, ns/token"], rows(accounts, layers)))
    )


def rows(accounts: list[dict], layers: int) -> Iterator[list[str]]:
    """For what was computed between two accounts: which tokens, and nanoseconds a token and
    layer."""
    for before, after in zip([{"tokens": 0, "seconds": 0.0}, *accounts], accounts):
        if tokens := after["tokens"] - before["tokens"]:
            span = f"{before['tokens'] // layers} to {after['tokens'] // layers}"
            yield [span, f"{(after['seconds'] - before['seconds']) / tokens * 1e9:.0f}"]


def seconds_to_first_token(url: str, model: str, prompt: list[int]) -> float:
    body = json.dumps(
        {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    ).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    start = time.monotonic()
    urllib.request.urlopen(request, timeout=3600).read()
    return time.monotonic() - start


def peak_memory() -> int:
    """Bytes that the server's processes had resident at their most, added up."""
    peaks = [
        re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        for process in psutil.Process().children(recursive=True)
    ]
    return sum(int(peak[1]) * 1024 for peak in peaks if peak)


if __name__ == "__main__":
    main()
