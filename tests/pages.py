"""What the tests read from pages: fenced blocks by language, and the commands in them."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ANYWHERE = (
    ""  # the language of blocks whose commands run anywhere; what needs a GPU or a download stands in "sh" blocks
)


def blocks(text: str, languages: Iterable[str]) -> list[str]:
    """A regular expression alone would take the end of one block for the beginning of the next."""
    found: list[str] = []
    language: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if language is None and line.startswith("```"):
            language, lines = line[3:].strip(), []
        elif line.startswith("```"):
            found += ["\n".join(lines)] if language in languages else []
            language = None
        elif language is not None:
            lines.append(line)
    return found


def commands(text: str, languages: Iterable[str] = (ANYWHERE,)) -> list[list[str]]:
    """The words behind `speechquilt` of every command in the blocks of these languages, under torchrun or not."""
    lines = "\n".join(blocks(text, languages)).replace("\\\n", " ").splitlines()
    found = (re.match(r"(?:torchrun .*-m speechquilt\.cli|speechquilt) (.*)", line) for line in lines)
    return [shlex.split(command[1], comments=True) for command in found if command]


def how_to_pages() -> list[Path]:
    """In the order of the pipeline, as their index lists them."""
    (listed,) = blocks((DOCS / "how-to" / "index.md").read_text(), ["{toctree}"])
    return [
        DOCS / "how-to" / f"{name}.md" for name in listed.split() if not name.startswith(":") and not name.isdigit()
    ]
