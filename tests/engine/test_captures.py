"""When a worker captures a step, and that nothing of this ends one."""

import pytest
import torch

from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.batches import Batch, make_batch
from vllm_dsv4_indexer.capture import Capture
from vllm_dsv4_indexer.contract import GEOMETRIES, ContractError
from vllm_dsv4_indexer.engines import captures
from vllm_dsv4_indexer.engines.captures import MOST_FILES, Captures

LAYERS = ("layers.1", "layers.3")


def run(watching: Captures, batch: Batch, error: Exception | None = None) -> None:
    """A step of two layers, of which the second raises the error."""
    for name in LAYERS:
        with watching.around(name, bound(batch), batch.call.step, batch.kv_score):
            if error is not None and name == LAYERS[-1]:
                raise error
            batch.compress("cpu")


def bound(batch: Batch) -> ops.BoundLayer:
    return ops.BoundLayer(batch.call.layer, eps=batch.eps, k_format=batch.k_format)


def captured(folder) -> list[dict]:
    """What the captures say of themselves, in the order of their files' names."""
    return [dict(Capture.load(file).notes) for file in sorted(folder.iterdir())]


def test_an_error_of_the_op_is_captured_with_its_layer_step_and_rank(tmp_path):
    watching, batch = Captures(str(tmp_path), "error", rank=3), make_batch([(0, 9)])
    run(watching, batch)
    with pytest.raises(ContractError, match="^token 7 is wrong$"):
        run(watching, batch, ContractError("token 7 is wrong"))
    (notes,) = captured(tmp_path)
    assert notes.pop("version")
    assert notes == dict(layer="layers.3", why="token 7 is wrong", step="2", rank="3")


def test_of_the_step_of_a_number_the_first_layer_of_each_kind_is_captured(tmp_path):
    watching = Captures(str(tmp_path), 2, rank=0)
    for _ in range(3):
        for number, geometry in enumerate([*GEOMETRIES] * 2):
            batch = make_batch([(0, 9)], geometry=geometry)
            with watching.around(str(number), bound(batch), batch.call.step, batch.kv_score):
                batch.compress("cpu")
    files = [*tmp_path.iterdir()]
    assert {Capture.load(file).geometry for file in files} == {*GEOMETRIES}
    assert [(notes["layer"], notes["step"]) for notes in captured(tmp_path)] == [
        (name, "2") for name in "012"
    ]


def test_the_step_of_a_number_is_captured_once_as_its_first_layer_met_it(tmp_path):
    watching, batch = Captures(str(tmp_path), 2, rank=0), make_batch([(0, 9)])
    for number in (1, 2, 3):
        batch.inner_state_cache[:] = number
        run(watching, batch)
    (file,) = tmp_path.iterdir()
    capture = Capture.load(file)
    assert (capture.notes["layer"], capture.notes["why"]) == ("layers.1", "step 2")
    assert (capture.tensors["kept_rows"] == 2).all()


def test_a_step_with_an_entry_that_is_not_a_number_is_captured_and_goes_on(tmp_path):
    watching, batch = Captures(str(tmp_path), "not_finite", rank=0), make_batch([(0, 9)])
    run(watching, batch)
    assert not captured(tmp_path)
    batch.kv_score[5, 400] = torch.nan  # of the window that token 7 closes
    run(watching, batch)
    assert [notes["layer"] for notes in captured(tmp_path)] == list(LAYERS)
    assert captured(tmp_path)[0]["why"] == "token 7 has an entry that is not finite"


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channel", (3, -1), ids=["a code", "a rotated channel"])
def test_a_number_that_is_not_finite_is_found_wherever_it_is_in_the_entry(
    tmp_path, geometry, channel
):
    """An infinite kv gives a NaN in its own channel alone: all others are divided by it."""
    watching = Captures(str(tmp_path), "not_finite", rank=0)
    batch = make_batch([(0, geometry.ratio)], geometry=geometry)
    kv = batch.kv_score[-1, : geometry.kv_width]
    kv[-geometry.head_dim :][channel] = torch.inf
    run(watching, batch)
    last = geometry.ratio - 1
    assert captured(tmp_path)[0]["why"] == f"token {last} has an entry that is not finite"


def test_what_is_not_asked_for_is_not_captured(tmp_path):
    batch = make_batch([(0, 9)])
    batch.kv_score[5, 400] = torch.nan
    for when in ("error", 7):
        run(Captures(str(tmp_path), when, rank=0), batch)
    for when in ("not_finite", 7):
        with pytest.raises(ContractError):
            run(Captures(str(tmp_path), when, rank=0), make_batch([(0, 9)]), ContractError("no"))
    assert not captured(tmp_path)


def test_a_folder_holds_at_most_eight(tmp_path):
    batch = make_batch([(0, 9)])
    batch.kv_score[5, 400] = torch.nan
    watching = Captures(str(tmp_path), "not_finite", rank=0)
    for _ in range(MOST_FILES):
        run(watching, batch)
    assert len(captured(tmp_path)) == MOST_FILES == 8


def test_a_capture_that_fails_is_a_warning_and_the_error_is_raised(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(captures.logger, "warning", lambda text, *values: warnings.append(text))
    gone = tmp_path / "gone"
    watching = Captures(str(gone), "error", rank=0)
    with pytest.raises(ContractError, match="^this one$"):
        run(watching, make_batch([(0, 9)]), ContractError("this one"))
    assert warnings == ["DSV4_INDEXER: no capture in %s: %s"]
