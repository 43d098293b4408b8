"""`vllm-dsv4-indexer bench` on calls of a few tokens. Nothing here judges a time."""

import json
import sys
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vllm_dsv4_indexer import cli, ops, output
from vllm_dsv4_indexer.bench import cases, contestants, measure, plot, report
from vllm_dsv4_indexer.contract import GEOMETRIES, ContractError, check_call
from vllm_dsv4_indexer.ops.cpu import FLOORS

NAMES = contestants.available()
IF_ASKED = {"reference", "checked", "readable"}
TINY = [cases.mix(kind, 13) for kind in cases.LENGTHS]


def run(folder: Path, *options: str) -> dict:
    command = ["bench", "run", "--seconds", "0", "--threads", "1", "--output"]
    assert cli.main([*command, str(folder), *options]) == 0
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture
def measured_here(monkeypatch):
    """By this process, which has torch and vLLM: `result` below comes from one of its own."""
    monkeypatch.setattr(measure, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # the process would set it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def result(folder) -> dict:
    return run(folder, "--requests", "one,mixed", "--lengths", "8,40")


def test_the_result_holds_every_call_of_every_contestant(result):
    assert {(c["case"], c["threads"], c["cache"]) for c in result["cells"]} == {
        (f"{kind}, T={n}", 1, cache)
        for kind in ("one", "mixed")
        for n in (8, 40)
        for cache in ("warm", "cold")
    }
    for cell in result["cells"]:
        assert cell["nanoseconds"].keys() == {*NAMES, *FLOORS} - IF_ASKED
        assert all(
            len(calls) >= measure.LEAST_ROUNDS and min(calls) > 0
            for calls in cell["nanoseconds"].values()
        )


def test_the_result_names_the_machine(result):
    machine = result["machine"]
    assert (
        machine["cpu"]
        and machine["cores"] >= 1
        and machine["isa"]
        and machine["torch"] == torch.__version__
    )


def test_the_table_names_every_contestant_and_the_three_algorithms(result):
    table = output.text(*report.tables(result))
    for name in result["cells"][0]["nanoseconds"].keys() - {"floor_past_cache"}:
        assert f" {name} " in table
    for title in ("overlay scan", "scatter, then pool", "one pass saves of scatter, then pool"):
        assert f" {title} |" in table
    assert "bandwidth" in table


def test_the_plot_is_xml_with_a_line_for_every_contestant(folder, result):
    names = result["cells"][0]["nanoseconds"].keys() - {"floor_past_cache"}
    panels = plot.figure(result).axes
    assert len(panels) == 2 * 2  # two, warm and cold
    for panel in panels:
        of_the_floor = panel.get_title().startswith("% of the floor")
        assert {line.get_label() for line in panel.lines} == names - (
            {"plan"} if of_the_floor else set()
        )
    svg = xml.etree.ElementTree.parse(folder / "bench.svg")
    assert {e.text for e in svg.findall(".//{*}text")} >= names


def test_the_plot_of_traffic_has_a_point_for_every_chunk_of_a_document(result):
    cells = [
        cell | {"kind": "document", "context": 1000 * i} for i, cell in enumerate(result["cells"])
    ]
    for panel in plot.figure(result | {"cells": cells}).axes:
        depths = panel.lines[0].get_xdata()
        assert len(depths) == len(set(depths)) == len(cells) / 2  # warm or cold


def test_a_result_without_one_request_alone_has_an_empty_plot(result):
    cells = [cell | {"kind": "mixed"} for cell in result["cells"]]
    assert not any(panel.lines for panel in plot.figure(result | {"cells": cells}).axes)


def test_compare_marks_what_became_slower(folder, result, tmp_path, capsys):
    slower = json.loads(json.dumps(result))
    for cell in slower["cells"]:
        cell["nanoseconds"]["ours"] = [10 * max(cell["nanoseconds"]["ours"])] * 3
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    capsys.readouterr()
    assert (
        cli.main(["bench", "compare", str(folder / "bench.json"), str(tmp_path / "slower.json")])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] == "slower" for line in lines if ": ours " in line] == [True] * len(
        result["cells"]
    )
    assert all("+0.0%" in line for line in lines if ": scatter_pool " in line)


@pytest.mark.parametrize(
    "key", ("machine", "cpu", "kv_dtype", "flops", "codes_changed", "floor_past_cache")
)
@pytest.mark.parametrize("place", (0, 1), ids=("before", "after"))
def test_compare_says_which_key_a_file_of_another_version_lacks(
    folder, result, tmp_path, capsys, key, place
):
    older = json.loads(json.dumps(result))
    for holder in (
        older,
        older["machine"],
        older["options"],
        older["cells"][-1],
        older["cells"][-1]["nanoseconds"],
    ):
        holder.pop(key, None)
    files = [str(folder / "bench.json")] * 2
    files[place] = str(tmp_path / "older.json")
    Path(files[place]).write_text(json.dumps(older))
    capsys.readouterr()
    assert cli.main(["bench", "compare", *files]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{files[place]}, of another version, has no {key!r}; run" in line


@pytest.mark.usefixtures("measured_here")
def test_with_hidden_sizes_both_project_first_and_the_shares_of_changed_codes_are_told(
    tmp_path, capsys
):
    result = run(tmp_path, "--requests", "one", "--lengths", "8,40", "--hidden", "64,130")
    names = {"ours", "vllm"} & set(NAMES)
    assert {c["case"] for c in result["cells"]} == {
        f"one, T={n}, hidden {h}" for n in (8, 40) for h in (64, 130)
    }
    for cell in result["cells"]:
        assert cell["nanoseconds"].keys() == {
            *names,
            *(f"{name}_projection" for name in names),
            *FLOORS,
        }
        assert cell["codes_changed"].keys() == names
        assert cell["codes_changed"]["ours"] <= 0.01  # a tie among 256
    table = capsys.readouterr().out
    assert "GFLOP/s" in table and "ours_projection" in table and "of floor" not in table


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("geometry", ("512/4", "512/128"))
def test_a_main_compressor_is_measured_beside_vllm_s(tmp_path, geometry):
    result = run(tmp_path, "--requests", "one", "--lengths", "8,130", "--geometry", geometry)
    assert {c["case"] for c in result["cells"]} == {f"one, T={n}, {geometry}" for n in (8, 130)}
    names = {*contestants.EVERY_COMPRESSOR, *FLOORS} & {*NAMES, *FLOORS}
    for cell in result["cells"]:
        assert cell["nanoseconds"].keys() == names - IF_ASKED


def test_a_projection_that_is_not_exact_is_not_timed(monkeypatch):
    case = cases.projected(cases.mix("one", 64), 64)
    call = cases.make_call(case, torch.float32)
    monkeypatch.setattr(contestants.projection, "project", lambda x, weight: (x @ weight.T).float())
    monkeypatch.setattr(contestants.projection, "prepare_weight", lambda weight: weight)
    runs = contestants.projected(["ours"], case, call)
    with pytest.raises(RuntimeError, match="our projection changes .*% of the codes"):
        measure.codes_changed(case, call, runs)


def test_a_step_runs_every_layer_on_caches_of_its_own(monkeypatch):
    case = cases.replace(cases.mix("short", 13), layers=3)
    calls = cases.make_layers(case, torch.bfloat16)
    assert (
        len(
            {call.inner_state_cache.data_ptr() for call in calls}
            | {call.k_cache.data_ptr() for call in calls}
        )
        == 6
    )
    before = [call.inner_state_cache.clone() for call in calls]
    contestants.contestants(["ours"], calls)["ours"]()
    assert not any(torch.equal(call.inner_state_cache, old) for call, old in zip(calls, before))


@pytest.mark.usefixtures("measured_here")
def test_the_preset_step_measures_whole_steps(tmp_path, monkeypatch):
    tiny = [cases.replace(case, requests=((5, 9),), layers=2) for case in cases.steps()]
    monkeypatch.setattr(cases, "steps", lambda: tiny)
    result = run(tmp_path, "--preset", "step")
    assert [c["case"] for c in result["cells"][::2]] == [
        "decode, T=1, 21 layers",
        "decode, T=16, 21 layers",
        "one, T=128, 21 layers",
        "one, T=2048, 21 layers",
    ]
    for cell in result["cells"]:
        assert cell["nanoseconds"].keys() == {*contestants.WHOLE, *FLOORS} & {*NAMES, *FLOORS}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_checked_mode_checks_a_step_and_each_of_its_layers(geometry):
    case = cases.of_compressor(cases.replace(cases.mix("mixed", 60), layers=2), geometry)
    calls = cases.make_layers(case, torch.float32)
    run = contestants.contestants(["checked"], calls)["checked"]
    run()
    calls[0].kv_score[7, 3] = torch.nan  # the layers share it
    with pytest.raises(ContractError, match=r"token 7 .* has nan in channel 3 of its kv"):
        run()
    calls[0].inner_state_slot_mapping[7] = -1
    with pytest.raises(ContractError, match=r"token 7 .* has no state row"):
        run()


def test_traffic_is_chats_and_long_documents_in_chunks():
    chunks = cases.traffic()
    assert {c.kind for c in chunks} == {"chat", "document"}
    assert all(c.tokens <= 2000 for c in chunks if c.kind == "chat")
    documents = [c for c in chunks if c.kind == "document"]
    assert {c.tokens for c in documents} == {2048, 4096, 8192} and max(
        c.context for c in documents
    ) > 128 << 10
    assert len({c.name for c in documents}) == 3


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kind)
@pytest.mark.parametrize("kv_dtype", (torch.bfloat16, torch.float32))
def test_the_inputs_keep_the_contract_and_are_not_zeros(case, kv_dtype):
    call = cases.make_call(case, kv_dtype)
    check_call(call, "fp8_pow2")
    assert len(call.kv_score) == case.tokens
    assert call.kv_score.count_nonzero() > 0.99 * call.kv_score.numel()
    assert (call.k_slot_mapping >= 0).sum() == case.entries
    ops.compress(*call, impl="reference")


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kind)
@pytest.mark.parametrize("past_cache", FLOORS)
def test_the_floor_moves_every_row_and_entry_and_nothing_else(case, past_cache):
    call = cases.make_call(case, torch.bfloat16)
    kv_score, state, k_cache = call.kv_score, call.inner_state_cache, call.k_cache
    slots, k_slots = call.inner_state_slot_mapping, call.k_slot_mapping
    expected = state.clone()
    expected[slots // cases.PAGE, slots % cases.PAGE] = kv_score.float()
    entries = k_cache.flatten(1)[:, :8192].unflatten(1, (64, 128)).clone()
    written = k_slots[k_slots >= 0]
    entries[written // 64, written % 64] = (
        kv_score[k_slots >= 0, :64].contiguous().view(torch.uint8)
    )
    contestants.contestants([], [call])[past_cache]()
    assert torch.equal(state.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(k_cache.flatten(1)[:, :8192].unflatten(1, (64, 128)), entries)


def test_a_contestant_with_other_results_is_not_timed():
    call = cases.make_call(TINY[0], torch.bfloat16)
    runs = contestants.contestants(["ours"], [call]) | {"idle": lambda: None}
    with pytest.raises(RuntimeError, match="idle and ours store different results"):
        measure.check_equal([call], runs)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--contestants", "gpu"], "'gpu' is not one of ours, reference"),
        (["--requests", "many"], "'many' is not one of one, mixed, short, decode"),
        (["--lengths", "8,0"], "--lengths: 0 is not from 1 to 1048576"),
        (["--lengths", "1048577"], "--lengths: 1048577 is not from 1 to 1048576"),
        (["--threads", "0"], "--threads: 0 is not from 1 to"),
        (["--threads", "1,99999"], "--threads: 99999 is not from 1 to"),
        (["--hidden", "-64"], "--hidden: -64 is not from 1 to 65536"),
        (["--hidden", "65537"], "--hidden: 65537 is not from 1 to 65536"),
        (["--seconds", "-1"], "--seconds: -1 is not a finite number"),
        (["--seconds", "nan"], "--seconds: nan is not a finite number"),
        (["--seconds", "inf"], "--seconds: inf is not a finite number"),
        (["--hidden", "64", "--contestants", "one_pass"], "'one_pass' is not one of ours, vllm"),
        (["--preset", "traffic", "--lengths", "8"], "--preset traffic has its own lengths"),
        (["--preset", "step", "--hidden", "64"], "leave --hidden out"),
        (["--geometry", "512/4", "--hidden", "64"], "--geometry 512/4 is for the standard calls"),
        (["--geometry", "512/4", "--preset", "step"], "leave --preset and --hidden out"),
        (["--geometry", "512/4", "--contestants", "tail"], "'tail' is not one of ours, reference"),
        (["--lengths", "4K"], "--lengths: '4K' is not a whole number"),
    ],
)
def test_a_mistaken_option_is_one_line_and_status_2(options, message, capsys):
    assert cli.main(["bench", "run", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-dsv4-indexer") and message in line


@pytest.mark.parametrize(
    "command, message",
    [
        (["compare", "nowhere.json", "nowhere.json"], "nowhere.json cannot be read: "),
        (["compare", "a", "b", "--output", "anywhere"], "unrecognized arguments: --output"),
        (["cost", "--kv-dtype", "bfloat16"], "unrecognized arguments: --kv-dtype"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_compare_and_cost_have_no_options_of_measuring(command, message, capsys):
    assert cli.main(["bench", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"no JSON", b"[]", b'{"cells": 1}', b'{"cells": [1]}']
)
def test_compare_names_a_file_that_is_no_result(tmp_path, capsys, content):
    (tmp_path / "file").write_bytes(content)
    assert cli.main(["bench", "compare", *[str(tmp_path / "file")] * 2]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'file'}" in line


def test_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured first"))
    (tmp_path / "bench.json").write_text("earlier")
    (tmp_path / "bench.svg").mkdir()
    assert cli.main(["bench", "run", "--seconds", "0", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} cannot be written: " in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_text() == "earlier"


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_package_that_is_missing_is_named_before_anything_is_measured(
    package, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured first"))
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["bench", "run", "--seconds", "0", "--output", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert f"needs {package}: pip install '{package}>=" in line and "extra `tools`" in line
