"""The bulk jobs with their settings as keywords, as tests like to write them."""

import dataclasses
from pathlib import Path
from typing import Any

from speechquilt.data.interleaving.synthetic import InterleaveConfig
from speechquilt.jobs.align_audio import AlignSettings, align_folder
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.interleave_text import InterleaveSettings, interleave_corpus
from speechquilt.jobs.tokenize_audio import TokenizeSettings, tokenize_folder


def _made(cls: Any, keywords: dict[str, Any]) -> Any:
    """An instance of the fields among the keywords, which are taken out."""
    return cls(**{f.name: keywords.pop(f.name) for f in dataclasses.fields(cls) if f.name in keywords})


def tokenize(source: Path, output: Path, tokenizer: Path, **keywords: Any) -> None:
    settings, execution = _made(TokenizeSettings, keywords), _made(Execution, keywords)
    assert not keywords
    tokenize_folder(source, output, tokenizer, settings, execution)


def align(source: Path, output: Path, aligner: Path, **keywords: Any) -> None:
    settings, execution = _made(AlignSettings, keywords), _made(Execution, keywords)
    assert not keywords
    align_folder(source, output, aligner, settings, execution)


def interleave(source: str, output: Path, text_to_token: Path, **keywords: Any) -> None:
    """`slice_bytes` may stand for `slice_mib`."""
    if "slice_bytes" in keywords:
        keywords["slice_mib"] = keywords.pop("slice_bytes") / 2**20
    tokenizer = keywords.pop("tokenizer", None)
    rule = _made(InterleaveConfig, keywords)
    settings, execution = _made(InterleaveSettings, keywords), _made(Execution, keywords)
    assert not keywords
    interleave_corpus(
        source, output, text_to_token, tokenizer=tokenizer, rule=rule, settings=settings, execution=execution
    )
