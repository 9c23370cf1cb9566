"""Which words are behind each run of speech tokens: shards hold ids, word ends and the original text, but not which is where.

Trap: where the parts of the text cannot be told from each other, a run stays without words; a guess would look like a fact.
"""

from collections.abc import Sequence

import numpy as np

from speechquilt.data.interleaving.speakable import language_of
from speechquilt.data.interleaving.synthetic import split_words
from speechquilt.data.interleaving.verbalise import LANGUAGES, verbalise
from speechquilt.reports.shard_page import Unit
from speechquilt.types import Document, Segment, UnitEnd


def said(written: str, text: str, num_words: int | None) -> list[str]:
    """The words of a spoken run: as written where their number fits, else as spoken ("42" is two words); `text` is around."""
    if num_words is not None and len(written.split()) != num_words:
        try:
            return verbalise(written, language_of(text, LANGUAGES)).split()
        except ImportError:  # without the extra `speaking` such a run stays without names
            return []
    return written.split()


def span_texts(document: Document, text: str, spelled: Sequence[str]) -> list[str]:
    """The written words behind each segment that is speech, "" where they cannot be told.

    `spelled`: the text of each text segment, "" for speech and when unknown. The text segments are looked up in the original
    `text`, in order; what lies between them was spoken. A pair, or speech alone, of as many words as the text speaks all of it.
    """
    speech = [k for k, segment in enumerate(document.segments) if segment.modality == "speech"]
    found = [""] * len(document.segments)
    alone = len(document.segments) == 1 or is_pair(document)
    if alone and len(speech) == 1 and count_words(document.segments[speech[0]]) == len(text.split()):
        found[speech[0]] = text.strip()
        return found
    num_words = [count_words(segment) for segment in document.segments]
    return _between(text, spelled, num_words) or _between(text, spelled, [None] * len(found)) or found


def _between(text: str, spelled: Sequence[str], num_words: Sequence[int | None]) -> list[str]:
    """The parts of `text` between the spelled ones, each of so many words where a number is given; [] when there are none.

    Looks from left to right for the first place of each spelled text, and never back.
    """
    text, done, found = text.strip(), 0, [""] * len(spelled)
    waiting: int | None = None  # the spoken segment before the next spelled one
    for k, own in enumerate(spelled):
        if not own and waiting is not None:
            return []  # nothing says where the first of two spoken ones ends
        if not own:
            waiting = k
            continue
        at = done + len(text[done:]) - len(text[done:].lstrip())
        if waiting is not None:
            at = _next_place(text, own, at, num_words[waiting], last=k + 1 == len(spelled))
            found[waiting] = text[done:at].strip() if at >= 0 else ""
            waiting = None
        if at < 0 or not text.startswith(own, at):
            return []
        done = at + len(own)
    if waiting is not None:
        found[waiting] = text[done:].strip()
    return found if waiting is None or _fits(found[waiting], num_words[waiting]) else []


def _next_place(text: str, own: str, start: int, num_words: int | None, last: bool) -> int:
    """Where `own` next stands after a spoken part that begins at `start`, -1 when nowhere; the `last` ends the text."""
    at = start
    for word in split_words(text[start:]):
        begin = at + len(word) - len(word.lstrip())
        ends = not last or begin + len(own) == len(text)
        if ends and text.startswith(own, begin) and _fits(text[start:begin], num_words):
            return begin
        at += len(word)
    return -1


def _fits(spoken: str, num_words: int | None) -> bool:
    return bool(spoken.strip()) and num_words in (None, len(spoken.split()))


def is_pair(document: Document) -> bool:
    """ASR or TTS: one side is only context, and every word is there twice, once in each modality."""
    return not all(segment.loss for segment in document.segments)


def count_words(segment: Segment) -> int | None:
    return None if segment.unit_end_T is None else int(np.count_nonzero(segment.unit_end_T == UnitEnd.WORD))


def units_of(segment: Segment, words: Sequence[str]) -> list[Unit]:
    """The words and silences of a spoken run with their tokens; named when there are as many `words` as word ends.

    Tokens after the last end, or all of a run without ends, are one unit of unknown kind.
    """
    if segment.unit_end_T is None:
        return [Unit(kind="unknown", ids_T=segment.ids_T.tolist())] if len(segment.ids_T) else []
    names = iter(words if len(words) == count_words(segment) else [])
    units: list[Unit] = []
    ids: list[int] = []
    pieces: list[int] = []
    for i, end in zip(segment.ids_T.tolist(), segment.unit_end_T.tolist()):
        ids.append(i)
        if end == UnitEnd.PIECE:
            pieces.append(len(ids))
        elif end != UnitEnd.NONE:
            word = end == UnitEnd.WORD
            text = next(names, "") if word else ""
            units.append(Unit(kind="word" if word else "silence", ids_T=ids, text=text, pieces=pieces))
            ids, pieces = [], []
    return [*units, Unit(kind="unknown", ids_T=ids, pieces=pieces)] if ids else units
