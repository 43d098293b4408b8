"""The documentation: it builds, its links lead somewhere, and the files, commands, options and
settings that it names exist."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

from vllm_dsv4_indexer.cli import main
from vllm_dsv4_indexer.engines.versions import TESTED, Engine
from vllm_dsv4_indexer.settings import ENVIRONMENT_VARIABLES, NAMESPACE, Settings

ROOT = Path(__file__).parents[2]
README, MAKEFILE = ROOT / "README.md", (ROOT / "Makefile").read_text()
FOLDERS = ("docs", "docker", "csrc", "examples", "requirements", "tests", "vllm_dsv4_indexer")
PAGES = [*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
MKDOCS = Path(sys.prefix) / "tools" / "bin" / "mkdocs"

FENCED = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
INDENTED = re.compile(r"^    .*(?:\n(?:    .*)?)*", re.M)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
PATH = re.compile(rf"({'|'.join(FOLDERS)})/[\w./-]*|[\w./-]+\.(py|md|h|cpp|asc)")


# ---- what a page says ----------------------------------------------------------------------------


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in INLINE.findall(prose(page))]


def lines_of_code(page: Path) -> Iterator[str]:
    """Those of blocks, fenced or indented, and inline code. Lines that a backslash continues are
    joined."""
    fenced = [match.group() for match in FENCED.finditer(page.read_text())]
    for block in fenced + INDENTED.findall(prose(page)):
        yield from map(str.strip, re.sub(r"\\\n\s*", "", block).splitlines())
    yield from inline_code(page)


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """The name of the page and the words behind `program`, for each line of code that starts with
    it."""
    for page in PAGES:
        for line in lines_of_code(page):
            if f"{line} ".startswith(f"{program} "):
                yield name_of(page), shlex.split(line.removeprefix(program), comments=True)


def options_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if OPTION.match(word)}


def command_in(words: list[str]) -> list[str]:
    """The words before the first option."""
    return list(itertools.takewhile(lambda word: not OPTION.match(word), words))


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- what there is -------------------------------------------------------------------------------


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not heading or heading in headings(target))


def exists(page: Path, path: str) -> bool:
    return any(
        (folder / path).exists() for folder in (ROOT, ROOT / "vllm_dsv4_indexer", page.parent)
    )


def help_of(words: list[str]) -> str:
    """What `vllm-dsv4-indexer WORDS --help` prints: the help, or what is wrong with the words."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help"])
    return printed.getvalue()


def options_of_vllm() -> set[str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return {option for action in parser._actions for option in action.option_strings}


# ---- the tests -----------------------------------------------------------------------------------


def test_the_pages_build_and_no_link_or_heading_in_them_is_missing(tmp_path):
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ContractError" in (tmp_path / "reference" / "index.html").read_text()


def test_the_readme_takes_five_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1100
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_every_link_leads_to_a_file_and_to_a_heading_of_it():
    links = ((page, link) for page in PAGES for link in LINK.findall(prose(page)))
    here = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(here) > 20
    assert [(name_of(page), link) for page, link in here if not leads_somewhere(page, link)] == []


def test_every_file_that_is_named_exists():
    named = [(page, code) for page in PAGES for code in inline_code(page) if PATH.fullmatch(code)]
    assert len(named) > 50
    assert [(name_of(page), path) for page, path in named if not exists(page, path)] == []


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.M))
    named = {word for _, words in commands("make") for word in words if "=" not in word}
    assert len(named) > 5
    assert named - targets == set()


def test_every_command_of_ours_that_is_named_exists_and_takes_the_options():
    wrong = []
    for page, words in commands("vllm-dsv4-indexer"):
        shown = help_of(command_in(words))
        if not shown.startswith("usage:") or options_in(words) - set(OPTION.findall(shown)):
            wrong.append((page, " ".join(words)))
    assert wrong == []
    assert not help_of(["no-such-command"]).startswith("usage:")


def test_every_option_that_is_named_without_a_command_is_one_of_ours_or_of_vllm():
    ours = (help_of(command_in(words)) for _, words in commands("vllm-dsv4-indexer"))
    known = {*options_of_vllm(), *(option for shown in ours for option in OPTION.findall(shown))}
    alone = {code.split()[0] for page in PAGES for code in inline_code(page)}
    served = {option for _, words in commands("vllm serve") for option in options_in(words)}
    assert served <= known
    assert {option for option in alone if OPTION.fullmatch(option)} - known == set()


def test_every_setting_in_an_example_is_one_that_we_take():
    examples = [text for page in PAGES for text in re.findall(r"'(\{\".*?\})'", page.read_text())]
    assert len(examples) > 5
    for settings in map(json.loads, examples):
        Settings.read(settings if NAMESPACE in settings else {NAMESPACE: settings})


def test_the_readme_lists_every_setting_with_its_values_and_no_other():
    table = README.read_text().split("[start:settings]")[1].split("[end:settings]")[0]
    listed: dict[str, set[str]] = {}
    name = ""
    for named, values in re.findall(r"^\| (?:`(\w+)`)? ?\| (`.*?) \|", table, re.M):
        name = named or name  # stands in the first of its rows
        listed.setdefault(name, set()).update(INLINE.findall(values))
    kinds = get_type_hints(Settings)
    assert set(listed) == {*kinds, *ENVIRONMENT_VARIABLES}
    when = kinds.pop("capture_when")
    choices = {name: set(get_args(kind)) for name, kind in kinds.items() if kind != str | None}
    assert {name: listed[name] for name in choices} == choices
    assert listed["capture_when"] == {*get_args(get_args(when)[0]), "N"}


def test_the_page_of_versions_has_a_row_for_every_engine_that_is_let_in_and_for_no_other():
    rows = re.findall(
        r"^\| [\d.]+ \|([^|]*)\|([^|]*)\|", (ROOT / "docs/compatibility.md").read_text(), re.M
    )
    versions = ([*re.findall(r"\d\S+\b", cell), ""][0] for row in rows for cell in row)
    listed = {Engine(*pair) for pair in zip(versions, versions)} - {Engine("")}
    assert listed == {engine for engines in TESTED.values() for engine in engines}
