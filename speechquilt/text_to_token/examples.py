"""Training examples for the text-to-token model: whole utterances and short spans, packed into rows.

Trap: interleaving asks the model for *spans* that start and end in mid-sentence, so spans cut at word boundaries must
be seen in training (spec synthetic-interleaved, section 4). A cut span runs from the first token of its first word to
the last token of its last word: the silence outside is dropped, because nothing in the text says that a pause is
there, while the pauses inside it stay. Whole utterances keep the silence at their edges.

One example is `BOS, text ids, <speech>, units, EOS`. The unit of a word is its own text ids once more (its cue), its
speech tokens, WORD_END; that of a silence run is its speech tokens, WORD_END. Why cues: without them the model has to
keep its place in the text by itself and loses it (docs/decisions/0006-word-cues.md). A recording without word times
is one word that is its whole text. Text is always `spoken_form`, in training and in generation.
"""

import bisect
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from speechquilt.config import fingerprint, to_dict
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.types import IGNORE, AlignedTokens, Batch
from speechquilt.vocab import Vocab

WINDOW = 2048  # examples packed together: enough to fill rows to about 99 %, small enough to resume at once
WHOLE = 0  # the first copy of every utterance in an epoch; the others are spans


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One word or one silence run, LOCAL ids, int64: `cue_ids` [L] of its text, empty for silence; `ids_T` of its speech."""

    cue_ids: np.ndarray
    ids_T: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TextToTokenExample:
    """A text and its speech as units in spoken order; the cues one after another are the ids of the text."""

    text: str
    units: tuple[Unit, ...]

    @property
    def text_ids(self) -> np.ndarray:
        return np.concatenate([unit.cue_ids for unit in self.units])

    @property
    def ids_T(self) -> np.ndarray:
        return np.concatenate([unit.ids_T for unit in self.units])


def prompt_ids(vocab: Vocab, text_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """`BOS, text ids, <speech>` as model ids, int64: all that the model is given."""
    return np.concatenate([[vocab.bos], vocab.to_model("text", np.asarray(text_ids)), [vocab.marker("speech")]])


def lay_out(vocab: Vocab, example: TextToTokenExample) -> tuple[np.ndarray, np.ndarray]:
    """-> model ids [N] int64 and which of them are targets [N] bool: after the <speech> marker everything but the ids of
    a cue that follow its first, which are certain wherever an answer is made or judged (`answer.py`)."""
    prompt = prompt_ids(vocab, example.text_ids)
    pieces: list[Any] = [prompt]
    is_target: list[Any] = [np.zeros(len(prompt), dtype=bool)]
    for unit in example.units:
        pieces += [vocab.to_model("text", unit.cue_ids), vocab.to_model("speech", unit.ids_T), [vocab.word_end]]
        is_target += [np.arange(len(unit.cue_ids)) == 0, np.ones(len(unit.ids_T) + 1, dtype=bool)]
    return np.concatenate([*pieces, [vocab.eos]]).astype(np.int64), np.concatenate([*is_target, [True]])


def whole_example(utterance: AlignedTokens, tokenizer: TextTokenizer) -> TextToTokenExample | None:
    """The utterance as it is, edge silences included; None when none of its words has both text and speech."""
    forms, word_T = _spoken_words(utterance)
    return _example(forms, utterance.ids_T, word_T, tokenizer)


def draw_span(
    utterance: AlignedTokens, tokenizer: TextTokenizer, rng: np.random.Generator, max_words: int
) -> TextToTokenExample | None:
    """A random run of 1 to `max_words` words; None when there is nothing to cut.

    Length uniform, then place uniform. A span starts and ends on words that own a token (words without one ride along
    inside), so the cut never asks for a sound that is not in it.
    """
    _, word_T = _spoken_words(utterance)
    owners = np.unique(word_T[word_T >= 0])
    if len(owners) == 0:
        return None
    length = int(rng.integers(1, min(max_words, len(owners)) + 1))
    start = int(rng.integers(0, len(owners) - length + 1))
    return cut_span(utterance, tokenizer, int(owners[start]), int(owners[start + length - 1]) + 1)


def cut_span(utterance: AlignedTokens, tokenizer: TextTokenizer, first: int, last: int) -> TextToTokenExample | None:
    """Words [first, last) and their tokens, without the silence around them; None when they have no token or text."""
    forms, word_T = _spoken_words(utterance)
    inside = np.flatnonzero((word_T >= first) & (word_T < last))
    if len(inside) == 0:
        return None
    cut = slice(int(inside[0]), int(inside[-1]) + 1)
    here_T = np.where(word_T[cut] < 0, -1, word_T[cut] - first)
    return _example(forms[first:last], utterance.ids_T[cut], here_T, tokenizer)


def _spoken_words(utterance: AlignedTokens) -> tuple[list[str], np.ndarray]:
    """Spoken form of each word, and the word of each token; tokens of words without a form are silence (-1)."""
    forms = [spoken_form(word) for word in utterance.words]
    has_form = np.array([*map(bool, forms), False])  # the last one answers for index -1
    word_T = np.asarray(utterance.word_T, dtype=np.int64)
    word_T = np.where(has_form[word_T], word_T, -1)
    # A word is one unit: silence between two tokens of the same word is part of it.
    before_T = np.maximum.accumulate(word_T)
    after_T = np.minimum.accumulate(np.where(word_T < 0, len(forms), word_T)[::-1])[::-1]
    return forms, np.where(before_T == after_T, before_T, word_T)


def _example(
    forms: Sequence[str], ids_T: np.ndarray, word_T: np.ndarray, tokenizer: TextTokenizer
) -> TextToTokenExample | None:
    """`word_T` indexes `forms`. A word without a token is a cue alone, right before the next word that has some."""
    if not (word_T >= 0).any():
        return None
    ids_T = np.asarray(ids_T, dtype=np.int64)
    cues = [np.asarray(tokenizer.encode_inside(form), dtype=np.int64) for form in forms]
    units: list[Unit] = []
    num_said = 0

    def mute(end: int) -> list[Unit]:
        return [Unit(cue_ids=cue, ids_T=ids_T[:0]) for cue in cues[num_said:end] if len(cue)]

    for run_T in np.split(np.arange(len(ids_T)), np.flatnonzero(np.diff(word_T)) + 1):
        word = int(word_T[run_T[0]])
        if word < 0:
            units.append(Unit(cue_ids=np.zeros(0, dtype=np.int64), ids_T=ids_T[run_T]))
        else:
            units += [*mute(word), Unit(cue_ids=cues[word], ids_T=ids_T[run_T])]
            num_said = word + 1
    return TextToTokenExample(text=" ".join(filter(None, forms)), units=(*units, *mute(len(cues))))


@dataclass(frozen=True, kw_only=True)
class TextToTokenDataConfig:
    """How the recordings are shown to the text-to-token model: each whole, and in pieces cut at words."""

    rows: int = 16
    """Rows of the global batch, over all ranks; a multiple of the number of ranks."""
    row_tokens: int = 512
    """Tokens in a row, at least 8. A row holds several examples; an example that is longer is left out."""
    spans_per_utterance: int = 2
    """Pieces cut at random from each utterance per epoch, beside the whole of it; 0 shows it whole only."""
    max_span_words: int = 15
    """Most words in a piece; lengths from 1 to it are drawn."""
    seed: int = 0
    """Decides the order of the examples and where pieces are cut."""

    def __post_init__(self) -> None:
        for key, low in (("rows", 1), ("row_tokens", 8), ("spans_per_utterance", 0), ("max_span_words", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")

    def build(
        self,
        utterances: Sequence[AlignedTokens],
        tokenizer: TextTokenizer,
        vocab: Vocab,
        rank: int = 0,
        world_size: int = 1,
    ) -> "TextToTokenLoader":
        return TextToTokenLoader(self, utterances, tokenizer, vocab, rank, world_size)


class TextToTokenLoader:
    """A `protocols.Loader`: shuffled examples for ever, packed so that little is padding.

    A row is a pure function of (config, epoch, window, row), so the state is those three numbers. Every rank walks the
    same global rows and keeps its own share: two ranks together read exactly what one would.
    Examples longer than a row cannot be packed; they are left out and counted in `Batch.meta["left_out"]`.
    """

    def __init__(
        self,
        config: TextToTokenDataConfig,
        utterances: Sequence[AlignedTokens],
        tokenizer: TextTokenizer,
        vocab: Vocab,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not utterances:
            raise ValueError(
                "text-to-token training got 0 utterances; it needs at least one with text and speech tokens"
            )
        if config.rows % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rows={config.rows} cannot be divided over {world_size} ranks (this is {rank}); make it a multiple"
            )
        self.config, self.vocab = config, vocab
        self._utterances, self._tokenizer = utterances, tokenizer
        self._rank, self._world_size = rank, world_size
        self._num_items = len(utterances) * (1 + config.spans_per_utterance)
        self._num_windows = -(-self._num_items // WINDOW)
        self._identity = fingerprint(
            {"config": to_dict(config), "vocab": vocab.size, "items": self._num_items, "tokens": _checksum(utterances)}
        )
        self._epoch, self._window, self._row = 0, 0, 0
        self._left_out = 0
        self._rows = self._pack_window()

    def next_batch(self) -> Batch:
        """-> the next `Batch` of this rank, [rows / world_size, row_tokens]; token-level (no opens / closes).

        `meta`, of this rank's rows: `tokens` (padding left out), `speech_tokens`, `units`, `speech_units` (a token is a
        unit), `num_examples`; and `epoch`, `left_out` (so far, over all ranks).
        """
        rows = [self._next_row() for _ in range(self.config.rows)]
        mine = rows[self._rank :: self._world_size]
        ids, labels, docs = (torch.from_numpy(np.stack(x)) for x in zip(*map(self._fill, mine)))
        examples = [example for row in mine for example in row]
        num_tokens = sum(map(_length, examples))
        num_speech = sum(len(example.ids_T) for example in examples)
        meta = {
            "tokens": num_tokens,
            "speech_tokens": num_speech,
            "units": num_tokens,
            "speech_units": num_speech,
            "num_examples": len(examples),
            "epoch": self._epoch,
            "left_out": self._left_out,
        }
        return Batch(ids_BT=ids, labels_BT=labels, doc_BT=docs, meta=meta)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "window": self._window,
            "row": self._row,
            "left_out": self._left_out,
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that the state was taken after. Raises ValueError for another corpus or config."""
        if state["identity"] != self._identity:
            raise ValueError(
                f"loader state {state['identity']} belongs to another corpus, vocabulary or data config than "
                f"{self._identity}; resume with the same data, or start a new run"
            )
        self._epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        self._rows = self._pack_window()
        self._left_out = state["left_out"]

    def _next_row(self) -> list[TextToTokenExample]:
        for _ in range(self._num_windows + 1):
            if self._row < len(self._rows):
                self._row += 1
                return self._rows[self._row - 1]
            self._row, self._window = 0, self._window + 1
            if self._window == self._num_windows:
                self._window, self._epoch = 0, self._epoch + 1
            self._rows = self._pack_window()
        raise ValueError(
            f"no example of a whole epoch fits a row of {self.config.row_tokens} tokens; "
            "raise row_tokens, or check that the utterances have text and speech tokens"
        )

    def _pack_window(self) -> list[list[TextToTokenExample]]:
        """Best-fit decreasing over one window of the epoch's permutation, then the rows in random order."""
        config = self.config
        order = np.random.default_rng([config.seed, self._epoch]).permutation(self._num_items)
        examples = list(self._window_examples(order[self._window * WINDOW : (self._window + 1) * WINDOW].tolist()))
        examples.sort(key=_length, reverse=True)
        rows: list[list[TextToTokenExample]] = []
        space: list[tuple[int, int]] = []  # (free tokens, row), ascending
        for example in examples:
            need = _length(example)
            at = bisect.bisect_left(space, (need, -1))
            free, row = space.pop(at) if at < len(space) else (config.row_tokens, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(example)
            bisect.insort(space, (free - need, row))
        shuffle = np.random.default_rng([config.seed, self._epoch, self._window, 1]).permutation(len(rows))
        return [rows[i] for i in shuffle]

    def _window_examples(self, items: list[int]) -> Iterator[TextToTokenExample]:
        config = self.config
        for item in items:
            copy, index = divmod(item, len(self._utterances))
            utterance = self._utterances[index]
            if copy == WHOLE:
                example = whole_example(utterance, self._tokenizer)
            else:
                rng = np.random.default_rng([config.seed, self._epoch, item, 2])
                example = draw_span(utterance, self._tokenizer, rng, config.max_span_words)
            if example is None or _length(example) > config.row_tokens:
                self._left_out += 1
            else:
                yield example

    def _fill(self, row: list[TextToTokenExample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> ids, labels, document index of one row, int64 [row_tokens]; what is left over is one padding document."""
        ids_T = np.full(self.config.row_tokens, self.vocab.pad, dtype=np.int64)
        labels_T = np.full(self.config.row_tokens, IGNORE, dtype=np.int64)
        doc_T = np.full(self.config.row_tokens, len(row), dtype=np.int64)
        at = 0
        for doc, example in enumerate(row):
            ids, loss = lay_out(self.vocab, example)
            end = at + len(ids)
            ids_T[at:end], doc_T[at:end] = ids, doc
            labels_T[at : end - 1] = np.where(loss[1:], ids[1:], IGNORE)
            at = end
        return ids_T, labels_T, doc_T


def _length(example: TextToTokenExample) -> int:
    """Tokens of the laid-out example: the text twice, speech, a WORD_END per unit, and BOS, <speech>, EOS."""
    return sum(2 * len(unit.cue_ids) + len(unit.ids_T) + 1 for unit in example.units) + 3


def _checksum(utterances: Sequence[AlignedTokens]) -> int:
    """Notices a resumed run that reads other recordings, or the same ones through another speech tokenizer."""
    crc = 0
    for utterance in utterances:
        crc = zlib.crc32(np.asarray(utterance.ids_T, dtype="<i4").tobytes(), crc)
    return crc
