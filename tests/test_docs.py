"""README.md, CONTRIBUTING.md and docs/: links and paths resolve, what the code has is documented, programs run."""

import ast
import itertools
import re
from pathlib import Path

import pytest

import fastopt
from fastopt import _ops

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?:csrc|fastopt|benchmarks|tests|docs|_backend|\.ci)/[\w./]*|[\w/]*test_\w+\.py")
VARIABLE = re.compile(r"FASTOPT_[A-Z_]*[A-Z]")
MAX_README_WORDS = 700


def text_of(page):
    return page.read_text(encoding="utf-8")


def without_code(text):
    return FENCE.sub("", text)


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    for link in LINK.findall(without_code(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def words_in_backticks(page):
    return set(re.findall(r"`([^`\n]+)`", without_code(text_of(page))))


def expanded(name):
    """Names that a name with braces stands for, as in a shell."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def tree():
    """Paths of the tree in CONTRIBUTING.md: two spaces for each folder above, names, at least two spaces, a text."""
    (lines,) = (code.splitlines() for info, code in FENCE.findall(text_of(ROOT / "CONTRIBUTING.md")) if info == "tree")
    folders = []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split("  +", line.strip())[0]
        for name in names.split(", "):
            for path in expanded(name):
                yield "".join([*folders[:depth], path])
        folders[depth:] = [name]


def variables_in(file):
    """Names of environment variables among a program's strings."""
    strings = (node.value for node in ast.walk(ast.parse(text_of(file))) if isinstance(node, ast.Constant))
    return {value for value in strings if isinstance(value, str) and VARIABLE.fullmatch(value)}


def programs():
    """Blocks marked ``python run``, or ``python run native`` if they need the kernels."""
    for page in PAGES:
        for i, (info, code) in enumerate(FENCE.findall(text_of(page))):
            if info.startswith("python run"):
                marks = [pytest.mark.native] if info.endswith("native") else []
                yield pytest.param(code, id=f"{page.stem}-{i}", marks=marks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_and_headings_resolve(page):
    assert list(broken_links(page)) == []


def test_every_page_is_reached_from_the_readme():
    linked = {link.partition("#")[0] for link in LINK.findall(text_of(ROOT / "README.md"))}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_in_backticks_exist(page):
    paths = set(filter(FILE.fullmatch, words_in_backticks(page)))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_tree_has_what_there_is():
    paths = list(tree())
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(paths) == len(set(paths))


def test_the_tree_has_every_file_but_those_of_tests():
    named = {path for path in tree() if not path.endswith("/")}
    suffixes = {"csrc": "*.*", "fastopt": "*.py", "benchmarks": "*.*"}
    files = {path for folder, pattern in suffixes.items() for path in (ROOT / folder).rglob(pattern)}
    files |= {ROOT / "setup.py", *(ROOT / "_backend").glob("*.py")}
    names = {path.relative_to(ROOT).as_posix() for path in files if path.is_file() and path.suffix != ".pyc"}
    assert sorted(name for name in names - named if not name.startswith("benchmarks/results/")) == []
    folders = {f"tests/{path.name}/" for path in (ROOT / "tests").iterdir() if any(path.glob("*.*"))}
    assert folders <= set(tree())


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").split()) <= MAX_README_WORDS


def test_every_variable_that_is_read_is_documented():
    files = [ROOT / "setup.py", *(ROOT / "_backend").glob("*.py"), *(ROOT / "fastopt").rglob("*.py")]
    read = set().union(*map(variables_in, files))
    assert {"FASTOPT_BACKEND", "FASTOPT_AOT"} <= read
    assert read <= words_in_backticks(ROOT / "docs/environment.md")


def test_every_key_of_info_is_documented():
    assert set(fastopt.info()) <= words_in_backticks(ROOT / "docs/reference.md")


@pytest.mark.parametrize("operator", _ops.OPERATORS, ids=lambda operator: operator.name)
def test_every_operator_is_documented(operator):
    assert operator.name in words_in_backticks(ROOT / "docs/reference.md")


@pytest.mark.parametrize("program", list(programs()))
def test_programs_run(program):
    exec(compile(program, "<program of a page>", "exec"), {})
