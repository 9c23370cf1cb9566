"""Imports go down only, siblings never import each other, and the core needs no edge package (DESIGN.md)."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "speechquilt"
LAYERS = [
    {"types", "protocols", "config", "vocab", "files", "counts", "span_length"},
    {"audio", "nn", "text"},
    {"tokenizer", "text_to_token", "aligner", "tts", "pretrained", "decoder", "data", "model"},
    {"train", "evals"},
    {"stages", "reports", "chat"},
    {"jobs"},
    {"cli", "commands", "recipes", "studies", "python_api", "__main__"},
]
SIBLINGS_APART = (2, 4)  # layers whose members never import each other
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}
EDGE_PACKAGES = [
    "soundfile",
    "soxr",
    "espeakng_loader",
    "onnxruntime",
    "wetext",
    "matplotlib",
    "datasets",
    "lhotse",
    "tyro",
    "docstring_parser",
]


def imports_of(path: Path) -> set[str]:
    """First-level modules of ours that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("speechquilt"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("speechquilt.")}
    return found


def breaches(module: str, imported: set[str]) -> list[str]:
    """What is wrong with `module` importing these: everything must lie in a lower layer (layer 0 may import itself)."""
    mine = LAYER_OF[module]
    return [
        f"{module} -> {other}"
        for other in sorted(imported - {module})
        if LAYER_OF[other] > mine or (LAYER_OF[other] == mine and mine in SIBLINGS_APART)
    ]


def test_every_module_has_a_layer_and_imports_only_downwards():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        if relative == Path("__init__.py"):
            continue
        wrong += [f"{relative}: {b}" for b in breaches(relative.parts[0].removesuffix(".py"), imports_of(path))]
    assert not wrong, "\n".join(wrong)


def test_the_checker_sees_a_breach():
    assert breaches("data", {"model"}) == ["data -> model"]
    assert breaches("nn", {"train"}) == ["nn -> train"]
    assert breaches("train", {"model", "nn", "types"}) == []


def test_training_imports_without_the_edge_packages():
    """A GPU machine has torch and transformers and nothing to install from."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in EDGE_PACKAGES)
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for layer in (
            "data",
            "model",
            "train",
            "tokenizer",
            "text_to_token",
            "nn",
            "evals",
            "stages",
            "recipes",
            "jobs",
            "studies",
        )
        for p in (PACKAGE / layer).rglob("*.py")
        if p.stem != "cluster"  # datatrove's own
    )
    code = f"import sys\n{blocked}import importlib\nfor m in {modules!r}: importlib.import_module(m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_alone_knows_tyro():
    """Every recipe starts from Python without it."""
    users = {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py") if "import tyro" in p.read_text()}
    assert users == {"commands"}


def test_no_two_modules_have_one_name():
    """Except `__init__`, and a command, which may be called like what it runs."""
    names = Counter(p.stem for p in PACKAGE.rglob("*.py") if p.stem != "__init__" and p.parent != PACKAGE / "commands")
    assert not [name for name, times in names.items() if times > 1]


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long
