"""The word error rate of a set of sentences: with its interval, and how it stands in results.json.

Trap: texts are compared by `plain_words`. `text.spoken_form` alone counts "Mr." for "mister" and "3" for "three" as errors, which
would be held against a reader that writes, as Whisper does, and never against one that was trained on spoken forms.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from speechquilt.data.interleaving.verbalise import verbalise
from speechquilt.evals.intervals import rate_interval, rate_sums
from speechquilt.evals.measures import Chart, Measure, Promise, Value, under
from speechquilt.evals.wer import word_errors
from speechquilt.text import spoken_form

_FIELDS = (
    Measure(key="low", kind="rate", meaning="lower end of its 95 % interval (a score interval; errors come in whole sentences)"),
    Measure(key="high", kind="rate", meaning="upper end of the same interval"),
    Measure(key="n", kind="count", meaning="sentences"),
    Measure(key="words", kind="count", meaning="words of reference"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ErrorRate:
    """Errors per word, with the 95 % interval over `n` sentences of `words` words together."""

    value: float
    low: float
    high: float
    n: int
    words: int


def plain_words(text: str) -> str:
    """A text as words that are spoken, in `spoken_form`: "Mr. Lee, 3 p.m." is "mister lee three pm"."""
    return spoken_form(verbalise(text))


def error_rate(pairs: Iterable[tuple[str, str]]) -> ErrorRate:
    """Of (said, heard) texts. Raises ValueError without a word that was said."""
    found = [word_errors(plain_words(said), plain_words(heard)) for said, heard in pairs]
    sums = rate_sums((errors.length, errors.errors) for errors in found)
    if not sums["words"]:
        raise ValueError(f"{len(found)} sentences without a word have no error rate; give texts that were spoken")
    low, high = rate_interval(sums)
    return ErrorRate(value=sums["errors"] / sums["words"], low=low, high=high, n=sums["spans"], words=sums["words"])


def rate_results(prefix: str, rate: ErrorRate) -> dict[str, Value]:
    """The flat lines of one rate: `rate_results("heard.human.tokens", rate)`."""
    return {f"{prefix}.{'wer' if key == 'value' else key}": value for key, value in vars(rate).items()}


def rate_measures(
    prefix: str, what: str, *, promise: Promise | tuple[Promise, ...] | None = None, chart: Chart | None = None
) -> tuple[Measure, ...]:
    """The declarations of what `rate_results` gives."""
    rate = Measure(key=f"{prefix}.wer", kind="rate", meaning=f"{what}: word error rate", promise=promise, chart=chart)
    return (rate, *under(prefix, what, _FIELDS))
