"""The account as Prometheus metrics, on the server's `/metrics` beside vLLM's own.

A worker is another process than the server. It reaches `/metrics` where prometheus_client collects
from several processes: where PROMETHEUS_MULTIPROC_DIR names a folder. vLLM makes one for more than
one API server; a user may name one for any server.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache

from prometheus_client import Counter

from vllm_dsv4_indexer.ops import Work

HELP = {
    "plans": "Plans of a step: one for each kind of compressor.",
    "calls": "Calls of the op: one a layer and step.",
    "tokens": "Tokens of all calls.",
    "entries": "Keys that were written.",
    "seconds": "Time in plans and calls.",
    "uncounted": "Calls whose entries only the device knows.",
    "unsaved": "Tokens of plans whose state row nobody reads later, and padding.",
    "shared": "State rows that plans found in another request of the step.",
}
assert HELP.keys() == {field.name for field in fields(Work)}


@cache
def _counters() -> Mapping[str, Counter]:
    """Made once a process: the registry takes a name once."""
    return {name: Counter(f"dsv4_indexer_{name}", text, ["rank"]) for name, text in HELP.items()}


class Published:
    """What a worker has published: what the op does in its process from now on."""

    def __init__(self, rank: int, work: Work) -> None:
        self._counters = {name: counter.labels(rank) for name, counter in _counters().items()}
        self._before = asdict(work)

    def update(self, work: Work) -> None:
        now = asdict(work)
        for name, counter in self._counters.items():
            counter.inc(now[name] - self._before[name])
        self._before = now
