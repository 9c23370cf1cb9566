"""Word error rate: how many words of a transcript are wrong, missing or too many.

Place in the pipeline: scores the speech tokenizer (its ASR head), the text-to-token model (its tokens read back) and
spoken answers. Both sides are compared as `text.spoken_form`.
Trap: the rate of a set is total errors over total reference words, not the mean of the rates of its sentences.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from speechquilt.text import spoken_form


@dataclass(frozen=True, kw_only=True)
class WordErrors:
    """Error counts against `words` reference words; `+` adds the counts of two sets."""

    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0
    words: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference word, above 1 when a transcript babbles. Raises ValueError without reference words."""
        if not self.words:
            raise ValueError("a word error rate needs reference words; every reference text is empty")
        return self.errors / self.words

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(
            substitutions=self.substitutions + other.substitutions,
            insertions=self.insertions + other.insertions,
            deletions=self.deletions + other.deletions,
            words=self.words + other.words,
        )


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Fewest edits (Levenshtein over words) that turn the reference into the hypothesis, by kind."""
    reference_words = spoken_form(reference).split()
    hypothesis_words = spoken_form(hypothesis).split()
    cost = _edit_table(reference_words, hypothesis_words)
    i, j = len(reference_words), len(hypothesis_words)
    substitutions = insertions = deletions = 0
    while i or j:
        different = int(bool(i and j) and reference_words[i - 1] != hypothesis_words[j - 1])
        if i and j and cost[i, j] == cost[i - 1, j - 1] + different:
            substitutions += different
            i, j = i - 1, j - 1
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            deletions += 1
            i -= 1
        else:
            insertions += 1
            j -= 1
    return WordErrors(
        substitutions=substitutions, insertions=insertions, deletions=deletions, words=len(reference_words)
    )


def wer(pairs: Iterable[tuple[str, str]]) -> WordErrors:
    """Counts over all (reference, hypothesis) pairs; `.rate` is the word error rate of the set."""
    return sum((word_errors(reference, hypothesis) for reference, hypothesis in pairs), WordErrors())


def _edit_table(reference: list[str], hypothesis: list[str]) -> np.ndarray:
    """`cost[i, j]`: fewest edits between the first i reference and the first j hypothesis words. Each row is one numpy
    expression: deletions and substitutions first, then insertions as a running minimum of cost - j."""
    ids = {word: k for k, word in enumerate(dict.fromkeys(reference + hypothesis))}
    hypothesis_J = np.array([ids[w] for w in hypothesis], dtype=np.int64)
    columns = np.arange(len(hypothesis) + 1)
    cost = np.zeros((len(reference) + 1, len(hypothesis) + 1), dtype=np.int64)
    cost[0] = columns
    for i, word in enumerate(reference, start=1):
        row = cost[i - 1] + 1
        row[1:] = np.minimum(row[1:], cost[i - 1, :-1] + (hypothesis_J != ids[word]))
        cost[i] = np.minimum.accumulate(row - columns) + columns
    return cost
