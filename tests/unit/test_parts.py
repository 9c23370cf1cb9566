"""Documents longer than a row: nothing of them is lost, nothing is taught that is not there, and resume knows the parts."""

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig, PackedLoader
from speechquilt.data.feed.parts import Part, parts_of
from speechquilt.types import IGNORE, Document, LaidOut, Segment
from speechquilt.vocab import Vocab
from tests.unit.test_pack import VOCAB, Chunks, Drifting, same


def document(seed: int, segments: int = 3, high: int = 40, loss: bool = True, ends: bool = True) -> Document:
    rng = np.random.default_rng(seed)
    made = []
    for k in range(segments):
        ids_T = rng.integers(0, 30, rng.integers(0, high))
        ends_T = (np.arange(len(ids_T)) % 5 == 4).astype(np.uint8) if ends and k % 2 else None
        made.append(Segment(modality=("text", "speech")[k % 2], ids_T=ids_T, unit_end_T=ends_T, loss=loss or k == 1))
    return Document(id=f"d{seed}", source="a", segments=tuple(made))


def split(
    laid_out: LaidOut, size: int, units: int, tokens: int, splits: bool = True, vocab: Vocab = VOCAB
) -> list[Part]:
    patch = Chunks(size)
    return list(
        parts_of(laid_out, lambda x: patch(x, 0.0), vocab, splits=splits, units_per_row=units, tokens_per_row=tokens)
    )


def content(ids_T: np.ndarray, vocab: Vocab = VOCAB) -> list[tuple[str, int]]:
    """(modality, token) of everything but special tokens."""
    return [(s.modality, i) for s in vocab.read_back(ids_T) for i in s.ids_T.tolist()]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    segments=st.integers(1, 6),
    size=st.integers(1, 6),
    units=st.integers(4, 60),
    tokens=st.integers(4, 90),
    marker=st.booleans(),
)
def test_parts_are_the_whole_document_and_fit(seed, segments, size, units, tokens, marker):
    vocab = replace(VOCAB, opening_marker=marker)
    laid_out = vocab.lay_out(document(seed, segments))
    parts = split(laid_out, size, units, tokens, vocab=vocab)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [pair for part in parts for pair in content(part.laid_out.ids_T, vocab)] == content(laid_out.ids_T, vocab)
    trained = [
        i for part in parts for i in part.labels_T.tolist() if VOCAB.is_speech(i) or (VOCAB.is_text(i) and i >= 0)
    ]
    assert trained == [i for i in laid_out.ids_T.tolist() if VOCAB.is_speech(i) or VOCAB.is_text(i)]
    for part in parts:
        ids_T = part.laid_out.ids_T
        assert len(ids_T) <= tokens
        assert part.num_units == part.opens_T.sum() <= units
        assert (ids_T[0], ids_T[-1]) == (VOCAB.bos, VOCAB.eos)
        opened = ids_T[1] in (VOCAB.marker("text"), VOCAB.marker("speech"), VOCAB.eos)
        assert opened == (marker or not VOCAB.is_text(ids_T[1]))  # without the setting, text opens with none
        assert marker or ids_T[1] != VOCAB.marker("text") or not content(ids_T, vocab) or part.number == 0
        assert part.labels_T[-1] == IGNORE
        assert part.labels_T[-2] in ((VOCAB.eos, IGNORE) if part.is_last else (IGNORE,))
        assert part.labels_T[0] == IGNORE or part.number == 0 or not opened  # a span that goes on was not chosen here
        assert len(part.opens_T) == len(part.closes_T) == len(part.labels_T) == len(ids_T)
    ends = [e for part in parts for e in part.laid_out.unit_end_T.tolist()] if laid_out.unit_end_T is not None else []
    assert sum(ends) == (0 if laid_out.unit_end_T is None else laid_out.unit_end_T.sum())


@given(seed=st.integers(0, 1000), size=st.integers(1, 5))
def test_what_fits_is_one_part_as_it_is_laid_out(seed, size):
    laid_out = VOCAB.lay_out(document(seed))
    (part,) = split(laid_out, size, 500, 500)
    assert part.laid_out is laid_out
    assert (part.is_last, part.num_cut) == (True, 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(4, 100))
def test_documents_with_context_are_never_split(seed, tokens):
    laid_out = VOCAB.lay_out(document(seed, segments=2, loss=False))
    parts = split(laid_out, 1, 500, tokens, splits=False)
    if len(laid_out.ids_T) <= tokens:
        assert [part.num_cut for part in parts] == [0]
    elif parts:
        (part,) = parts
        assert part.is_last
        assert part.num_cut == len(laid_out.ids_T) - tokens
        assert (part.labels_T != IGNORE).any()
    else:
        assert not laid_out.loss_T[: tokens - 1].any()


def loader(
    docs: list[Document], *, tokens: int = 60, units: int = 30, rows: int = 2, patch: bool = True, **ranks: int
) -> PackedLoader:
    config = PackConfig(rows=rows, units_per_row=units, tokens_per_row=tokens, buffer=3)
    return PackedLoader(Mixture({"a": docs}, {"a": 1.0}), VOCAB, Drifting(2) if patch else None, config, 0, 12, **ranks)


LONG = [document(seed, segments=5, high=80) for seed in range(4)] + [
    document(seed, segments=1, high=9) for seed in range(4, 9)
]


@settings(max_examples=12, deadline=None)
@given(before=st.integers(0, 12), patch=st.booleans())
def test_resume_goes_on_in_the_middle_of_a_document(before, patch):
    made = loader(LONG, patch=patch)
    for _ in range(before):
        made.next_batch()
    state = json.loads(json.dumps(made.state_dict()))
    expected = [made.next_batch() for _ in range(6)]
    again = loader(LONG, patch=patch)
    again.next_batch()
    again.load_state_dict(state)
    assert all(same(again.next_batch(), batch) for batch in expected)
    assert again.state_dict() == made.state_dict()


def test_a_document_counts_once_and_its_parts_come_in_order():
    made = loader(LONG)
    documents, parts, order = Counter[str](), 0, []
    epochs = 0.0
    while made.mixture.number < 40:
        batch = made.next_batch().validate()
        documents.update(batch.meta["documents"])
        parts += batch.meta["parts"]
        epochs += batch.meta["epochs"]["a"]
        order += [id for ids in batch.meta["document_ids"] for id in ids]
        assert batch.meta["cut_documents"] == batch.meta["dropped_documents"] == 0
    waiting = [item for item in made._buffer if item.part.number == 0]
    assert documents["a"] + len(waiting) == made.mixture.number
    assert epochs == pytest.approx(documents["a"] / len(LONG))
    assert parts > documents["a"]
    assert max(len(list(run)) for _, run in groupby(order)) > 1


def test_two_ranks_see_the_parts_of_one():
    one, two = loader(LONG), [loader(LONG, rank=r, world_size=2) for r in range(2)]
    for _ in range(8):
        whole, halves = one.next_batch(), [rank.next_batch() for rank in two]
        for r, half in enumerate(halves):
            assert (whole.ids_BT[r::2] == half.ids_BT).all()
        for key in ("split_documents", "parts", "cut_documents", "dropped_documents"):
            assert whole.meta[key] == sum(half.meta[key] for half in halves)
        assert one.state_dict() == two[0].state_dict() == two[1].state_dict()


def pair(i: int, num_speech: int) -> Document:
    """Speech -> text, as in ASR."""
    speech = Segment(modality="speech", ids_T=np.arange(num_speech) % 30, loss=False)
    return Document(id=f"asr/{i}", source="a", segments=(speech, Segment(modality="text", ids_T=np.arange(5))))


def test_pairs_without_their_target_are_dropped_and_counted():
    docs = [pair(i, 100 if i % 3 == 0 else 20) for i in range(9)]
    for world_size in (1, 2):
        ranks = [loader(docs, rank=r, world_size=world_size) for r in range(world_size)]
        dropped, seen = 0, set()
        for _ in range(9):
            for rank in ranks:
                meta = rank.next_batch().meta
                dropped += meta["dropped_documents"]
                seen |= {id for ids in meta["document_ids"] for id in ids}
        drawn = [int(ranks[0].mixture.number)]
        assert seen == {d.id for i, d in enumerate(docs) if i % 3}
        assert drawn[0] / 3 - 3 <= dropped <= drawn[0] / 3 + 3
    with pytest.raises(ValueError, match="no document has a target within a row"):
        loader(docs[::3]).next_batch()
