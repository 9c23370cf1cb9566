"""The site: `make docs` builds docs/ and the docstrings into docs/_build. A dead link or a missing reference is an error.

Pages of the API are written anew at every start (docs/api, not in git), so that no list of modules has to be kept.
"""

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "speechquilt"
sys.path.insert(0, str(ROOT))

from sphinx.util import logging  # noqa: E402

from speechquilt import __version__  # noqa: E402

project = "SpeechQuilt"
copyright = "the SpeechQuilt authors, Apache-2.0"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
highlight_language = "text"
html_theme = "furo"
html_title = "SpeechQuilt"
html_copy_source = False
myst_heading_anchors = 3
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!speechquilt).*")]  # other people's names; ours must be found
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have shapes in their names, and the types of torch would fill the line

API = [
    ("speechquilt", "The Python door", ["python_api"]),
    ("base", "Nouns, verbs, ids, settings, files", ["types", "protocols", "vocab", "config", "files", "audio", "text"]),
    ("nn", "Layers", ["nn"]),
    ("tokenizer", "Speech tokenizers", ["tokenizer"]),
    ("text_to_token", "Text-to-token model", ["text_to_token"]),
    ("voices", "Aligner and voices", ["aligner", "tts"]),
    ("data", "Data", ["data"]),
    ("model", "Language models", ["model"]),
    ("train", "Training", ["train"]),
    ("evals", "Evaluation", ["evals"]),
    ("stages", "Stages and jobs", ["stages", "jobs"]),
    ("recipes", "Recipes", ["recipes"]),
]


def modules_of(names: Iterable[str]) -> list[str]:
    """Dotted names of the modules and packages that `names` stand for, those without a docstring left out."""
    found = []
    for name in names:
        path = PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            if file.read_text().startswith('"""'):
                parts = ("speechquilt", *file.relative_to(PACKAGE).with_suffix("").parts)
                found.append(".".join(parts).removesuffix(".__init__"))
    return found


def write_api_pages(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for page, title, names in API:
        sections = [f"# {title}\n"]
        for module in modules_of(names):
            sections.append(f"## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n")
        (folder / f"{page}.md").write_text("\n".join(sections))
    listed = "\n".join(page for page, _, _ in API)
    (folder / "index.md").write_text(
        f"# API\n\nFrom the docstrings.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )


def plain_prose(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are prose with `code`: code becomes literal, and what reStructuredText would read as its own signs is escaped."""
    pieces = "\n".join(lines).split("`")
    if len(pieces) % 2 == 0:
        logging.getLogger(__name__).warning("%s: a backtick in its docstring has no partner", name)
    pieces[::2] = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    pieces[1::2] = [rf"\ ``{piece}``\ " for piece in pieces[1::2]]
    lines[:] = "".join(pieces).split("\n")


def setup(app) -> None:
    write_api_pages(Path(app.srcdir) / "api")
    app.connect("autodoc-process-docstring", plain_prose)
