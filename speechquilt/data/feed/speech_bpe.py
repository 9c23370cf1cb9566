"""BPE over speech tokens: the baseline that shortens speech without patches (spec latent-speech-text 5, "BPE
baseline").

The speech ids of a document become piece ids before it is packed; pieces that a model generates become speech ids
again.
Trap: the mixture still weighs documents by their base tokens, and a run with pieces draws the same documents as one
without (`Mixture(convert=...)`); only what the model reads is shorter.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers

from speechquilt.config import fingerprint
from speechquilt.data.feed.mixture import Source
from speechquilt.protocols import Loader
from speechquilt.types import Batch, Document, Segment
from speechquilt.vocab import Vocab

FIRST_CHARACTER = 0xF0000  # plane 15: private use, so that no Unicode rule applies to a speech id
MAX_IDS = 0xFFFE  # that many code points are in the plane


class SpeechBPE:
    """Base speech ids 0 .. num_ids - 1 <-> piece ids 0 .. num_pieces - 1; the first `num_ids` pieces are the base ids.

    Every id is one private-use character; there is no normalisation, no prefix and no splitting at white space. Each call of
    `encode` is one span: pieces never cross its ends. `wanted`: the number of pieces that training was asked for.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int, wanted: int) -> None:
        self._tokenizer, self.num_ids, self.wanted = tokenizer, num_ids, wanted
        by_piece = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        self._pieces = [_ids(text) for text, _ in by_piece]
        if any(len(ids_T) != 1 or ids_T[0] != i for i, ids_T in enumerate(self._pieces[:num_ids])):
            raise ValueError(f"the first {num_ids} pieces must be the {num_ids} base ids; train the BPE again")
        self.length_V = np.array([len(ids_T) for ids_T in self._pieces])
        """Base ids in each piece, int64 [num_pieces]."""

    @classmethod
    def train(cls, sequences: Iterable[np.ndarray], num_ids: int, num_pieces: int) -> "SpeechBPE":
        """Learn `num_pieces` pieces (fewer when the sequences run out of pairs), the base ids included.

        `sequences`: spans of speech ids below `num_ids`. Raises ValueError when there are fewer pieces than base ids.
        """
        if not 0 < num_ids <= MAX_IDS:
            raise ValueError(f"num_ids={num_ids} must lie in 1..{MAX_IDS}: every id is one private-use character")
        if num_pieces < num_ids:
            raise ValueError(
                f"speech_pieces={num_pieces} must be at least the {num_ids} ids of the speech tokenizer, "
                "which all stay pieces; the paper takes 1000 for 501 ids"
            )
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=num_pieces,
            initial_alphabet=[chr(FIRST_CHARACTER + i) for i in range(num_ids)],
            show_progress=False,
        )
        tokenizer.train_from_iterator((_text(ids_T, num_ids) for ids_T in sequences), trainer)
        return cls(tokenizer, num_ids, num_pieces)

    @classmethod
    def load(cls, path: Path) -> "SpeechBPE":
        """Raises FileNotFoundError or ValueError saying what is wrong with the file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; a run with speech_pieces writes it, check the path of the run")
        try:
            data = json.loads(path.read_text())
            return cls(Tokenizer.from_str(data["tokenizer"]), data["num_ids"], data["wanted"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no speech BPE ({error!r}); restore it or make the run again") from error

    def save(self, path: Path) -> None:
        """Whole or not at all, also when several ranks write the same."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        data = {"num_ids": self.num_ids, "wanted": self.wanted, "tokenizer": self._tokenizer.to_str()}
        temporary.write_text(json.dumps(data))
        temporary.replace(path)

    @property
    def num_pieces(self) -> int:
        return len(self._pieces)

    @property
    def fingerprint(self) -> str:
        """Changes whenever a sequence could be cut into other pieces."""
        return fingerprint([self.num_ids, self._tokenizer.to_str()])

    def encode(self, ids_T: np.ndarray) -> np.ndarray:
        """One span of base ids -> int32 piece ids. Raises ValueError on an id outside 0 .. num_ids - 1."""
        encoding = self._tokenizer.encode(_text(ids_T, self.num_ids), add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.int32)

    def decode(self, piece_P: Sequence[int] | np.ndarray) -> np.ndarray:
        """Piece ids -> int32 base ids."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *(self._pieces[p] for p in np.asarray(piece_P).tolist())])

    def segment(self, segment: Segment) -> Segment:
        """A speech segment in pieces, whose word ends are unknown: a piece need not end where a word does."""
        if segment.modality == "text":
            return segment
        return replace(segment, ids_T=self.encode(segment.ids_T), unit_end_T=None)

    def document(self, document: Document) -> Document:
        """The document with every speech segment in pieces."""
        return replace(document, segments=tuple(self.segment(s) for s in document.segments))


class BaseTokenCounts:
    """A loader of batches in pieces whose `meta` counts base tokens, so that runs with and without pieces are comparable.

    `tokens` and `speech_tokens` become base speech tokens; `units` and `speech_units` stay what the model steps over.
    """

    def __init__(self, loader: Loader, bpe: SpeechBPE, vocab: Vocab) -> None:
        self.loader = loader
        self._length_V = torch.zeros(vocab.size, dtype=torch.int64)
        self._length_V[vocab.speech_start : vocab.speech_start + bpe.num_pieces] = torch.from_numpy(bpe.length_V)

    def next_batch(self) -> Batch:
        batch = self.loader.next_batch()
        speech_tokens = int(self._length_V[batch.ids_BT].sum())
        others = batch.meta["tokens"] - batch.meta["speech_tokens"]
        meta = {**batch.meta, "speech_tokens": speech_tokens, "tokens": others + speech_tokens}
        return replace(batch, meta=meta)

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.loader.load_state_dict(state)


def speech_spans(sources: Mapping[str, Source], seed: int, limit: int) -> Iterator[np.ndarray]:
    """Up to `limit` spans of speech ids from the documents of all sources, each at most once, in a seeded order."""
    names = sorted(sources)
    starts = np.cumsum([0, *(len(sources[name]) for name in names)])
    left = limit
    for number in np.random.default_rng(seed).permutation(starts[-1]).tolist():
        which = int(np.searchsorted(starts, number, side="right")) - 1
        document = sources[names[which]][number - int(starts[which])]
        spans = [s.ids_T for s in document.segments if s.modality == "speech"][:left]
        yield from spans
        left -= len(spans)
        if not left:
            return


def _text(ids_T: np.ndarray, num_ids: int) -> str:
    ids_T = np.asarray(ids_T)
    if ids_T.size and (ids_T.min() < 0 or ids_T.max() >= num_ids):
        raise ValueError(
            f"speech ids span {ids_T.min()}..{ids_T.max()}, the BPE was trained for 0..{num_ids - 1}; "
            "use the speech tokenizer that made its shards"
        )
    return (ids_T + FIRST_CHARACTER).astype("<u4").tobytes().decode("utf-32-le")


def _ids(text: str) -> np.ndarray:
    return (np.frombuffer(text.encode("utf-32-le"), dtype="<u4") - FIRST_CHARACTER).astype(np.int32)
