"""A worker's account goes to the log, to the file that the settings name, and to Prometheus."""

import json
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.engines import account


class Worker:
    """Of vLLM's: what an account is mixed into."""

    rank = 3

    def execute_model(self, step: str) -> str:
        ops.work.tokens += len(step)
        return step

    def shutdown(self) -> None:
        pass


class Ours(account.Accountable, Worker):
    def __init__(self, file=None):
        settings = {"dsv4_indexer": {"account": str(file)} if file else {}}
        self.vllm_config = SimpleNamespace(additional_config=settings)


@pytest.fixture
def work(monkeypatch) -> ops.Work:
    monkeypatch.setattr(ops, "work", ops.Work(plans=1, calls=2, tokens=26, entries=6))
    return ops.work


def test_every_account_is_a_line_of_what_the_op_did_since_the_start(tmp_path, work):
    worker = Ours(tmp_path / "account.jsonl")
    assert worker.execute_model("six to") == "six to"
    work.calls += 2
    worker.execute_model("ten seconds have not passed")
    worker.shutdown()
    lines = (tmp_path / "account.jsonl").read_text().splitlines()
    numbers = {"rank": 3, "plans": 1, "entries": 6, "seconds": 0.0, "uncounted": 0}
    numbers |= {"unsaved": 0, "shared": 0}
    assert [json.loads(line) for line in lines] == [
        numbers | {"calls": 2, "tokens": 32},
        numbers | {"calls": 4, "tokens": 59},
    ]


def published(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"dsv4_indexer_{name}_total", {"rank": "3"})


def test_a_worker_publishes_what_the_op_does_from_its_first_step_on(work):
    first = Ours()
    first.execute_model("five!")
    before = published("tokens"), published("calls")
    work.calls += 2
    first.execute_model("six to")
    assert (published("tokens"), published("calls")) == (before[0] + 6, before[1] + 2)
    second = Ours()  # of the same process: the first one's work is not published twice
    second.execute_model("four")
    assert published("tokens") == before[0] + 10


def test_an_account_that_can_no_longer_be_written_is_a_warning_and_the_engine_goes_on(
    tmp_path, work, monkeypatch
):
    warnings = []
    monkeypatch.setattr(account.logger, "warning", lambda text, *values: warnings.append(values))
    folder = tmp_path / "folder"
    folder.mkdir()
    worker = Ours(folder / "account.jsonl")
    worker.execute_model("a step")
    (folder / "account.jsonl").unlink()
    folder.rmdir()
    worker._account_due = 0.0
    assert worker.execute_model("the next") == "the next"
    worker.shutdown()
    assert [file for file, _ in warnings] == [str(folder / "account.jsonl")] * 2
