"""Two nodes by vLLM's own multi-node executor, over loopback, against two workers of one node."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from engine import FEW, STAGED

from vllm_dsv4_indexer.accuracy.engines import Server

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve_and_chat


def test_two_nodes_with_half_of_each_layer_answer_as_one_node(checkpoint, two_workers, tmp_path):
    options = ("--tensor-parallel-size", "2", "--max-num-batched-tokens", "1024")
    with two_nodes(checkpoint, options, tmp_path) as server:
        assert_same_answers(server, FEW, two_workers.rounds)


def test_two_nodes_with_half_of_the_layers_answer_as_one_node(six_layers, two_stages, tmp_path):
    options = ("--pipeline-parallel-size", "2", "--max-num-batched-tokens", "509")
    options += ("--no-enable-prefix-caching", "--enforce-eager")
    with two_nodes(six_layers, options, tmp_path) as server:
        assert_same_answers(server, STAGED[:-1], two_stages.rounds[:-1])


@contextmanager
def two_nodes(model: Path, options: tuple[str, ...], folder: Path) -> Iterator[Server]:
    """A server on two nodes, each with a worker on a core of its own."""
    options = (*serve_and_chat.SMALL, *options, "--nnodes", "2")
    options += ("--master-port", str(serve_and_chat.free_port()))
    first, second = map(str, sorted(os.sched_getaffinity(0))[:2])
    command = ["vllm", "serve", str(model), "--attention-backend", "dsv4_indexer", "--headless"]
    with (folder / "second node").open("w") as log:
        second_node = subprocess.Popen(
            [*command, *options, "--node-rank", "1"],
            env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": second},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    options += ("--node-rank", "0")
    try:
        with (
            mock.patch.dict(os.environ, VLLM_CPU_OMP_THREADS_BIND=first),
            serve_and_chat.server(str(model), options, folder / "first node") as url,
        ):
            yield Server(url)
    finally:
        second_node.terminate()
        second_node.wait(60)


def assert_same_answers(server: Server, rounds: list[dict], one_node: list[list[dict]]) -> None:
    """To each prompt the same tokens, with the same log-probabilities."""
    for asked, (expected,) in zip(rounds, one_node, strict=True):
        tokens, logprobs = server.decode(asked["prompts"][0], asked["sampling"]["max_tokens"])
        assert tokens == expected["tokens"]
        for token, one, two in zip(tokens, expected["logprobs"], logprobs, strict=True):
            assert two[token] == one[str(token)]
