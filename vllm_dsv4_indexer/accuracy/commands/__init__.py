"""The command `vllm-dsv4-indexer accuracy`: needles, recall and compare."""

from ...options import Commands
from . import compare, needles, recall


def add_to(commands: Commands) -> None:
    """Adds `accuracy` to the subcommands."""
    about = "what the indexer finds, and what it changes in log-probabilities and lm-eval's scores"
    accuracy = commands.add_parser("accuracy", help=about, description=about)
    subcommands = accuracy.add_subparsers(required=True, metavar="COMMAND")
    for command in (needles, recall, compare):
        command.add_to(subcommands)
