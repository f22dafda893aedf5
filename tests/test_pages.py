"""The pages: the README is short, all pages name only what exists, and the example that they name runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.cli import app
from lowmem.recipe import list_recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
MOST_LINES = 170  # of the README
TOP = ("lowmem", "profiles", "scripts", "tests", "docs", "examples")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# A path of the repository, wherever it stands in a page. NAME and RUN stand for the reader's own.
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./-]*[\w/]")
TEST = re.compile(r"(?:…|tests/(?:\w+/)*)(test_\w+\.py)?(?:::(test_\w+))?")  # (file, test) in a page
OTHERS = re.compile(r"NAME|RUN|FOLDER|\*")
MACHINE = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|Users|mnt|data|opt)/|[A-Z]:\\")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of each relative link."""
    for target in LINK.findall(text_of(page)):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def commands(text: str) -> set[str]:
    """The word after `lowmem` where it is run: at the start of a line of code, or in code within a line."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.splitlines()] + inline
    return {found[1] for line in lines if (found := re.match(r"lowmem ([a-z]\S*)", line))}


def known_commands() -> set[str]:
    return {
        info.name or info.callback.__name__ for info in app.registered_commands if info.callback is not None
    }


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{path} does not exist"
        assert path.is_relative_to(ROOT), f"{path} is not in the repository"
        assert not anchor or anchor in anchors(path), f"{path.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    named = {path for path in PATH.findall(text_of(page)) if not OTHERS.search(path)}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_test_that_a_page_names_is_defined_in_the_file_that_it_names(page: Path) -> None:
    """`…` stands for folders, or for the file that was named last."""
    files = {path.name: text_of(path) for path in (ROOT / "tests").rglob("test_*.py")}
    last, missing = "", []
    for file, test in TEST.findall(text_of(page)):
        last = file or last
        if test and not re.search(rf"^def {test}\(", files.get(last, ""), re.MULTILINE):
            missing.append(f"{last}::{test}")
    assert not missing


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            ahead += [path for path, _ in links(page) if path.suffix == ".md" and path.exists()]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_that_a_page_names_is_one_of_the_command_line(page: Path) -> None:
    assert commands(text_of(page)) <= known_commands()


def test_the_python_page_has_every_command() -> None:
    assert known_commands() <= commands(text_of(ROOT / "docs" / "python.md"))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_recipe_that_a_page_trains_or_plans_is_there(page: Path) -> None:
    named = set(re.findall(r"lowmem (?:train|plan|recipes) ([a-z][a-z0-9-]*)\b", text_of(page)))
    assert named <= set(list_recipes())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_page_names_a_path_of_somebodys_machine(page: Path) -> None:
    assert not MACHINE.search(text_of(page))
