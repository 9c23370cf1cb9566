"""Walking a folder of a user's: in a fixed order, links followed, without what systems leave behind.

Trap: a name that is no UTF-8 comes as surrogates, which no JSON file can hold; ask `is_storable` before it goes
anywhere.
"""

import functools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePath

LEFT_BEHIND = frozenset(("__MACOSX",))  # folders of AppleDouble files, which are named like what they describe


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the sorted names of their files. A link to a folder outside is followed; one that leads back into the
    corpus is not: what lies there is found anyway, and a loop ends.
    """
    roots = [os.path.realpath(folder)]
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [n for n in sorted(folders) if n not in LEFT_BEHIND and _is_new(os.path.join(parent, n), roots)]
        yield Path(parent), sorted(name for name in names if not name.startswith("._"))


def _is_new(path: str, roots: list[str]) -> bool:
    """Whether a folder is not walked through by another way. `roots`: the corpus, then what links lead to."""
    if not os.path.islink(path):
        return len(roots) == 1 or os.path.realpath(path) not in roots[1:]
    real = os.path.realpath(path)
    if any(_is_within(real, root) for root in roots) or _is_within(roots[0], real):
        return False
    roots.append(real)
    return True


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def is_storable(name: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return storable(name) == name


def storable(name: str) -> str:
    """A text for people, with a sign for what UTF-8 cannot hold. (JSON too can spell halves of characters,
    "\\ud800".)
    """
    return name.encode("utf-8", "replace").decode("utf-8")


def find(root: Path, name: str) -> Path | None:
    """The file that `name` means below `root`, whichever way its letters are composed there (é is one character or
    two).
    """
    path = root / name
    if os.path.isfile(path):  # False too for what no file can be called
        return path
    if name.isascii():
        return None
    anchor = PurePath(name).anchor  # of an absolute name
    at = Path(anchor) if anchor else root
    for part in PurePath(name).relative_to(anchor).parts:
        if not os.path.exists(at / part):
            found = _composed(at).get(unicodedata.normalize("NFC", part))
            if found is None:
                return None
            part = found
        at = at / part
    return at if os.path.isfile(at) else None


@functools.lru_cache(maxsize=64)
def _composed(folder: Path) -> dict[str, str]:
    """The names in a folder by their composed forms; of names that differ in nothing else, none."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for name in os.listdir(folder) if folder.is_dir() else ():
        composed = unicodedata.normalize("NFC", name)
        if composed in found:
            twice.add(composed)
        found[composed] = name
    return {composed: name for composed, name in found.items() if composed not in twice}
