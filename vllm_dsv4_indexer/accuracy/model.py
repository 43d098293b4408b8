"""What a checkpoint's directory says of it. Imports torch only when asked."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError


def most_tokens(model: str) -> int:
    """The longest prompt that leaves the model room for an answer. Raises UserError if the
    directory is no checkpoint."""
    config = Path(model, "config.json")
    if not config.is_file():
        raise UserError(f"{model} is no checkpoint: it has no config.json")
    from ..contract import RATIO

    return int(_read(config).get("max_position_embeddings", 0)) - RATIO


def finds_needles(model: str) -> bool:
    """Whether the model comes from `make-checkpoint --task needle`."""
    from ..checkpoint import RECORD

    record = Path(model, RECORD)
    return record.is_file() and _read(record).get("task") == "needle"


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found
