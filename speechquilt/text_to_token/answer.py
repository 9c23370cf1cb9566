"""The grammar of an answer: which kind of id may follow which, word by word, whoever computes the probabilities.

An answer is `(silence)? (cue speech WORD_END (silence)?)* EOS`, its cues those of the text, in order; a silence is
speech WORD_END (see `examples.py`).
Trap: kinds are not ids. CUE stands for the next id of the text, whichever that is, SPEECH for the whole codebook.
"""

import copy
from collections.abc import Sequence

import numpy as np

from speechquilt.types import UnitEnd
from speechquilt.vocab import Vocab

WORD_END, EOS, CUE, SPEECH = KINDS = range(4)
# Where an answer stands, which decides what is legal next. OPEN: at the start, and after a word.
OPEN, AFTER_SILENCE, IN_CUE, AFTER_CUE, IN_WORD, IN_SILENCE = range(6)
# The place after a WORD_END, EOS, CUE (the last id of one) or speech token; -1 where that token is illegal. CUE is legal
# only while words remain, EOS only when none does.
NEXT_PLACE = [
    [-1, OPEN, AFTER_CUE, IN_SILENCE],  # OPEN
    [-1, OPEN, AFTER_CUE, -1],  # AFTER_SILENCE
    [-1, -1, AFTER_CUE, -1],  # IN_CUE
    [-1, -1, -1, IN_WORD],  # AFTER_CUE
    [OPEN, -1, -1, IN_WORD],  # IN_WORD
    [AFTER_SILENCE, -1, -1, IN_SILENCE],  # IN_SILENCE
]


class Position:
    """Where one answer stands among the cues of its text; `move` takes it on by one id."""

    def __init__(self, cues: Sequence[Sequence[int]]) -> None:
        self.cues = cues
        self.place = OPEN
        self.finished = False
        self._cue, self._at = 0, 0  # the next id of the text: its cue, and the place in that

    @property
    def num_unbegun(self) -> int:
        """Cues of which no id was said yet."""
        return len(self.cues) - self._cue - (self._at > 0)

    @property
    def next_cue(self) -> Sequence[int]:
        """The ids that are left of the cue that comes next; empty when none does."""
        return self.cues[self._cue][self._at :] if self._cue < len(self.cues) else ()

    def legal(self) -> list[int]:
        """The kinds that may come next, in order."""
        impossible = EOS if self._cue < len(self.cues) else CUE
        return [kind for kind in KINDS if NEXT_PLACE[self.place][kind] >= 0 and kind != impossible]

    def moved(self, kind: int) -> "Position":
        """The position one id of this kind later; this one stays. Raises ValueError when the kind is not legal here."""
        after = copy.copy(self)
        after.move(kind)
        return after

    def move(self, kind: int) -> None:
        """Raises ValueError when this kind is not legal here."""
        if self.finished or kind not in self.legal():
            raise ValueError(f"kind {kind} is not legal at place {self.place} with {self.num_unbegun} cues to come")
        self.finished = kind == EOS
        if kind == CUE and len(self.next_cue) > 1:
            self.place, self._at = IN_CUE, self._at + 1
            return
        if kind == CUE:
            self._cue, self._at = self._cue + 1, 0
        self.place = NEXT_PLACE[self.place][kind]


def kind_of(model_id: int, vocab: Vocab) -> int:
    """Kind of an id of an answer."""
    if model_id == vocab.word_end:
        return WORD_END
    if model_id == vocab.eos:
        return EOS
    return CUE if vocab.is_text(model_id) else SPEECH


def unit_ends(answer: np.ndarray, vocab: Vocab) -> np.ndarray:
    """`UnitEnd` code of every id: the one before a WORD_END ends a unit, and so does the one that stands last in a runaway.
    A unit that began with a cue is a word, one without is silence."""
    ends = np.append(answer[1:] == vocab.word_end, True)
    cues_so_far = np.cumsum(vocab.is_text(answer))
    last_word_end = np.maximum.accumulate(np.where(answer == vocab.word_end, np.arange(len(answer)), -1))
    cues_before_unit = np.where(last_word_end >= 0, cues_so_far[last_word_end], 0)
    kind = np.where(cues_so_far > cues_before_unit, UnitEnd.WORD, UnitEnd.SILENCE)
    return np.where(ends, kind, UnitEnd.NONE).astype(np.uint8)
