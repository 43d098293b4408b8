"""What our commands print and write: tables, pictures, and the files in the folder of `--output`.
That the folder can be written is checked before anything is measured."""

import io
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:  # of the extra `tools`
    from matplotlib.figure import Figure
    from rich.table import Table

_AS_WIDE_AS_ITS_CELLS = 10_000  # columns of the console: a file has no edge to fold a table at


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], names: int = 1) -> "Table":
    """A table in Markdown; its first columns are names, and the others numbers, to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.MARKDOWN)
    for number, title in enumerate(columns):
        made.add_column(title, justify="left" if number < names else "right")
    for row in rows:
        made.add_row(*row)
    return made


def show(*parts: "Table | str") -> None:
    """Prints tables and lines, with an empty line around each."""
    print("", text(*parts), "", sep="\n", flush=True)


def text(*parts: "Table | str") -> str:
    """Tables and lines as they are printed, with an empty line between two of them."""
    return "\n\n".join(map(_text, parts))


def _text(part: "Table | str") -> str:
    from rich.console import Console

    page = io.StringIO()
    console = Console(
        file=page, width=_AS_WIDE_AS_ITS_CELLS, markup=False, emoji=False, highlight=False
    )
    console.print(part)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip("\n")


def svg(figure: "Figure") -> str:
    """The contents of an SVG file: the same for the same figure, with text that can be searched."""
    import matplotlib

    page = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vllm-dsv4-indexer"}):
        figure.savefig(page, format="svg", metadata={"Date": None})
    return page.getvalue()


def check(folder: Path, names: Iterable[str]) -> None:
    """Makes the folder. Raises UserError unless files of these names can be written there. Existing
    files stay as they are."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"a full disk accepts a name, but no byte")
        for file in (folder / name for name in names):
            if file.exists():
                file.open("r+b").close()  # opened for writing, and not emptied
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error}") from None


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes each text to the file of its name, and says so. A file appears whole or stays as it
    was."""
    for name, content in texts.items():
        file, new = folder / name, folder / f".{name}.new"
        try:
            new.write_text(content)
            new.replace(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error}") from None
        finally:
            new.unlink(missing_ok=True)
        print(f"wrote {file}")
