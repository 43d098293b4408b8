"""`vllm-dsv4-indexer accuracy` in a process of its own."""

from forked import python

# Its engines are forks, too: they need not import vLLM again. test_process.py has the real ones.
CODE = """
import multiprocessing, sys
from types import SimpleNamespace
from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.accuracy import process

fork = multiprocessing.get_context("fork")
process.multiprocessing = SimpleNamespace(get_context=lambda _: fork)
sys.exit(cli.main(["accuracy", *sys.argv[1:]]))
"""


def accuracy(*arguments: str) -> str:
    """What it printed."""
    done = python("-c", CODE, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
