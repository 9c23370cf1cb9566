"""Random documents and batches for tests: small, seeded, with every awkward case (empty, short and cut spans)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from speechquilt.protocols import Patcher
from speechquilt.text import TextTokenizer
from speechquilt.types import IGNORE, Batch, Document, LaidOut, Segment
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=20, num_speech=12)


def random_segment(rng: np.random.Generator, modality: str, longest: int = 11, vocab: Vocab = VOCAB) -> Segment:
    """Up to `longest` tokens; speech has random word ends, its last word sometimes cut off."""
    n = int(rng.integers(0, longest + 1))
    if modality == "text":
        return Segment(modality="text", ids_T=rng.integers(0, vocab.num_text, n).astype(np.int32))
    ends_T = rng.random(n) < 0.3
    if n and rng.random() < 0.7:
        ends_T[-1] = True
    return Segment(modality="speech", ids_T=rng.integers(0, vocab.num_speech, n).astype(np.int32), unit_end_T=ends_T)


def random_document(rng: np.random.Generator, num_segments: int = 4, vocab: Vocab = VOCAB) -> Document:
    """Alternating segments, the first one text or speech."""
    modalities = ("text", "speech") if rng.random() < 0.5 else ("speech", "text")
    segments = tuple(random_segment(rng, modalities[i % 2], vocab=vocab) for i in range(num_segments))
    return Document(id=f"d{int(rng.integers(1 << 30))}", segments=segments, source="random")


def random_laid_out(seed: int, num_segments: int = 4, vocab: Vocab = VOCAB) -> LaidOut:
    return vocab.lay_out(random_document(np.random.default_rng(seed), num_segments, vocab))


def with_ids(laid_out: LaidOut, ids_T: np.ndarray, vocab: Vocab = VOCAB) -> LaidOut:
    """The same layout with other tokens: modality follows the ids, as in generation."""
    return replace(laid_out, ids_T=ids_T, is_speech_T=np.asarray(vocab.is_speech(ids_T)))


def make_batch(rows: Sequence[Sequence[LaidOut]], patcher: Patcher | None = None, vocab: Vocab = VOCAB) -> Batch:
    """Pack each row's documents; padding is one more document, one unit that never closes."""
    length = max(sum(len(d.ids_T) for d in row) for row in rows)
    ids_BT = np.full((len(rows), length), vocab.pad)
    labels_BT = np.full((len(rows), length), IGNORE)
    doc_BT, opens_BT, closes_BT = (np.zeros((len(rows), length), dtype=t) for t in (np.int64, bool, bool))
    for b, row in enumerate(rows):
        start = 0
        for number, laid_out in enumerate(row):
            stop = start + len(laid_out.ids_T)
            ids_BT[b, start:stop] = laid_out.ids_T
            labels_BT[b, start : stop - 1] = np.where(laid_out.loss_T[1:], laid_out.ids_T[1:], IGNORE)
            doc_BT[b, start:stop] = number
            if patcher is not None:
                opens_BT[b, start:stop], closes_BT[b, start:stop] = patcher(laid_out, 0.5)
            start = stop
        doc_BT[b, start:] = len(row)
        opens_BT[b, start : start + 1] = True
    return Batch(
        ids_BT=torch.from_numpy(ids_BT.astype(np.int64)),
        labels_BT=torch.from_numpy(labels_BT.astype(np.int64)),
        doc_BT=torch.from_numpy(doc_BT),
        opens_BT=None if patcher is None else torch.from_numpy(opens_BT),
        closes_BT=None if patcher is None else torch.from_numpy(closes_BT),
    ).validate()


class BaseTextTokenizer(TextTokenizer):
    """As a text model's own: no space is put before a text."""

    def decode_as_is(self, ids: Iterable[int]) -> str:
        """With the white space around it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def base_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 320, specials: Sequence[str] = ("<|endoftext|>", "<|im_start|>")
) -> BaseTextTokenizer:
    """A small byte-level BPE without a prefixed space, its special tokens first, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BaseTextTokenizer(tokenizer)
