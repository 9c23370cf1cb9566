"""SpeechQuilt: pre-train speech-text language models, from raw audio and text to a measured model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "generate",
    "interleave",
    "load_decoder",
    "load_lm",
    "load_text_to_token",
    "load_tokenizer",
    "score",
    "speak",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    """The functions of `speechquilt.python_api`, whose import loads torch, when they are first wanted."""
    if name in __all__:
        return getattr(import_module("speechquilt.python_api"), name)
    raise AttributeError(f"module 'speechquilt' has no attribute {name!r}")
