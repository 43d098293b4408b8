"""What the commands print, as tests read it."""


def rows(text: str) -> list[list[str]]:
    """The cells of the Markdown tables in `text`, row by row, titles included."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
