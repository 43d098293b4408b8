"""The result of `bench run`, as it lies in bench.json."""

from typing import Any, TypedDict


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
