"""Indexer recall on the demo checkpoint: what exact arithmetic is, and how much of its selection
the engine makes; and whether the engine agrees with itself under other schedules."""

import functools
import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from command import accuracy
from tables import rows
from torch import Tensor

from vllm_dsv4_indexer import ops, output
from vllm_dsv4_indexer.accuracy import agreement, recall, report
from vllm_dsv4_indexer.checkpoint.config import INDEX_TOPK
from vllm_dsv4_indexer.contract import FP8_PAGE_ENTRIES, FP8_SCALE_OFFSET, RATIO

TOKENS = 520  # of the prompt whose log-probabilities are compared


def random_layer(tokens: int, hidden: int, gates: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states [tokens, hidden], and an indexer's weights; `gates` is the deviation of its
    gates."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    weights = {"wkv": draw(256, hidden), "wgate": gates * draw(256, hidden)}
    weights = {
        f"compressor.{name}.weight": (value * hidden**-0.5).bfloat16().double()
        for name, value in weights.items()
    }
    weights |= {"compressor.ape": draw(4, 256), "compressor.norm.weight": 1 + 0.2 * draw(128)}
    return draw(tokens, hidden).bfloat16().double(), {
        name: value.float().double() for name, value in weights.items()
    }


def cosines_and_sines(tokens: int) -> Tensor:
    angles = torch.arange(tokens)[:, None] / 160000 ** (torch.arange(32) / 32)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def projected(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [hidden @ weights[f"compressor.{name}.weight"].T for name in ("wkv", "wgate")], dim=1
    )


def stored_keys(kv_score: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """[entries, 128]: what a decoder reads back of what the op stores of one prompt."""
    tokens = len(kv_score)
    pages = -(-tokens // RATIO // FP8_PAGE_ENTRIES)
    k_cache = torch.zeros(pages, FP8_PAGE_ENTRIES, 132, dtype=torch.uint8)
    ape, norm = (weights[f"compressor.{name}"].float() for name in ("ape", "norm.weight"))
    positions = torch.arange(tokens)
    ops.compress(
        kv_score.float(),
        ape,
        norm,
        cosines_and_sines(tokens),
        positions,
        torch.zeros(tokens, dtype=torch.int32),
        positions + 4,
        1 + torch.arange(tokens // 4, dtype=torch.int32)[None],
        torch.zeros(tokens // 4 + 1, 4, 512),
        torch.where(positions % 4 == 3, positions // 4, -1),
        k_cache,
        impl="reference",
    )
    bytes_ = k_cache.flatten(1)
    codes = bytes_[:, :FP8_SCALE_OFFSET].view(torch.float8_e4m3fn).double().reshape(-1, 128)
    return (codes * bytes_[:, FP8_SCALE_OFFSET:].view(torch.float32).reshape(-1, 1))[
        : tokens // RATIO
    ]


def test_exact_keys_are_those_of_the_op_but_for_the_rounding_to_fp8():
    hidden, weights = random_layer(256, 64)
    expected = recall._keys(hidden, weights, cosines_and_sines(256).double())
    stored = stored_keys(projected(hidden, weights), weights)
    assert (
        (stored - expected).abs()
        <= expected.abs() / 14 + expected.abs().amax(dim=1, keepdim=True) / 2**13
    ).all()


def test_rounding_the_projection_to_bfloat16_loses_entries_where_gates_are_sharp():
    """A gate of 100 is rounded by up to 0.25, and its weight in the window with it. Seen: 0.060 ±
    0.009 points."""
    tokens = 4096
    hidden, weights = random_layer(tokens, 128, gates=100)
    rows = projected(hidden, weights)
    exact, ours, rounded = (
        recall._keys(hidden, weights, cosines_and_sines(tokens).double()),
        stored_keys(rows, weights),
        stored_keys(rows.bfloat16(), weights),
    )
    generator = torch.Generator().manual_seed(1)
    gains = []
    for entries in range(INDEX_TOPK + 1, tokens // RATIO):
        query, heads = (
            torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (128, 1)
        )
        best, of_ours, of_rounded = (
            (heads * (query @ keys[:entries].T).relu()).sum(dim=0).topk(INDEX_TOPK).indices
            for keys in (exact, ours, rounded)
        )
        gains.append(
            torch.isin(best, of_ours).sum().item() - torch.isin(best, of_rounded).sum().item()
        )
    assert fmean(gains) > 4 * stdev(gains) / len(gains) ** 0.5


STOCK = {"impl": "stock", "projection": "engine"}


def against_stock(command: str, folder: Path, *options: str) -> tuple[dict, str]:
    """What the command measured of our compressor, behind the engine's projection, and of stock;
    and what it printed."""
    options += ("--settings", json.dumps({"projection": "engine"}), "--against", json.dumps(STOCK))
    printed = accuracy(command, *options, "--output", str(folder))
    return json.loads((folder / f"{command}.json").read_text()), printed


@pytest.fixture(scope="module")
def recalled(checkpoint, tmp_path_factory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("recall")
    return against_stock("recall", folder, str(checkpoint), "--lengths", "3072,2560")


@pytest.fixture(scope="module")
def compared(checkpoint, tmp_path_factory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("compare")
    return against_stock("compare", folder, str(checkpoint), "--tokens", str(TOKENS))


@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "stock"])
def test_an_engine_selects_nearly_all_of_the_exact_top_k(recalled, whose):
    """Seen: 99.3 % in the mean. A random selection would have 67 % at 3072 tokens."""
    layers = recalled[0]["recall"][whose]
    assert layers.keys() == {"1", "3"}
    for layer in layers.values():
        assert [entries for entries, _ in layer] == list(range(INDEX_TOPK + 1, 769))
        assert min(share for _, share in layer) >= 0.97
        assert fmean(share for _, share in layer) >= 0.99


def test_our_recall_behind_the_same_projection_is_the_stock_compressors(recalled):
    """In the first layer with an indexer the two have the same inputs, and store the same but for
    ties of rounding."""
    ours, stock = (recall["1"] for recall in recalled[0]["recall"])
    differences = [mine - theirs for (_, mine), (_, theirs) in zip(ours, stock, strict=True)]
    assert abs(fmean(differences)) <= 1e-4


def test_recall_is_a_table_by_length_and_layer(recalled):
    titles, *body = rows(recalled[1])
    theirs = ["the other's layer 1", "the other's layer 3", "difference"]
    assert titles == ["tokens", "layer 1", "layer 3", *theirs]
    assert [row[0] for row in body] == ["to 2560", "to 3072"]


def test_log_probabilities_are_those_of_the_stock_compressor_at_every_size_of_chunk(compared):
    """There are fewer entries than the indexer selects. A main key may have a neighbouring code."""
    chunks = compared[0]["agreement"]["with the other"]
    assert [name for name, *_ in chunks] == [
        *(f"in chunks of {size}" for size in (512, 127, TOKENS)),
        "in chunks of 251, beside another prompt",
        "in chunks of 1",
    ]
    assert [positions for _, positions, *_ in chunks] == [TOKENS - 1] * 4 + [TOKENS // 8 - 1]
    for schedule, _, mean, largest, same in chunks:
        assert mean <= 0.01 and largest <= 0.25 and same >= 0.98, (schedule, mean, largest, same)


@pytest.mark.parametrize("who", ["with itself", "the other with itself"])
def test_log_probabilities_hardly_depend_on_the_schedule(compared, who):
    """A bfloat16 logit has steps of 1/16 here, and a step of one token takes other matrix
    products."""
    schedules = compared[0]["agreement"][who]
    assert [positions for _, positions, *_ in schedules] == [TOKENS - 1] * 3 + [TOKENS // 8 - 1] + [
        TOKENS // 8
    ] * 2
    for schedule, positions, mean, largest, same in schedules:
        assert mean <= 0.05 and largest <= 0.5 and same >= 0.9, schedule
        assert [schedule, str(positions)] in [row[:2] for row in rows(compared[1])]


def test_a_difference_is_that_of_the_tokens_which_both_name():
    one = [{1: -1.0, 2: -2.0}, {1: -1.0, 2: -0.5}, {5: -1.0}]
    other = [{1: -1.25, 3: -4.0}, {1: -1.0, 2: -1.5}, {5: -1.0}]
    assert agreement.compare("other", one, other) == ("other", 3, 1.25 / 4, 1.0, 2 / 3)


def test_the_table_has_the_mean_of_each_range_of_lengths():
    recalls = [{1: [(520, 0.9), (700, 0.8), (1024, 0.7), (1025, 0.5)]}]
    table = output.text(report.recall_table(recalls, [2048, 4096, 8192]))
    assert rows(table)[1:] == [["to 4096", "80.00 %"], ["to 8192", "50.00 %"]]


def test_the_difference_of_two_comes_with_its_confidence_interval():
    good, worse = ([(600, share), (601, 0.9)] for share in (0.9, 0.8))
    recalls = [{1: good, 3: good}, {1: worse, 3: good}]
    _, row = rows(output.text(report.recall_table(recalls, [2048, 4096])))
    means = ["90.00 %", "90.00 %", "85.00 %", "90.00 %"]
    assert row == ["to 4096", *means, "+2.500 ± 7.956"]  # Student's 3.182 * 5 / sqrt(4)


def test_two_that_select_the_same_differ_by_nothing():
    recalls = [{1: [(600, 0.9), (601, 0.8)]}] * 2
    _, row = rows(output.text(report.recall_table(recalls, [4096])))
    assert row[-1] == "+0.000 ± 0.000"
