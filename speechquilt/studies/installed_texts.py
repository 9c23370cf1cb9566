"""Real text that no one here wrote: licence texts and documentation that every Debian and Python installation carries.

It stands where a user's own folder of text would stand.
Trap: machines differ. What is found depends on the packages that are installed, so a study counts it in its results,
and writes it down before anything is trained on it.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechquilt.types import TextDocument

COMMON_LICENCES = Path("/usr/share/common-licenses")  # of Debian and what descends from it
OURS = "speechquilt"
MOST_CHARS = 50_000  # of one file: above are bundles of a hundred licences, which would fill the source alone
NEW_SHARE = 0.5  # of a document's words that must stand in paragraphs not seen before
_LICENCE_NAME = re.compile(r"(?i)(?:licen[cs]e|copying|notice)")
_NO_DOCUMENTATION = frozenset(("test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"))
_PARAGRAPHS = re.compile(r"\n\s*\n")


@dataclass(frozen=True, kw_only=True)
class InstalledTextsConfig:
    """Which installed texts are read, and how many of them."""

    sources: tuple[str, ...] = ("licences", "topics", "packages", "docstrings")
    """Kinds of text: "licences", "topics" (the Python reference that help() prints), "packages" (their READMEs) and
    "docstrings" (of the standard library). A text that is there twice is kept in the source that is named first.
    """
    mib_per_source: float = 0.75
    """Most MiB of text from each source."""
    held_out_every: int = 4
    """One document in so many is held out, of every source; at least 2."""

    def __post_init__(self) -> None:
        for source in self.sources:
            if source not in SOURCES:
                raise ValueError(f"sources={self.sources}: {source!r} must be one of {', '.join(SOURCES)}")
        if self.mib_per_source <= 0:
            raise ValueError(f"mib_per_source={self.mib_per_source} must be above 0")
        if self.held_out_every < 2:
            raise ValueError(f"held_out_every={self.held_out_every} must be at least 2, or nothing is left to train on")


@dataclass(frozen=True, kw_only=True)
class SourceTexts:
    """What one source gave."""

    found: int
    """Documents that are installed."""
    train: tuple[TextDocument, ...]
    """Those that were kept to train on."""
    held_out: tuple[TextDocument, ...]
    """Those that were kept to measure on."""


def collect(config: InstalledTextsConfig) -> dict[str, SourceTexts]:
    """The texts by source; ids are `SOURCE/NAME`. The same installation gives the same texts in the same order.

    Raises ValueError when too little is installed to hold something out.
    """
    seen: set[str] = set()
    texts = {}
    for source in config.sources:
        found = [document for document in SOURCES[source]() if document.text.strip()]
        # By content, so that a limit does not mean "those whose names begin with a".
        ordered = sorted(found, key=lambda d: hashlib.sha256(d.text.encode("utf-8", "replace")).digest())
        kept = list(_limited(without_repeats(ordered, seen), round(config.mib_per_source * 2**20)))
        k = config.held_out_every
        texts[source] = SourceTexts(
            found=len(found),
            train=tuple(d for i, d in enumerate(kept) if i % k != k - 1),
            held_out=tuple(d for i, d in enumerate(kept) if i % k == k - 1),
        )
    if not any(of.held_out for of in texts.values()):
        counts = ", ".join(f"{source} {of.found}" for source, of in texts.items())
        raise ValueError(f"sources={config.sources}: too little text is installed here ({counts}); add sources")
    return texts


def without_repeats(documents: Iterable[TextDocument], seen: set[str] | None = None) -> Iterator[TextDocument]:
    """Documents most of whose words stand in paragraphs that no kept document before them has, white space and case aside.

    So a licence comes once, whoever's name stands above it. `seen` holds the paragraphs kept before, and grows.
    """
    seen = set() if seen is None else seen
    for document in documents:
        paragraphs = paragraphs_of(document.text)
        num_new = sum(num_words for paragraph, num_words in paragraphs.items() if paragraph not in seen)
        if num_new and num_new >= NEW_SHARE * sum(paragraphs.values()):
            seen.update(paragraphs)
            yield document


def paragraphs_of(text: str) -> dict[str, int]:
    """Each different paragraph in plain form, and its number of words."""
    plain = (" ".join(paragraph.lower().split()) for paragraph in _PARAGRAPHS.split(text))
    return {paragraph: len(paragraph.split()) for paragraph in plain if paragraph}


def repeated_share(train: Sequence[TextDocument], held_out: Sequence[TextDocument]) -> float:
    """Share of the held-out words that stand in paragraphs of the training part as well."""
    known = {paragraph for document in train for paragraph in paragraphs_of(document.text)}
    counts = [(n, paragraph in known) for document in held_out for paragraph, n in paragraphs_of(document.text).items()]
    return sum(n for n, repeated in counts if repeated) / max(1, sum(n for n, _ in counts))


def _limited(documents: Iterable[TextDocument], most_bytes: int) -> Iterator[TextDocument]:
    size = 0
    for document in documents:
        size += len(document.text.encode("utf-8", "replace"))
        if size > most_bytes:
            return
        yield document


def _licences() -> Iterator[TextDocument]:
    """Debian's, Python's, and those that the installed packages bring."""
    if COMMON_LICENCES.is_dir():
        yield from _files("licences", "debian", sorted(COMMON_LICENCES.iterdir()))
    stdlib = Path(sysconfig.get_path("stdlib"))
    yield from _files("licences", "python", [stdlib / "LICENSE.txt"])
    for name, distribution in _distributions():
        files = (file for file in distribution.files or () if _LICENCE_NAME.match(file.name))
        paths = sorted(Path(str(distribution.locate_file(file))) for file in files if file.suffix != ".py")
        yield from _files("licences", name, paths)


def _topics() -> Iterator[TextDocument]:
    """What `help("topic")` prints: the language reference."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield _document("topics", name, topics[name])


def _packages() -> Iterator[TextDocument]:
    """Long descriptions of the installed packages, mostly their README."""
    for name, distribution in _distributions():
        body = distribution.metadata.get_payload()  # type: ignore[attr-defined]  # a Message, whatever its protocol says
        yield _document("packages", name, body or distribution.metadata["Description"] or "")


def _docstrings() -> Iterator[TextDocument]:
    """All docstrings of a module of the standard library as one document. Reads the source, imports nothing."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        place = path.relative_to(stdlib)
        if _NO_DOCUMENTATION.isdisjoint(place.parts):
            yield _document("docstrings", ".".join(place.with_suffix("").parts), _docstrings_of(path))


def _docstrings_of(path: Path) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    """The installed packages by name, ours aside; of two with one name that which Python finds first."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault((distribution.metadata["Name"] or "").lower(), distribution)
    return sorted((name, distribution) for name, distribution in found.items() if name not in ("", OURS))


def _files(source: str, owner: str, paths: Iterable[Path]) -> Iterator[TextDocument]:
    """Those of the files that are there, are UTF-8 and no bundles."""
    for path in paths:
        data = path.read_bytes() if path.is_file() else b""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) <= MOST_CHARS:
            yield _document(source, f"{owner}-{path.parent.name}-{path.name}", text)


def _document(source: str, name: str, text: str) -> TextDocument:
    return TextDocument(id=f"{source}/{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}", text=text)


SOURCES: dict[str, Callable[[], Iterator[TextDocument]]] = {
    "licences": _licences,
    "topics": _topics,
    "packages": _packages,
    "docstrings": _docstrings,
}
