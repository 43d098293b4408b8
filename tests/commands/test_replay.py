"""A capture holds all that a step reads; `vllm-dsv4-indexer replay` runs it again and compares. No
file can do harm."""

import errno
import itertools
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from batches import Batch, make_batch
from steps import PAGES, SHARED, shared_batch
from vllm_dsv4_indexer import capture as captures
from vllm_dsv4_indexer import cli, ops
from vllm_dsv4_indexer.capture import Capture
from vllm_dsv4_indexer.errors import UserError

REQUESTS = [(71, 9), (0, 40), (6, 1)]
NUMBERS = itertools.count()


def captured(batch: Batch, file, **notes) -> Capture:
    """Saved to the file."""
    layer, step = batch.call.layer, batch.call.step
    capture = Capture.of(layer, step, batch.kv_score, batch.eps, notes)
    capture.save(file)
    return capture


def stored(batch: Batch) -> tuple[torch.Tensor, list[bytes]]:
    slots, page = batch.inner_state_slot_mapping, batch.inner_state_cache.shape[1]
    slots = slots[slots >= 0]
    rows = batch.inner_state_cache[slots // page, slots % page]
    return rows.view(torch.int32), batch.entries()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "capture.safetensors"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", SHARED)
def test_a_capture_stores_what_the_step_stores(file, name, page):
    batch = shared_batch(name, page=page, layout="padded", padding=2, kv_dtype=torch.bfloat16)
    captured(batch, file)
    again = replace(batch, **Capture.load(file).call()._asdict())
    rows, entries = stored(batch.compress("cpu"))
    rows_again, entries_again = stored(again.compress("cpu"))
    assert torch.equal(rows, rows_again) and entries == entries_again


def test_a_capture_has_the_pages_of_its_windows_and_no_others(file):
    batch = make_batch([(100, 9)], page=4)
    capture = captured(batch, file)
    table = batch.inner_state_block_table[0].tolist()
    assert sorted(capture.tensors["kept_pages"].tolist()) == sorted({*table[23:28]})


def replayed(capsys, file, *options: str) -> tuple[int, str]:
    status = cli.main(["replay", str(file), *options])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_an_implementation_that_stores_the_same_has_status_0(file, capsys):
    captured(make_batch(REQUESTS), file, layer="layers.1", why="step 7")
    for impl in ("cpu", "overlay_scan", "reference"):
        status, printed = replayed(capsys, file, "--impl", impl)
        assert status == 0, printed
        assert "captured: 50 tokens, 3 requests\nlayer: layers.1\n" in printed
        assert f"\nwhy: step 7\nthe same: {impl} stores what the reference stores" in printed


def test_values_that_are_not_finite_are_compared_too(file, capsys):
    batch = make_batch(REQUESTS)
    batch.kv_score[20, 7] = torch.nan
    captured(batch, file)
    assert replayed(capsys, file)[0] == 0


def faulty(monkeypatch, spoil) -> str:
    """The name of an implementation that spoils what the reference has stored."""
    from vllm_dsv4_indexer.ops import reference

    def bind(layer, **options):
        run = reference.bind(layer, **options)

        def spoiled(kv_score, plan):
            entries = run(kv_score, plan)
            spoil(layer)
            return entries

        return spoiled

    functions = ops.Functions(reference.plan, bind)
    made = ops.Implementation(lambda: functions, ("fp8_pow2",))
    name = f"faulty{next(NUMBERS)}"  # ops keeps what it has loaded, by name
    monkeypatch.setitem(ops.IMPLEMENTATIONS, name, made)
    return name


def test_the_first_number_that_differs_is_told_with_its_token_and_has_status_1(
    file, capsys, monkeypatch
):
    batch = make_batch(REQUESTS)
    captured(batch, file)
    slot, entry = int(batch.inner_state_slot_mapping[30]), int(batch.k_slot_mapping[12])

    def a_row(layer):
        layer.inner_state_cache[slot // 4, slot % 4, 5] += 1

    def a_code(layer):
        layer.k_cache.flatten(1)[entry // 64, entry % 64 * 128 + 9] ^= 0x40

    def a_scale(layer):
        layer.k_cache.flatten(1)[entry // 64, 8192 + entry % 64 * 4 + 3] ^= 1

    def nobodys_row(layer):
        page = int(batch.inner_state_block_table[0, 16])  # history of request 0
        layer.inner_state_cache[page, 0, 5] += 1

    for spoil, says in (
        (a_row, "token 30 (request 1, position 21), state 5 is "),
        (a_code, "token 12 (request 1, position 3), code 9 is "),
        (a_scale, "token 12 (request 1, position 3), scale 0 is "),
        (nobodys_row, "in a row that no token of the step saves, state 5 is "),
    ):
        name = faulty(monkeypatch, spoil)
        status, printed = replayed(capsys, file, "--impl", name)
        assert status == 1 and f"differs: {says}" in printed and f"by {name}" in printed, printed


def test_a_few_codes_beside_the_references_are_ties_and_more_are_not(file, capsys, monkeypatch):
    batch = make_batch(REQUESTS)
    captured(batch, file)
    entry = int(batch.k_slot_mapping[12])
    for codes, expected in ((4, 0), (5, 1)):

        def next_codes(layer):
            some = layer.k_cache.flatten(1)[entry // 64, entry % 64 * 128 :][:codes]
            some += torch.where((some & 0x7F) > 0, 255, 1).to(torch.uint8)

        name = faulty(monkeypatch, next_codes)
        assert replayed(capsys, file, "--impl", name)[0] == expected


def test_a_step_that_is_refused_is_refused_by_both(file, capsys):
    batch = make_batch(REQUESTS)
    batch.k_slot_mapping[12] = 10**9
    captured(batch, file)
    status, printed = replayed(capsys, file)
    assert (
        status == 0 and "the same: cpu and the reference refuse it: k_slot_mapping[12]" in printed
    )


def changed(file, tensors=(), header=()) -> None:
    """The capture with other tensors, or numbers in its header."""
    with safe_open(file, "pt") as opened:
        about = opened.metadata() | dict(header)
    old = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**old, **dict(tensors)}, file, metadata=about)


@pytest.mark.parametrize(
    "tensors, header, says",
    [
        ({"kept_pages": torch.tensor([1 << 40])}, {}, "pages lie outside of their cache"),
        ({"kept_pages": torch.tensor([-1])}, {}, "pages lie outside of their cache"),
        ({"kept_rows": torch.zeros(1)}, {}, "pages lie outside of their cache"),
        ({"positions": torch.zeros(50)}, {}, "positions has dtype torch.float32"),
        ({"kv_score": torch.zeros(3, 512)}, {}, "positions has shape [50]"),
        ({}, {"state_pages": str(1 << 50)}, "a cache of the shape"),
        ({}, {"k_entries": "-64"}, "a cache of the shape"),
        ({}, {"state_page": "3"}, "is damaged"),
        ({}, {"max_pos": "many"}, "its header lacks a number"),
        ({}, {"dsv4_indexer_capture": "0"}, "is a capture of format 0; this version reads 1"),
    ],
)
def test_a_capture_that_was_changed_is_one_line_and_status_2(file, capsys, tensors, header, says):
    captured(make_batch(REQUESTS), file)
    changed(file, tensors, header)
    status, printed = replayed(capsys, file)
    assert status == 2 and says in printed and len(printed.splitlines()) == 1, printed


def test_another_file_is_no_capture_and_is_not_unpickled(file, capsys):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(file) + ".harm",)

    for content in (b"", b"\xff" * 100, pickle.dumps(Harm())):
        file.write_bytes(content)
        status, printed = replayed(capsys, file)
        assert status == 2 and "cannot be read as a capture" in printed
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    status, printed = replayed(capsys, file.with_name("nothing"))
    assert status == 2 and "cannot be read as a capture" in printed


def test_an_implementation_that_does_not_run_here_is_status_2(file, capsys):
    captured(make_batch(REQUESTS), file)
    for impl, says in (("gpu", "'gpu'"), ("ascend", "ascend")):
        status, printed = replayed(capsys, file, "--impl", impl)
        assert status == 2 and says in printed, printed


def test_what_a_capture_says_cannot_steer_a_terminal(file, capsys):
    captured(make_batch(REQUESTS), file, why="\x1b[2J gone\nnext")
    assert "why: [2J gone next\n" in replayed(capsys, file)[1]


def test_a_capture_is_written_whole_or_not_at_all(file, monkeypatch):
    def half(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(UserError, match="cannot be written: .*No space left"):
        captured(make_batch(REQUESTS), file)
    assert not list(file.parent.iterdir())


KILLED = """
import os, pathlib, signal, sys
from vllm_dsv4_indexer.capture import Capture

file = pathlib.Path(sys.argv[1])
capture = Capture.load(file)
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
capture.save(file.with_name("second.safetensors"))
"""


def test_a_worker_that_is_killed_as_it_captures_leaves_no_capture_that_is_not_whole(file):
    captured(make_batch(REQUESTS), file)
    done = subprocess.run([sys.executable, "-c", KILLED, file])
    assert done.returncode == -signal.SIGKILL
    assert list(file.parent.glob("*.safetensors")) == [file]


def test_a_capture_that_would_be_too_large_is_not_written(file, monkeypatch):
    monkeypatch.setattr(captures, "MOST_BYTES", 100_000)
    with pytest.raises(UserError, match="a capture has at most 100000"):
        captured(make_batch(REQUESTS), file)
    assert not list(file.parent.iterdir())
