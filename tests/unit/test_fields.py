"""Every field that a command line or a JSON file fills says what it means, in a docstring below it: `--help` shows it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "speechquilt"
SUFFIXES = ("Config", "Recipe", "Sizes", "Settings")


def frozen_dataclasses(source: str) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and _is_frozen(node)]


def undocumented(cls: ast.ClassDef) -> list[str]:
    """Fields of this class without a docstring of words right below them; inherited ones are those of their own class."""
    missing = []
    for statement, below in zip(cls.body, [*cls.body[1:], ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and not _text(below):
            missing.append(statement.target.id)
    return missing


def configs(classes: dict[str, list[ast.ClassDef]]) -> set[str]:
    """Names of the configs and commands, of what they inherit from, and of the dataclasses that their fields hold."""
    found: set[str] = set()
    waiting = [name for name in classes if name.endswith(SUFFIXES) and not name.startswith("_")]
    waiting += [name for name, same in classes.items() if any(_is_command(cls) for cls in same)]
    while waiting:
        name = waiting.pop()
        if name in classes and name not in found:
            found.add(name)
            waiting += [used for cls in classes[name] for used in _names(cls)]
    return found


def _is_frozen(node: ast.ClassDef) -> bool:
    return any("dataclass(" in ast.unparse(d) and "frozen=True" in ast.unparse(d) for d in node.decorator_list)


def _is_command(node: ast.ClassDef) -> bool:
    """What the command line makes of its words, and then runs."""
    methods = {s.name: s for s in node.body if isinstance(s, ast.FunctionDef)}
    return "run" in methods and len(methods["run"].args.args) == 1


def _text(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return statement.value.value.strip() if isinstance(statement.value.value, str) else ""
    return ""


def _names(cls: ast.ClassDef) -> list[str]:
    """Class names in its bases and in the annotations of its fields, quoted ones too."""
    annotations = [s.annotation for s in cls.body if isinstance(s, ast.AnnAssign)]
    names = []
    for node in (n for part in [*cls.bases, *annotations] for n in ast.walk(part)):
        names += [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
    return names


def _collect() -> list[tuple[str, ast.ClassDef]]:
    """(module, class) of every config in the package."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        modules[module] = frozen_dataclasses(path.read_text())
    by_name: dict[str, list[ast.ClassDef]] = {}
    for classes in modules.values():
        for cls in classes:
            by_name.setdefault(cls.name, []).append(cls)
    wanted = configs(by_name)
    return [(module, cls) for module, classes in modules.items() for cls in classes if cls.name in wanted]


CONFIGS = _collect()


@pytest.mark.parametrize(("module", "cls"), CONFIGS, ids=[f"{module}.{cls.name}" for module, cls in CONFIGS])
def test_every_field_of_a_config_has_a_docstring(module, cls):
    missing = undocumented(cls)
    assert not missing, f"{module}.{cls.name}: write a docstring below {', '.join(missing)}"


def test_the_configs_that_a_run_is_made_of_are_among_them():
    names = {cls.name for _, cls in CONFIGS}
    assert {
        "TrainConfig",
        "LatentLMConfig",
        "EncoderSizes",
        "RopeScaling",
        "BoundaryNoise",
        "PackConfig",
        "TrainLM",
    } <= names


def test_the_checker_sees_a_field_without_a_docstring():
    source = '''
@dataclass(frozen=True, kw_only=True)
class AConfig:
    """The class's own docstring is not a field's."""

    steps: int
    """Optimizer steps."""
    lr: float
    part: "Part | None" = None
    """ """

@dataclass(frozen=True)
class Part:
    seed: int = 0
    def build(self): ...

class NotAConfig:
    size: int
'''
    classes = {cls.name: [cls] for cls in frozen_dataclasses(source)}
    assert list(classes) == ["AConfig", "Part"]
    assert undocumented(classes["AConfig"][0]) == ["lr", "part"]
    assert undocumented(classes["Part"][0]) == ["seed"]
