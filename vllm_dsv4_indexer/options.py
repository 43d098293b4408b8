"""Options of our commands: what is given and would be ignored is refused by name.

An option that not every mode uses has no default at its parser, so that one that was given can be
told from one that was not, whatever its value. `fill_in` gives the others their defaults.
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UserError


def refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises UserError if one of `names` was given."""
    given = [
        f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None
    ]
    if given:
        raise UserError(f"{' and '.join(given)} {why}: leave it out, or see --help")


def fill_in(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Gives the options that were not given their values."""
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def numbers(text: str) -> list[int]:
    """The type of an option such as `--lengths 4096,8192`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers such as 4096,8192"
        ) from None
