"""The result of `bench run`, as it lies in bench.json."""

import json
from pathlib import Path
from typing import Any, TypedDict

from ..errors import UserError


class Cell(TypedDict):
    """One case with one number of threads and one state of the caches.

    case, kind: as in cases.Case. tokens: of a call. context: the most tokens that a request of it
    has behind it. bytes: what every contestant must move. flops: of the projection in front, 0
    where there is none. codes_changed: by contestant, the share of the stored codes that are not
    those of a float64 projection. nanoseconds: by contestant, of every call."""

    case: str
    kind: str
    tokens: int
    context: int
    bytes: int
    threads: int
    cache: str  # "warm" or "cold"
    flops: int
    codes_changed: dict[str, float]
    nanoseconds: dict[str, list[int]]


class Result(TypedDict):
    machine: dict[str, Any]  # machine.describe()
    options: dict[str, Any]  # of the command
    cells: list[Cell]


def read(path: Path) -> Result:
    """The result in a file. Raises UserError where it is none, or one of another version."""
    from . import report

    try:
        result: Result = json.loads(path.read_text())
        report.tables(result)  # looks at everything
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError):  # ValueError: no text, or no JSON
        raise UserError(f"{path} was not written by `vllm-dsv4-indexer bench run`") from None
    except KeyError as key:
        raise UserError(
            f"{path}, of another version, has no {key}; run `vllm-dsv4-indexer bench run` again"
        ) from None
    return result
