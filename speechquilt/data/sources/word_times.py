"""The word times of a row, in the forms that tools write them, and what they must fulfil before anything is made of
them.

Trap: times in another unit, or words of another text, still look like an alignment. They are checked against the
audio's length and the transcript, so both must be known.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.text import spoken_form
from speechquilt.types import AlignedWord, Row

SLACK_S = 0.5  # by which times may reach out of the audio: rounding, padding of codecs
LONGEST_WORD_S = (
    5.0  # of a word of `CHARACTERS_PER_WORD` characters at most; in scripts without spaces a word may be a sentence
)
CHARACTERS_PER_WORD = 5
SAME_WORDS = 0.5  # share of the words that text and word times must have in common: numbers may be spelled differently
SAME_LETTERS = 0.75  # or, in a short text, of the letters
SHORT_TEXT = 200  # characters
_TEXT, _START, _END = ("text", "word"), ("start_s", "start"), ("end_s", "end")
_Timed = tuple[str, float | None, float | None]
_FORM = "words are not [[word, start_s, end_s], ...]"


def words_of(row: Row, text: str = "", duration_s: float | None = None) -> tuple[AlignedWord, ...]:
    """The word times of a row in seconds: [word, start, end] each, or {text, start_s, end_s}, or whisperX's {word,
    start, end}.

    Words without times share the gap between their neighbours. For a row that is a part of its file (`start`, `end`)
    times count from the start of the file, and the answer's from the start of the part. With `text` and `duration_s`
    (of what was heard) they are checked against both. Raises BrokenAudio naming the word and the rule.
    """
    given = row.get("words")
    if not _filled(given):
        return ()
    if not isinstance(given, list | tuple):
        raise BrokenAudio(_FORM, f"`words` is {str(given)[:60]!r}")
    shift_s = row.get("start") or 0.0
    timed = _with_gaps([_triple(word) for word in given], shift_s, None if duration_s is None else shift_s + duration_s)
    words = tuple(AlignedWord(text=w, start_s=a - shift_s, end_s=b - shift_s) for w, a, b in timed)
    check_words(words, duration_s)
    if text:
        _check_text(words, text)
    return words


def check_words(words: Sequence[AlignedWord], duration_s: float | None = None) -> None:
    """Raises BrokenAudio at the first word whose times cannot be right; words in order, inside the audio, of credible
    length.
    """
    before = -SLACK_S
    for number, word in enumerate(words, 1):
        name = f"word {number} {word.text!r} from {word.start_s:g} to {word.end_s:g} s"
        if not (math.isfinite(word.start_s) and math.isfinite(word.end_s)):
            raise BrokenAudio("word times are not numbers", f"{name}; leave out the times of words that have none")
        if word.end_s < word.start_s:
            raise BrokenAudio("a word ends before it starts", f"{name}; mend the alignment")
        if word.start_s < before:
            rule = "starts before the word in front of it" if number > 1 else "starts before the audio"
            raise BrokenAudio("its word times are not in order", f"{name} {rule}; sort the alignment")
        if duration_s is not None and word.end_s > duration_s + SLACK_S:
            raise BrokenAudio("word times behind the end of the audio", f"{name}, {_behind(words[-1], duration_s)}")
        most_s = LONGEST_WORD_S * max(1, len(word.text) // CHARACTERS_PER_WORD)
        if word.end_s - word.start_s > most_s:
            raise BrokenAudio(
                f"a word of more than {LONGEST_WORD_S:g} s",
                f"{name} lasts {word.end_s - word.start_s:.1f} s; check that the transcript says all that is heard",
            )
        before = word.start_s


def _behind(last: AlignedWord, duration_s: float) -> str:
    unit = (
        "; milliseconds? divide them by 1000" if last.end_s / 1000 <= duration_s + SLACK_S else "; mend the alignment"
    )
    return f"but the audio lasts {duration_s:.2f} s{unit}"


def _filled(given: Any) -> bool:
    return given is not None and not (isinstance(given, float) and math.isnan(given)) and len(given) > 0


def _triple(word: Any) -> _Timed:
    """None where there is no time (null, or no such key)."""
    try:
        if isinstance(word, dict):
            text = next(word[key] for key in _TEXT if key in word)
            start, end = (next((word[key] for key in keys if key in word), None) for keys in (_START, _END))
        else:
            text, start, end = word
        if start is None and end is None:
            return str(text), None, None
        return str(text), _seconds(start), _seconds(end)
    except (TypeError, ValueError, StopIteration) as error:
        raise BrokenAudio(_FORM, f"one is {str(word)[:80]}") from error


def _seconds(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{value} is no time")
    return float(value)


def _with_gaps(words: Sequence[_Timed], first_s: float, last_s: float | None) -> list[tuple[str, float, float]]:
    """Runs of words without times divide the gap between their neighbours by their letters. `first_s`, `last_s`: of the
    audio.
    """
    if words and all(start is None for _, start, _ in words):
        raise BrokenAudio("word times are not numbers", "no word has times; leave `words` out, `align` finds them")
    found: list[tuple[str, float, float]] = []
    for has_times, run in itertools.groupby(enumerate(words), key=lambda entry: entry[1][1] is not None):
        numbered = list(run)
        if has_times:
            found += [(text, start, end) for _, (text, start, end) in numbered if start is not None and end is not None]
            continue
        low_s = found[-1][2] if found else first_s
        behind = numbered[-1][0] + 1
        high_s = words[behind][1] if behind < len(words) else last_s
        room_s = max(0.0, (low_s if high_s is None else high_s) - low_s)
        letters = [max(1, len(text)) for _, (text, _, _) in numbered]
        ends = [low_s + room_s * n / sum(letters) for n in itertools.accumulate(letters)]
        found += [(text, a, b) for (_, (text, _, _)), a, b in zip(numbered, [low_s, *ends], ends)]
    return found


def _check_text(words: Sequence[AlignedWord], text: str) -> None:
    said, written = spoken_form(" ".join(w.text for w in words)), spoken_form(text)
    if _same(said, written):
        return
    missing = Counter(_units(said)) - Counter(_units(written))
    first = next(iter(missing), said[:30])
    raise BrokenAudio(
        "words of another text",
        f"{first!r} and others are not in the transcript {text[:60]!r}; give the words of this recording, or leave `words` out",
    )


def _same(said: str, written: str) -> bool:
    if said.replace(" ", "") == written.replace(" ", ""):
        return True
    a, b = Counter(_units(said)), Counter(_units(written))
    if (a & b).total() >= SAME_WORDS * max(a.total(), b.total()):
        return True
    if max(len(said), len(written)) > SHORT_TEXT:
        return False
    return SequenceMatcher(None, said, written, autojunk=False).ratio() >= SAME_LETTERS


def _units(spoken: str) -> list[str]:
    """Words; characters where a script writes no spaces, so that it does not matter how the words were cut."""
    words = spoken.split()
    return [unit for word in words for unit in (word if _no_spaces(word) else [word])]


def _no_spaces(word: str) -> bool:
    return any("\u0e00" <= c <= "\u0eff" or "\u3040" <= c <= "\u9fff" for c in word)
