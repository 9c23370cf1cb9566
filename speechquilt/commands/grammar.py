"""The one grammar of the command line: a frozen dataclass in, flags, help and an instance of it out, by tyro.

A field is a flag (`--train.steps 100`, nested ones with a dot), `Positional` ones come first without a name, the fields of a
`Flat` one have no prefix. A dict is words KEY=VALUE, a config that may be missing or is one of many is one word: KEY=VALUE,KEY=VALUE or a file.
`--config FILE.json` starts from settings that a run folder has saved; what stands beside it on the line changes them.

A class that can start from several places names those flags in `STARTS` and gives the instance for them in `starting_from`.
"""

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar
from unittest import mock

import docstring_parser
import tyro
from tyro.conf import Positional
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from speechquilt import config

__all__ = ["Flat", "Positional", "parse"]

C = TypeVar("C")
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]

CONFIG_NOTE = "--config FILE.json starts from the settings that a run folder has saved (settings.json)."
_REGISTRY = ConstructorRegistry()


def parse(cls: type[C], words: Sequence[str], *, prog: str = "speechquilt") -> C:
    """The settings that `words` ask for. Raises SystemExit after printing help (0) or what is wrong (2)."""
    words, default = _start(cls, list(words))
    about = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{CONFIG_NOTE}"
    with _REGISTRY, _flowing_text():
        return tyro.cli(  # type: ignore[return-value]
            cls,
            args=words,
            prog=prog,
            description=about,
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
        )


@contextmanager
def _flowing_text() -> Iterator[None]:
    """Field docstrings of several lines as one paragraph each: tyro would keep their line breaks."""
    parse_from_object = docstring_parser.parse_from_object

    def joined(obj: Any) -> Any:
        found = parse_from_object(obj)
        for field in found.params:
            field.description = field.description and " ".join(field.description.split())
        return found

    with mock.patch.object(docstring_parser, "parse_from_object", joined):
        yield


def _start(cls: type[C], words: list[str]) -> tuple[list[str], C | None]:
    """The words without `--config FILE`, and what the rest of them changes; None: the class's own defaults.

    Raises FileNotFoundError or ValueError saying what is wrong with the file.
    """
    path, words = _taken(words, "config")
    if path is not None:
        return words, config.load(cls, Path(path))
    starts: tuple[str, ...] = getattr(cls, "STARTS", ())
    if not starts:
        return words, None
    chosen = {name: value for name in starts if (value := _taken(words, name)[0]) is not None}
    return words, cls.starting_from(**chosen)  # type: ignore[attr-defined]


def _taken(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the words without it."""
    flag = f"--{name.replace('_', '-')}"
    for k, word in enumerate(words):
        if word == flag and k + 1 < len(words):
            return words[k + 1], words[:k] + words[k + 2 :]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2], words[:k] + words[k + 1 :]
    return None, words


@_REGISTRY.primitive_rule
def _dict_of_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if typing.get_origin(info.type) is not dict or typing.get_args(info.type)[1] not in (str, float, int, Path):
        return None
    value_of = typing.get_args(info.type)[1]
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE",
        instance_from_str=lambda words: {key: value_of(value) for key, value in map(_pair, words)},
        is_instance=lambda x: isinstance(x, dict),
        str_from_instance=lambda values: [f"{key}={value}" for key, value in values.items()],
    )


@_REGISTRY.primitive_rule
def _dict_of_configs(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Named configs are JSON: more than a line wants to hold, and usually changed in a file."""
    if typing.get_origin(info.type) is not dict or not dataclasses.is_dataclass(typing.get_args(info.type)[1]):
        return None
    of: Any = typing.get_args(info.type)[1]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: {k: config.from_dict(of, v) for k, v in json.loads(words[0]).items()},
        is_instance=lambda x: isinstance(x, dict),
        str_from_instance=lambda values: [json.dumps({k: config.to_dict(v) for k, v in values.items()})],
    )


@_REGISTRY.primitive_rule
def _tuple_of_configs(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    args = typing.get_args(info.type)
    if typing.get_origin(info.type) is not tuple or len(args) != 2 or not dataclasses.is_dataclass(args[0]):
        return None
    of: Any = args[0]
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE,...",
        instance_from_str=lambda words: tuple(_config_of(of, word) for word in words),
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda values: [_word(value) for value in values],
    )


@_REGISTRY.primitive_rule
def _config_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    args = typing.get_args(info.type)
    if len(args) != 2 or args[1] is not type(None) or not dataclasses.is_dataclass(args[0]):
        return None
    of: Any = args[0]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE.json|KEY=VALUE,...|none",
        instance_from_str=lambda words: None if words[0] == "none" else _config_of(of, words[0]),
        is_instance=lambda x: x is None or isinstance(x, of),
        str_from_instance=lambda x: ["none" if x is None else _word(x)],
    )


def _config_of(cls: Any, word: str) -> Any:
    return config.load(cls, Path(word)) if word.endswith(".json") else config.from_dict(cls, _values(word))


def _word(settings: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in config.to_dict(settings).items())


def _values(word: str) -> dict[str, Any]:
    """`kind=folder,ratio=3` -> {"kind": "folder", "ratio": 3}."""
    return {key: _json_or_text(value) for key, value in map(_pair, word.split(","))}


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} is not KEY=VALUE")
    return key, value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
