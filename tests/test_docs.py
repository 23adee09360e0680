"""The pages name what exists: files, the names in them, links and make targets; the index lists every page."""

import re
import subprocess

import pytest

from tests.support import ROOT, file_map

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOTS = [ROOT, ROOT / "moe_dist", ROOT / "tests"]  # what a page's paths may be relative to
PATH = re.compile(r"(?:[\w*-]+/)*[\w*-]+\.py|(?:configs|docs|slurm|moe_dist|tests|launch|benchmarks)/[\w*./-]*")
NOT_IN_GIT = ["slurm/site.sh"]  # a user's own
BARE = "**/"  # a file named without its folder


def find(path):
    """The files and folders that a page means by `path`, which may have asterisks."""
    found = [file for root in ROOTS for file in root.glob(path.removesuffix("/"))]
    return found or ([] if "/" in path else [file for root in ROOTS[1:] for file in root.glob(BARE + path)])


def missing(text):
    """What a page's text names and the repository lacks."""
    quoted = re.findall(r"`([^`\n]+)`(?: `(\w+)[^`\n]*`)?", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for path, name in quoted:
        if not PATH.fullmatch(path) or path in NOT_IN_GIT:
            continue
        files = find(path)
        if not files:
            yield path
        elif name and not any(re.search(rf"\b{name}\b", file.read_text()) for file in files if file.is_file()):
            yield f"{path} {name}"


def code(text):
    """The lines of code and the quoted words of a page."""
    return "\n".join([*re.findall(r"^ {4}.*$", text, re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)])


def long_lines(text):
    """Lines of prose, outside of tables and code, that do not end before column 120."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
    return [line for line in prose if len(line) >= 120 and not line.startswith(("|", "    "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_and_names_exist(page):
    assert not list(missing(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_make_targets_exist():
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z][a-z0-9-]*)", code(page.read_text()))}
    assert {"train", "test", "test-fast", "lint"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    rows = [line for line in index.splitlines() if line.startswith("| [")]
    assert sorted(re.findall(r"\]\((\w+\.md)\)", "".join(rows))) == [
        page.name for page in PAGES[2:] if page.name != "index.md"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_prose_ends_before_column_120(page):
    assert not long_lines(page.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "see `moe_dist/core/batsh.py`",
        "`core/batch.py` `TokenInfos`",
        "`configs/moma_quickstart.yml`",
        "| `no_such_module.py` |",
        "`docs/nowhere.md`",
    ],
)
def test_a_planted_fault_is_found(text):
    assert len(list(missing(text))) == 1


def test_what_exists_passes():
    assert not list(missing("`moe_dist/core/`, `core/batch.py` `TokenInfo.select`, `configs/mod_moma_*.yaml`, `a/b`"))
    assert long_lines("x " * 60 + "\n| " + "x" * 120) == ["x " * 60]


def test_the_list_of_files_is_up_to_date():
    """If it is not: python -m tests.support.file_map"""
    assert file_map.PAGE.read_text() == file_map.page()


def test_where_names_every_file():
    """docs/where.md: a new file belongs in a row of its own."""
    where = (ROOT / "docs" / "where.md").read_text()
    files = [file for top in ("moe_dist/**/*.py", "launch/*.py", "slurm/*.sh") for file in ROOT.glob(top)]
    paths = [str(file.relative_to(ROOT)).removeprefix("moe_dist/") for file in files if file.name != "__init__.py"]
    assert not [path for path in paths if f"`{path}`" not in where and path not in NOT_IN_GIT]
