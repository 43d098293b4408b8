"""Subcommands as tables of their options, and the types of the options' values.

A command line that cannot be parsed is a UserError like any other: one line, no usage text.
"""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from .errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Options = dict[str, dict[str, Any]]  # by name, what `add_argument` takes


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    options: Options,
    **others: Any,
) -> Parser:
    """Adds the subcommand `name`, which calls `run` with its options. `others` go to the parser."""
    parser = commands.add_parser(name, help=help, description=help, **others)
    add_options(parser, options)
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def add_options(group: argparse._ActionsContainer, options: Options) -> None:
    for option, keywords in options.items():
        group.add_argument(option, **keywords)


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option such as `--chunk 512`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if most is None and value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if most is not None and not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
        return value

    return read


def numbers(least: int, most: int | None = None) -> Callable[[str], list[int]]:
    """The type of an option such as `--lengths 4096,8192`."""
    one = number(least, most)
    return lambda text: [one(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """The type of an option such as `--requests one,mixed`."""
    return text.split(",")
