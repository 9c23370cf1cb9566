"""A laid-out document as the parts that fit into rows: what each holds, and what becomes of the rest.

Trap: a part does not end where its document does, so its last token is an EOS that is no target, and the token before
it has none. A document with context (the source side of a pair) is never split: behind the cut, its target would lack
what it is made from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from speechquilt.types import IGNORE, LaidOut
from speechquilt.vocab import Vocab

Patch = Callable[[LaidOut], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What goes into a row. `number` counts the parts of a document, `is_last` of them; `num_cut`: tokens of the
    document that are in no part because nothing may follow this one.
    """

    number: int
    is_last: bool
    laid_out: LaidOut
    labels_T: np.ndarray
    opens_T: np.ndarray
    closes_T: np.ndarray
    num_units: int
    num_cut: int


def parts_of(
    laid_out: LaidOut, patch: Patch, vocab: Vocab, *, splits: bool, units_per_row: int, tokens_per_row: int
) -> Iterator[Part]:
    """All parts of a document in order. Each begins with BOS and a marker; those behind the first open their span
    again, which is no target. Without `splits` there is one, and none when no target is left in it.
    """
    number, rest = 0, laid_out
    while True:
        fitted, opens_T, closes_T = _fitted(rest, patch, vocab.eos, units_per_row, tokens_per_row)
        is_cut = len(fitted.ids_T) < len(rest.ids_T)
        behind = _behind(rest, len(fitted.ids_T) - 1, vocab) if is_cut and splits else None
        labels_T = _labels(fitted)
        if is_cut and not splits and (labels_T == IGNORE).all():
            return
        yield Part(
            number=number,
            is_last=behind is None,
            laid_out=fitted,
            labels_T=labels_T,
            opens_T=opens_T,
            closes_T=closes_T,
            num_units=int(opens_T.sum()),
            num_cut=len(rest.ids_T) - len(fitted.ids_T) if is_cut and behind is None else 0,
        )
        if behind is None:
            return
        number, rest = number + 1, behind


def _fitted(
    laid_out: LaidOut, patch: Patch, eos: int, units_per_row: int, tokens_per_row: int
) -> tuple[LaidOut, np.ndarray, np.ndarray]:
    """The document, cut as often as it takes to fit into a row, and its patches."""
    limit = tokens_per_row
    while True:
        if len(laid_out.ids_T) > limit:
            laid_out = _cut(laid_out, limit, eos)
        opens_T, closes_T = patch(laid_out)
        first_U = np.flatnonzero(opens_T)
        if len(first_U) <= units_per_row:
            return laid_out, opens_T, closes_T
        limit = int(first_U[units_per_row - 1]) + 1  # the last unit of the row is the EOS


def _labels(laid_out: LaidOut) -> np.ndarray:
    """The next id where it is a target, else IGNORE; nothing follows the last token."""
    labels_T = np.full(len(laid_out.ids_T), IGNORE, dtype=np.int64)
    labels_T[:-1] = np.where(laid_out.loss_T[1:], laid_out.ids_T[1:], IGNORE)
    return labels_T


def _cut(laid_out: LaidOut, num_tokens: int, eos: int) -> LaidOut:
    """The first `num_tokens` - 1 tokens and an EOS that is not a target: the document does not really end here."""
    keep = num_tokens - 1
    return replace(
        laid_out,
        ids_T=np.append(laid_out.ids_T[:keep], eos),
        is_speech_T=np.append(laid_out.is_speech_T[:keep], False),
        loss_T=np.append(laid_out.loss_T[:keep], False),
        unit_end_T=None if laid_out.unit_end_T is None else np.append(laid_out.unit_end_T[:keep], np.uint8(0)),
    )


def _behind(laid_out: LaidOut, start: int, vocab: Vocab) -> LaidOut | None:
    """What stands from token `start` on, as a document that opens the span it begins in, as `Vocab.lay_out` would; None
    when that is no more than markers."""
    markers = (vocab.marker("text"), vocab.marker("speech"))
    if np.isin(laid_out.ids_T[start:-1], markers).all():
        return None
    opening = vocab.marker("speech" if laid_out.is_speech_T[start] else "text")
    if laid_out.ids_T[start] in markers:
        opening, start = int(laid_out.ids_T[start]), start + 1
    bare = opening == vocab.marker("text") and not vocab.opening_marker
    head_T = np.array([vocab.bos] if bare else [vocab.bos, opening])
    none_T = np.zeros(len(head_T), dtype=bool)
    ends_T = laid_out.unit_end_T
    return replace(
        laid_out,
        ids_T=np.concatenate([head_T, laid_out.ids_T[start:]]),
        is_speech_T=np.concatenate([none_T, laid_out.is_speech_T[start:]]),
        loss_T=np.concatenate([none_T, laid_out.loss_T[start:]]),
        unit_end_T=None if ends_T is None else np.concatenate([none_T.astype(np.uint8), ends_T[start:]]),
    )
