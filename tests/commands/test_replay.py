"""A capture holds all that a step reads; `vllm-dsv4-indexer replay` runs it again and compares. No
file can do harm."""

import errno
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from batches import MAIN_4, MAIN_128, Batch, make_batch
from steps import PAGES, SHARED, shared_batch
from vllm_dsv4_indexer import capture as captures
from vllm_dsv4_indexer import cli, ops
from vllm_dsv4_indexer.capture import Capture
from vllm_dsv4_indexer.contract import INDEXER, Extents, Geometry, Step
from vllm_dsv4_indexer.entries import Entries
from vllm_dsv4_indexer.errors import UserError

REQUESTS = [(71, 9), (0, 40), (6, 1)]
# By ratio: of request 1 tokens 12 and 137 close a window.
OF_RATIO = {4: REQUESTS, 128: [(255, 10), (0, 140), (6, 1)]}
FIRST_ENTRY = {4: 12, 128: 137}
NUMBERS = itertools.count()
INTEGERS = (*Step._fields, "kept_pages", "kept_positions")
every_compressor = pytest.mark.parametrize("geometry", (INDEXER, MAIN_4, MAIN_128), ids=str)


def batch_of(geometry: Geometry = INDEXER, **options) -> Batch:
    page = 8 if geometry == MAIN_128 else 4
    return make_batch(OF_RATIO[geometry.ratio], geometry=geometry, page=page, **options)


def captured(batch: Batch, file, **notes) -> Capture:
    """Saved to the file."""
    layer, step = batch.call.layer, batch.call.step
    capture = Capture.of(layer, batch.k_format, step, batch.kv_score, batch.eps, notes)
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


@pytest.mark.parametrize(
    "geometry, page", [*((INDEXER, page) for page in PAGES), (MAIN_4, 4), (MAIN_128, 8)], ids=str
)
@pytest.mark.parametrize("name", SHARED)
def test_a_capture_stores_what_the_step_stores(file, name, geometry, page):
    options = dict(layout="padded", padding=2, kv_dtype=torch.bfloat16)
    batch = shared_batch(name, geometry=geometry, page=page, **options)
    captured(batch, file)
    again = replace(batch, **Capture.load(file).call()._asdict())
    rows, entries = stored(batch.compress("cpu"))
    rows_again, entries_again = stored(again.compress("cpu"))
    assert torch.equal(rows, rows_again) and entries == entries_again


@every_compressor
@pytest.mark.parametrize("start, length", [(250, 1), (255, 1), (100, 9), (120, 30)])
def test_a_capture_has_the_pages_of_its_windows_and_rows_and_no_others(
    file, geometry, start, length
):
    batch = make_batch([(start, length)], geometry=geometry, page=4)
    positions = range(start, start + length)
    closing = [p for p in positions if p % geometry.ratio == geometry.ratio - 1]
    read = {q for p in closing for q in range(p - geometry.window + 1, p + 1)}
    table = batch.inner_state_block_table[0].tolist()
    kept = captured(batch, file).tensors["kept_pages"].tolist()
    assert kept == sorted({table[p // 4] for p in {*positions, *read} if p >= 0})


def replayed(capsys, file, *options: str) -> tuple[int, str]:
    status = cli.main(["replay", str(file), *options])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@every_compressor
def test_an_implementation_that_stores_the_same_has_status_0(file, capsys, geometry):
    batch = batch_of(geometry)
    captured(batch, file, layer="layers.1", why="step 7")
    others = ("overlay_scan",) if geometry == INDEXER else ()
    for impl in ("cpu", *others, "reference"):
        status, printed = replayed(capsys, file, "--impl", impl)
        assert status == 0, printed
        tokens = len(batch.positions)
        assert f"captured: {tokens} tokens, 3 requests\ncompressor: {geometry}, " in printed
        assert f"{batch.k_format}\nlayer: layers.1\n" in printed
        assert f"\nwhy: step 7\nthe same: {impl} stores what the reference stores" in printed


@every_compressor
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_values_that_are_not_finite_are_compared_too(file, capsys, geometry, value):
    batch = batch_of(geometry)
    batch.kv_score[20, 7] = value
    captured(batch, file)
    status, printed = replayed(capsys, file)
    assert status == 0, printed


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
    made = ops.Implementation(lambda: functions, captures.K_FORMATS, ratios=(4, 128))
    name = f"faulty{next(NUMBERS)}"  # ops keeps what it has loaded, by name
    monkeypatch.setitem(ops.IMPLEMENTATIONS, name, made)
    return name


@every_compressor
def test_the_first_number_that_differs_is_told_with_its_token_and_has_status_1(
    file, capsys, monkeypatch, geometry
):
    batch, token = batch_of(geometry), FIRST_ENTRY[geometry.ratio]
    captured(batch, file)
    slot, page = int(batch.inner_state_slot_mapping[30]), batch.inner_state_cache.shape[1]
    entry = divmod(int(batch.k_slot_mapping[token]), batch.k_cache.shape[1])

    def stored_in(layer) -> Entries:
        return Entries.of(layer.k_cache, batch.k_format)

    def a_row(layer):
        layer.inner_state_cache[slot // page, slot % page, 5] += 1

    def a_code(layer):
        stored_in(layer).codes[entry][9] ^= 0x40

    def a_scale(layer):
        scale = stored_in(layer).scales[entry]
        (scale if scale.dim() else scale[None])[0] *= 2

    def a_rotated_channel(layer):
        stored_in(layer).rotated[entry][63] *= 1.02

    def nobodys_row(layer):
        before = int(batch.positions[0]) - 1  # history of request 0
        layer.inner_state_cache[batch.inner_state_block_table[0, before // page], 0, 5] += 1

    who = f"token {token} (request 1, position {int(batch.positions[token])})"
    rotated = [(a_rotated_channel, f"{who}, rotated channel 63 is ")] if geometry != INDEXER else []
    for spoil, says in (
        (a_row, f"token 30 (request 1, position {int(batch.positions[30])}), state 5 is "),
        (a_code, f"{who}, code 9 is "),
        (a_scale, f"{who}, scale 0 is "),
        *rotated,
        (nobodys_row, "in a row that no token of the step saves, state 5 is "),
    ):
        name = faulty(monkeypatch, spoil)
        status, printed = replayed(capsys, file, "--impl", name)
        assert status == 1 and f"differs: {says}" in printed and f"by {name}" in printed, printed


@every_compressor
def test_a_few_codes_beside_the_references_are_ties_and_more_are_not(
    file, capsys, monkeypatch, geometry
):
    batch = batch_of(geometry)
    captured(batch, file)
    slot = int(batch.k_slot_mapping[FIRST_ENTRY[geometry.ratio]])
    entry = divmod(slot, batch.k_cache.shape[1])
    for codes, expected in ((4, 0), (5, 1)):

        def next_codes(layer):
            some = Entries.of(layer.k_cache, batch.k_format).codes[entry][:codes]
            some += torch.where((some & 0x7F) > 0, 255, 1).to(torch.uint8)

        name = faulty(monkeypatch, next_codes)
        assert replayed(capsys, file, "--impl", name)[0] == expected


@pytest.mark.parametrize("geometry", (MAIN_4, MAIN_128), ids=str)
def test_a_rotated_channel_one_step_of_bf16_beside_the_references_is_a_tie(
    file, capsys, monkeypatch, geometry
):
    batch = batch_of(geometry)
    captured(batch, file)
    for steps, expected in ((1, 0), (2, 1)):

        def next_numbers(layer):
            rotated = Entries.of(layer.k_cache, batch.k_format).rotated.view(torch.int16)
            slots, k_page = batch.k_slot_mapping[batch.k_slot_mapping >= 0], rotated.shape[1]
            rotated[slots // k_page, slots % k_page] += steps

        name = faulty(monkeypatch, next_numbers)
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
        ({}, {"dsv4_indexer_capture": "1"}, "is a capture of format 1; this version reads 2"),
        ({}, {"k_format": "bf16"}, "no compressor has head dimension 128 and ratio 4 and "),
        ({}, {"k_format": "fp8_ds_mla"}, "entries of 'fp8_ds_mla'"),
        ({}, {"k_format": "\x1b[2J"}, "no compressor has"),
        ({}, {"head_dim": "512"}, "no compressor has head dimension 512 and ratio 4 and "),
        ({}, {"head_dim": "512", "k_format": "fp8_ds_mla"}, "is damaged"),
        ({}, {"ratio": "0"}, "no compressor has head dimension 128 and ratio 0"),
        ({}, {"ratio": "128"}, "no compressor has head dimension 128 and ratio 128"),
        ({}, {"k_page": "0"}, "pages of 0 entries"),
        ({}, {"k_page": "-64"}, "pages of -64 entries"),
        ({}, {"k_page": "32"}, "k_cache has shape"),
        ({}, {"k_page": str(1 << 60), "k_entries": str(1 << 60)}, "a cache of the shape"),
        ({"ape": torch.zeros(4, 1024)}, {}, "ape has shape [4, 1024]"),
        ({"ape": torch.zeros(4)}, {}, "ape has shape [4]"),
    ],
)
def test_a_capture_that_was_changed_is_one_line_and_status_2(file, capsys, tensors, header, says):
    captured(make_batch(REQUESTS), file)
    changed(file, tensors, header)
    status, printed = replayed(capsys, file)
    assert status == 2 and says in printed and len(printed.splitlines()) == 1, printed


NUMBERS_OF_HEADER = (*Geometry._fields, *Extents._fields, "k_page", "eps")
HOSTILE = (
    "0",
    "-1",
    "3",
    "4",
    "7",
    "64",
    "128",
    "512",
    str(1 << 31),
    str(1 << 62),
    "1" + "0" * 400,
)


@every_compressor
@pytest.mark.parametrize("seed", range(3))
def test_a_capture_with_any_numbers_is_replayed_or_refused_and_nothing_else(
    file, capsys, geometry, seed
):
    """None is believed: neither those of the header nor slots, positions, requests or tables."""
    pick = random.Random(seed)
    captured(batch_of(geometry), file)
    tensors = safetensors.torch.load_file(file)
    for _ in range(12):
        header = {name: pick.choice(HOSTILE) for name in pick.sample(NUMBERS_OF_HEADER, 1)}
        values = {}
        for name in pick.sample(INTEGERS, pick.randrange(3)):
            old = values[name] = tensors[name].clone()
            number = min(int(pick.choice(HOSTILE)), torch.iinfo(old.dtype).max)
            old.view(-1)[pick.randrange(old.numel())] = number
        captured(batch_of(geometry), file)
        changed(file, values, header if pick.random() < 0.7 else {})
        assert replayed(capsys, file)[0] in (0, 1, 2)


def test_a_capture_with_more_windows_than_its_tokens_can_close_is_refused(
    file, capsys, monkeypatch
):
    """Each takes 128 rows, though the file has none of them."""
    monkeypatch.setattr(captures, "_MOST_WINDOW_BYTES", 50 * 128 * 4096)
    batch = batch_of(MAIN_128)
    captured(batch, file)
    assert replayed(capsys, file)[0] == 0
    tokens = len(batch.positions)
    slots = torch.zeros(tokens, dtype=torch.int64)
    changed(file, {"positions": torch.full((tokens,), 127), "k_slot_mapping": slots})
    status, printed = replayed(capsys, file)
    assert status == 2 and "more windows than its tokens can close" in printed


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
