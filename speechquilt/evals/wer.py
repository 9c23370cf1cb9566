"""Word and character error rates: how many words or characters of a transcript are wrong, missing or too many.

Both sides are compared as `text.spoken_form`.
Trap: the rate of a set is total errors over total reference words, not the mean of the rates of its sentences. Scripts
without spaces have a single word per sentence; character errors, which ignore spaces, are for them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from speechquilt.text import spoken_form


@dataclass(frozen=True, kw_only=True)
class EditErrors:
    """Error counts against `length` words or characters of reference; `+` adds the counts of two sets."""

    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0
    length: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per unit of reference, above 1 when a transcript babbles. Raises ValueError without a reference."""
        if not self.length:
            raise ValueError("an error rate needs reference words; every reference text is empty")
        return self.errors / self.length

    def __add__(self, other: "EditErrors") -> "EditErrors":
        return EditErrors(
            substitutions=self.substitutions + other.substitutions,
            insertions=self.insertions + other.insertions,
            deletions=self.deletions + other.deletions,
            length=self.length + other.length,
        )


def word_errors(reference: str, hypothesis: str) -> EditErrors:
    """Fewest edits (Levenshtein over words) that turn the reference into the hypothesis, by kind."""
    return _edits(spoken_form(reference).split(), spoken_form(hypothesis).split())


def character_errors(reference: str, hypothesis: str) -> EditErrors:
    """The same over characters without spaces, as Chinese is scored (spec 1, 2.7)."""
    return _edits(list(spoken_form(reference).replace(" ", "")), list(spoken_form(hypothesis).replace(" ", "")))


def wer(pairs: Iterable[tuple[str, str]]) -> EditErrors:
    """Counts over all (reference, hypothesis) pairs; `.rate` is the word error rate of the set."""
    return _total(word_errors, pairs)


def cer(pairs: Iterable[tuple[str, str]]) -> EditErrors:
    """Counts over all (reference, hypothesis) pairs; `.rate` is the character error rate of the set."""
    return _total(character_errors, pairs)


def _total(errors: Callable[[str, str], EditErrors], pairs: Iterable[tuple[str, str]]) -> EditErrors:
    return sum((errors(reference, hypothesis) for reference, hypothesis in pairs), EditErrors())


def _edits(reference: Sequence[str], hypothesis: Sequence[str]) -> EditErrors:
    cost = _edit_table(reference, hypothesis)
    i, j = len(reference), len(hypothesis)
    substitutions = insertions = deletions = 0
    while i or j:
        different = int(bool(i and j) and reference[i - 1] != hypothesis[j - 1])
        if i and j and cost[i, j] == cost[i - 1, j - 1] + different:
            substitutions += different
            i, j = i - 1, j - 1
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            deletions += 1
            i -= 1
        else:
            insertions += 1
            j -= 1
    return EditErrors(substitutions=substitutions, insertions=insertions, deletions=deletions, length=len(reference))


def _edit_table(reference: Sequence[str], hypothesis: Sequence[str]) -> np.ndarray:
    """`cost[i, j]`: fewest edits between the first i units of reference and the first j of hypothesis. Each row is one numpy
    expression: deletions and substitutions first, then insertions as a running minimum of cost - j."""
    ids = {word: k for k, word in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    hypothesis_J = np.array([ids[w] for w in hypothesis], dtype=np.int64)
    columns = np.arange(len(hypothesis) + 1)
    cost = np.zeros((len(reference) + 1, len(hypothesis) + 1), dtype=np.int64)
    cost[0] = columns
    for i, word in enumerate(reference, start=1):
        row = cost[i - 1] + 1
        row[1:] = np.minimum(row[1:], cost[i - 1, :-1] + (hypothesis_J != ids[word]))
        cost[i] = np.minimum.accumulate(row - columns) + columns
    return cost
