"""The pages: README's length, lines, links, numbers of decisions, paths and names that exist, charts drawn from their numbers.

`make docs` fails on the same dead links, but needs Sphinx and half a minute; this needs neither.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from speechquilt import cli
from speechquilt.commands import grammar
from tests.pages import ANYWHERE, DOCS, ROOT, blocks, commands, how_to_pages

NOT_OURS = {"_build", "api"}  # what `make docs` writes
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in NOT_OURS),
]
RESULTS = sorted((DOCS / "results").glob("*.json"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", flags=re.M | re.S)
PATH = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py)`")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What may stand behind a # in a link: headings, as GitHub and MyST spell them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """Links to files that do not exist, to folders, and to headings that do not exist; the web is not asked."""
    dead = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            dead.append(link)
    return dead


def missing_paths(text: str) -> list[str]:
    """Python files that are named and stand neither in the repository nor in the package."""
    return [p for p in PATH.findall(text) if not ((ROOT / p).is_file() or (ROOT / "speechquilt" / p).is_file())]


def missing_names(text: str) -> list[str]:
    """What the Python blocks of a page import from us in vain."""
    missing = []
    for block in blocks(text, ["python"]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speechquilt"):
                missing += [f"{node.module}.{a.name}" for a in node.names if not importable(node.module or "", a.name)]
    return missing


def importable(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    if name == "*" or hasattr(found, name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text()) <= 5000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_can_be_read_and_holds_what_it_says(page):
    text = page.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("|") and not re.search(r"https?://\S{60}", line)]
    assert [line for line in lines if len(line) >= 150] == []
    assert dead_links(page, text) == []
    assert missing_paths(text) == []
    assert missing_names(text) == []


def test_the_checks_can_fail():
    page = DOCS / "results.md"
    text = "[a](nowhere.md) [b](glossary.md#nothing) [c](how-to) [d](how-to/tokenize.md#on-a-cluster) [e](https://x.y)"
    assert dead_links(page, text) == ["nowhere.md", "glossary.md#nothing", "how-to"]
    assert missing_paths("`stages/stage.py` `benchmarks/presets.py` `stages/nothing.py`") == ["stages/nothing.py"]
    code = "```python\nfrom speechquilt.model import ladder, nothing\nfrom speechquilt.nowhere import x\n```\n"
    assert missing_names(code) == ["speechquilt.model.nothing", "speechquilt.nowhere.x"]


def test_every_folder_and_file_in_the_tree_of_the_architecture_exists_and_none_is_left_out():
    tree = re.search(r"^speechquilt/\n(.*?)^```", (DOCS / "architecture.md").read_text(), flags=re.M | re.S)
    assert tree is not None
    named = re.findall(r"^  ([\w/]+?(?:\.py|/))\s", tree[1], flags=re.M)
    there = {f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / "speechquilt").iterdir() if p.name[0] not in "_."}
    assert set(named) == there
    assert len(named) == len(there)


def test_decisions_are_numbered_without_holes_and_listed():
    pages = sorted((DOCS / "decisions").glob("0*.md"))
    assert [int(p.name[:4]) for p in pages] == list(range(1, len(pages) + 1))
    for number, page in enumerate(pages, 1):
        assert page.read_text().startswith(f"# {number}. "), page
    listed = re.findall(r"^(\d{4}-[\w-]+)$", (DOCS / "decisions" / "index.md").read_text(), flags=re.M)
    assert listed == [p.stem for p in pages]


def test_decisions_that_code_and_pages_name_exist():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    known = {p.stem for p in (DOCS / "decisions").glob("0*.md")}
    numbers = {int(stem[:4]) for stem in known}
    for name in files:
        if Path(name).suffix not in {".py", ".md"} or not (ROOT / name).is_file() or name == name_of(Path(__file__)):
            continue
        text = (ROOT / name).read_text()
        assert set(re.findall(r"decisions/(\d{4}-[\w-]+)", text)) <= known, name
        assert {int(n) for n in re.findall(r"\b[Dd]ecision (\d+)", text)} <= numbers, name


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_say_where_they_come_from(path):
    found = json.loads(path.read_text())
    for key in ("title", "commit", "hardware", "notes", "tables"):
        assert found[key], key
    for name, rows in found["tables"].items():
        assert "command" in found or all("command" in row for row in rows), name
        assert len({next(iter(row)) for row in rows}) == 1, name


def test_charts_are_drawn_from_the_numbers_and_all_are_shown(tmp_path):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, str(DOCS / "figures.py"), str(tmp_path)], check=True)
    drawn = {p.name: p.read_text() for p in tmp_path.iterdir()}
    committed = {p.name: p.read_text() for p in (DOCS / "figures").iterdir()}
    assert set(drawn) == set(committed)
    shown = "".join(page.read_text() for page in PAGES)
    for name in drawn:
        assert words_of(drawn[name]) == words_of(committed[name]), f"{name} is stale: python docs/figures.py"
        assert f"figures/{name})" in shown, name


def words_of(svg: str) -> list[str]:
    """What a chart says in words, which does not hang on a version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]*)<", svg)


def commands_of(page: Path) -> list[list[str]]:
    """Those of a page in all blocks, or the one of a file of results."""
    text = page.read_text()
    if page.suffix == ".json":
        text = f"```\n{json.loads(text).get('command', '')}\n```"
    return commands(text, [ANYWHERE, "sh"])


def parse(words: list[str]) -> None:
    found, rest = cli.COMMANDS[words[0]], words[1:]
    if isinstance(found, dict):
        found, rest = found[words[1]], words[2:]
    module, _, attribute = found.target.partition(":")
    grammar.parse(getattr(importlib.import_module(module), attribute), [*found.words, *rest])


@pytest.mark.parametrize("page", [p for p in [*PAGES, *RESULTS] if commands_of(p)], ids=name_of)
def test_commands_of_the_pages_are_spelled_right(page, capsys):
    """Nothing is run; tests/e2e/test_readme_commands.py runs what can run anywhere."""
    for words in commands_of(page):
        try:
            parse(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}\n{capsys.readouterr()}")


def test_every_how_to_page_is_listed():
    assert sorted(how_to_pages()) == sorted(p for p in (DOCS / "how-to").glob("*.md") if p.name != "index.md")


def test_the_end_of_a_block_is_not_the_beginning_of_another():
    text = "```sh\nspeechquilt a \\\n  --b 1 # why\n```\nspeechquilt no\n```\nspeechquilt c 'd e'\n```\n```text\nspeechquilt f\n```\n"
    assert commands(text) == [["c", "d e"]]
    assert commands(text, ["sh"]) == [["a", "--b", "1"]]
    assert commands("```sh\ntorchrun --n 2 -m speechquilt.cli train lm\n```", ["sh"]) == [["train", "lm"]]
