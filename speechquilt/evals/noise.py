"""Noise of synthetic speech: how far the tokens of spoken spans read back as what was spoken, by kind of text.

A sample of an interleaving job's spans is read back; `stats.json` beside the shards keeps the counts.
Trap: the reader is the speech tokenizer's own ASR head. Its own mistakes are in the rate, what it guesses rightly from
wrong tokens is not; so only rates of one tokenizer may be compared.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np

from speechquilt.counts import Counts, add_counts
from speechquilt.data.interleaving.synthetic import split_words
from speechquilt.evals.intervals import rate_interval, rate_sums
from speechquilt.evals.wer import word_errors

Kind = Literal["prose", "numbers", "names", "markup", "code"]
KINDS: tuple[Kind, ...] = get_args(Kind)

WAITING = 512  # spans held before they are read back

_CODE = re.compile(
    r"`"
    r"|\w\(\w*\)|\w\(\w+,"  # call() call(x) call(x,
    r"|\b[A-Za-z]\w*_\w+"  # snake_case
    r"|\b[a-z]{2,}[A-Z][a-z]"  # camelCase, but neither iPhone nor macOS
    r"|[{};]\s*$|==|!=|->|=>|::|&&|\|\||[-+*/]=|\w=\w"
    r"|(?<!\S)--[a-z]"  # --flag
    r"|(?<!\S)[~.]{0,2}/\w+[/.]\w"  # /a/path
)
_MARKUP = re.compile(
    r"</?[A-Za-z][^<>]*>|&#?\w+;"  # tags, entities
    r"|https?://|\bwww\.|\S@\S+\.\S"
    r"|\*\*|__|\]\(|\[\[|(?m:^\s*(?:#{1,6}|\||>)\s)|\S\|\S"  # Markdown and tables
    r"|\\[A-Za-z]+|\$[^$\d\s][^$]*\$"  # TeX
)
_NUMBER = re.compile(r"\d|[$€£¥%]")
_SENTENCE_END = re.compile(r"[.!?:…][\"'”’)\]]*$")
_NOT_NAMES = frozenset({"I", "I'm", "I'd", "I'll", "I've", "A", "O"})


class TokenReader(Protocol):
    """What reads tokens back: our speech tokenizer with its ASR head."""

    def read_back(self, tokens: Sequence[np.ndarray]) -> list[str]: ...


def kind_of(text: str) -> Kind:
    """The kind of a span's *written* text. The first that fits, from what is hardest to say:

    code: calls, identifiers, operators, options, paths; markup: tags, Markdown, tables, addresses, TeX; numbers: a digit or
    a currency or per cent sign; names: a capital inside a sentence, or an abbreviation in capitals; prose: the rest.
    """
    if _CODE.search(text):
        return "code"
    if _MARKUP.search(text):
        return "markup"
    if _NUMBER.search(text):
        return "numbers"
    return "names" if _has_name(text) else "prose"


def _has_name(text: str) -> bool:
    """A capital where no sentence begins. The first word says nothing, and a text all in capitals has no names."""
    words = text.split()
    if sum(_is_capitals(word) for word in words) > len(words) / 2:
        return False
    for before, word in pairwise(words):
        bare = word.strip("\"'“”‘’()[],.;:!?").replace("’", "'")
        if bare[:1].isupper() and bare not in _NOT_NAMES and (_is_capitals(bare) or not _SENTENCE_END.search(before)):
            return True
    return False


def _is_capitals(word: str) -> bool:
    return len(word) > 1 and word.isupper()


class NoiseMeter:
    """Reads spoken spans back and counts word errors by kind of text. The same spans in the same order give the same counts.

    Words are those of `text.spoken_form`; a Han or kana character is a word. Raises ValueError at once when `tokenizer`
    cannot read (a released tokenizer has no ASR head), not after hours of generation.
    """

    def __init__(self, tokenizer: TokenReader) -> None:
        tokenizer.read_back([np.zeros(1, dtype=np.int32)])
        self._tokenizer = tokenizer
        self._waiting: list[tuple[Kind, str, np.ndarray]] = []
        self._counts: Counts = {}

    def add(self, written: str, spoken: str, ids_T: np.ndarray) -> None:
        """One span: its written text (gives the kind), the words that were to be spoken, and its local speech ids."""
        self._waiting.append((kind_of(written), spoken, np.asarray(ids_T)))
        if len(self._waiting) == WAITING:
            self._read()

    def counts(self) -> Counts:
        """What was added so far: per kind that occurred the sums over spans of 1, words w, errors e, w^2, we and e^2."""
        self._read()
        return sorted_kinds(self._counts)

    def _read(self) -> None:
        waiting = sorted(self._waiting, key=lambda span: len(span[2]))  # equal lengths together: little padding
        self._waiting = []
        heard = self._tokenizer.read_back([ids_T for _, _, ids_T in waiting])
        for (kind, spoken, _), text in zip(waiting, heard):
            found = word_errors(_spaced(spoken), _spaced(text))
            self._counts = add_counts(self._counts, {kind: rate_sums([(found.length, found.errors)])})


def sorted_kinds(counts: Counts) -> Counts:
    """The same counts with the kinds in the order of `KINDS`."""
    return dict(sorted(counts.items(), key=lambda item: KINDS.index(item[0])))


def report(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Per kind `wer` (errors / words), its 95 % interval `low` .. `high`, `spans` and `words`; "all" is every kind together.

    A kind without a word of reference has no rate and is left out. `rate_interval` says how the interval is made.
    """
    everything: Counts = {}
    for of_kind in counts.values():
        everything = add_counts(everything, {"all": of_kind})
    return {kind: _rate(of_kind) for kind, of_kind in {**counts, **everything}.items() if of_kind["words"]}


def _rate(of_kind: Mapping[str, int]) -> dict[str, float]:
    low, high = rate_interval(of_kind)
    wer = of_kind["errors"] / of_kind["words"]
    return {"wer": wer, "low": low, "high": high, "spans": of_kind["spans"], "words": of_kind["words"]}


def _spaced(text: str) -> str:
    """Characters of scripts without spaces as words of their own."""
    return " ".join(split_words(text))
