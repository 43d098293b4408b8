"""What the log says of the caches when an engine starts, and what `explain` says without one."""

import re

from forked import python


def test_an_engine_logs_what_explain_says_of_the_same_flags(ours, checkpoint):
    flags = "--max-model-len 8192 --max-num-batched-tokens 8192 --no-enable-prefix-caching"
    command = ["-m", "vllm_dsv4_indexer.cli", "explain", str(checkpoint), *flags.split()]
    done = python(*command, environment={"VLLM_LOGGING_LEVEL": "ERROR"})
    assert done.returncode == 0, done.stderr
    block, fingerprint = (
        re.search(what, done.stdout)[1] for what in (r"block +(\d+) bytes", r"fingerprint +(\w+):")
    )
    filled = re.search(r"step +of 8192 tokens: (\d+) blocks", done.stdout)[1]
    least = re.search(r"at least (\d+) bytes for .* in steps of 8192:", done.stdout)[1]
    assert (
        f"DSV4_INDEXER: blocks of {block} bytes; a step of 8192 tokens fills {filled}; a request "
        f"of 8192 needs {least} bytes of KV cache; no prefixes hit; fingerprint {fingerprint}"
    ) in ours.log
