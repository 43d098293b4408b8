"""The folder of `--output`: known to be writable before anything is measured, and written file by
file, whole."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import UserError


def check(folder: Path, names: Iterable[str]) -> None:
    """Makes the folder. Raises UserError unless files of these names can be written there; what
    exists stays as it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"a disk that is full takes a name, but no byte")
        for file in (folder / name for name in names):
            if file.exists():
                file.open("r+b").close()  # opened for writing, and not emptied
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error}") from None


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes each text to the file of its name, which appears whole or stays as it was, and says
    so."""
    for name, text in texts.items():
        file, new = folder / name, folder / f".{name}.new"
        try:
            new.write_text(text)
            new.replace(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error}") from None
        finally:
            new.unlink(missing_ok=True)
        print(f"wrote {file}")
