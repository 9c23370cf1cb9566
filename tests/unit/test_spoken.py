"""Spoken shards, blocks drawn at load time, and the pieces inside words."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.interleave import check_equal, plain_blocks, plain_interleave
from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.spoken_documents import as_documents
from speechquilt.data.interleaving.parallel import (
    ParallelSource,
    draw_blocks,
    interleave_parallel,
    mark_pieces,
    word_by_word,
    word_pieces,
)
from speechquilt.data.shards.documents import ShardFolder, ShardWriter
from speechquilt.data.shards.parquet import MANIFEST, ShardInfo
from speechquilt.data.shards.spoken import SpokenFolder, SpokenWriter, open_shards
from speechquilt.text import TextTokenizer
from speechquilt.types import AlignedTokens, Document, Segment, UnitEnd

INFO = ShardInfo(num_text=0, num_speech=50, text_fingerprint="", speech_fingerprint="speech-a")
TOKENIZER = TextTokenizer.train(["the red fox sees a small house, isn't it? über 東京 42"] * 3, 300)
WORDS = st.sampled_from(["the", "fox", "house,", "isn't", "über", "東京", "42", "it?", "unheard", "'s", "a\tb"])


@st.composite
def spoken_texts(draw, *, min_words: int = 0, max_words: int = 60):
    words = draw(st.lists(WORDS, min_size=min_words, max_size=max_words))
    word_T = [-1] * draw(st.integers(0, 3))
    for k in range(len(words)):
        word_T += [k] * draw(st.integers(1, 6)) + [-1] * draw(st.integers(0, 5))
    ids_T = np.arange(len(word_T), dtype=np.int32) % 50
    return AlignedTokens(
        id=f"d{draw(st.integers(0, 99))}",
        text=" ".join(words),
        words=tuple(words),
        ids_T=ids_T,
        word_T=np.asarray(word_T, dtype=np.int32),
    )


def spoken(words: list[str], tokens_per_word: int = 4, id: str = "d") -> AlignedTokens:
    word_T = np.repeat(np.arange(len(words), dtype=np.int32), tokens_per_word)
    ids_T = np.arange(len(word_T), dtype=np.int32) % 50
    return AlignedTokens(id=id, text=" ".join(words), words=tuple(words), ids_T=ids_T, word_T=word_T)


def write(folder, items, **options):
    with SpokenWriter(folder, INFO, **options) as writer:
        for item in items:
            writer.write(item, text=" ".join(item.words))


@settings(max_examples=25, deadline=None)
@given(items=st.lists(spoken_texts(max_words=9), max_size=7), per_shard=st.integers(1, 3))
def test_round_trip(tmp_path_factory, items, per_shard):
    folder = tmp_path_factory.mktemp("spoken")
    write(folder, items, documents_per_shard=per_shard)
    shards = SpokenFolder(folder)
    assert len(shards) == len(items)
    for i in reversed(range(len(items))):
        assert (shards[i].id, shards[i].words) == (items[i].id, items[i].words)
        for name in ("ids_T", "word_T"):
            assert getattr(shards[i], name).dtype == np.int32
            np.testing.assert_array_equal(getattr(shards[i], name), getattr(items[i], name))
        assert shards.text(i) == " ".join(items[i].words)
    assert shards.manifest["tokens"].get("speech", 0) == sum(len(x.ids_T) for x in items)


def test_the_two_kinds_are_told_apart(tmp_path):
    write(tmp_path / "spoken", [spoken(["a", "b"])])
    with ShardWriter(tmp_path / "documents", INFO) as writer:
        writer.write(Document(id="x", source="speech", segments=(Segment(modality="speech", ids_T=np.arange(3)),)))
    assert isinstance(open_shards(tmp_path / "spoken"), SpokenFolder)
    assert isinstance(open_shards(tmp_path / "documents"), ShardFolder)
    with pytest.raises(ValueError, match=r"holds spoken texts shards, documents shards are expected"):
        ShardFolder(tmp_path / "spoken")
    with pytest.raises(ValueError, match=r"holds documents shards, spoken texts shards are expected"):
        SpokenFolder(tmp_path / "documents")
    manifest = json.loads((tmp_path / "spoken" / MANIFEST).read_text())
    (tmp_path / "spoken" / MANIFEST).write_text(json.dumps({**manifest, "kind": "documents"}))
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is truncated or damaged \(its rows, columns"):
        ShardFolder(tmp_path / "spoken")[0]


def test_a_folder_from_before_there_were_kinds_holds_documents(tmp_path):
    with ShardWriter(tmp_path / "s", INFO) as writer:
        writer.write(Document(id="x", source="speech", segments=()))
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    del manifest["kind"]
    (tmp_path / "s" / MANIFEST).write_text(json.dumps(manifest))
    assert open_shards(tmp_path / "s")[0].id == "x"


def test_ids_out_of_range_are_refused(tmp_path):
    word_T = np.zeros(2, np.int32)
    item = AlignedTokens(id="d", text="a", words=("a",), ids_T=np.array([0, 60]), word_T=word_T)
    with pytest.raises(ValueError, match=r"document 'd': speech ids span 0\.\.60, but the shard's info allows 0\.\.49"):
        write(tmp_path / "s", [item])


@settings(max_examples=300, deadline=None)
@given(num_words=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_blocks_drawn_together_are_those_drawn_one_by_one(num_words, seed):
    expected = plain_blocks(num_words, np.random.default_rng(seed))
    assert draw_blocks(num_words, np.random.default_rng(seed)) == expected


@settings(max_examples=150, deadline=None)
@given(item=spoken_texts(), seed=st.integers(0, 2**32))
def test_documents_are_those_of_the_plain_loop(item, seed):
    expected = plain_interleave(item, np.random.default_rng(seed), TOKENIZER.encode)
    check_equal(expected, interleave_parallel(item, np.random.default_rng(seed), word_by_word(TOKENIZER)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=6) | WORDS, max_size=8))
def test_words_that_are_remembered_spell_as_the_whole_text(words):
    text = " ".join(words)
    assert word_by_word(TOKENIZER)(text) == TOKENIZER.encode(text)


def test_a_tokenizer_without_the_leading_space_spells_whole_blocks():
    stages = json.loads(TOKENIZER.json)
    stages["pre_tokenizer"]["add_prefix_space"] = False
    other = TextTokenizer(type(TOKENIZER._tokenizer).from_str(json.dumps(stages)))
    assert other.encode("the fox") != [*other.encode("the"), *other.encode("fox")]  # what must not happen
    assert word_by_word(other)("the fox") == other.encode("the fox")


def test_a_mixture_reads_a_spoken_folder_anew_in_every_epoch(tmp_path):
    items = [spoken([f"w{k}" for k in range(80)], id=f"d{i}") for i in range(3)]
    write(tmp_path / "s", items)
    source = as_documents(open_shards(tmp_path / "s"), TOKENIZER.encode, seed=5)
    mixture = Mixture({"parallel": source}, {"parallel": 1.0})
    drawn: dict[str, list[str]] = {}
    for _ in range(12):
        sample, document = mixture.draw()
        check_equal(document, source.in_epoch(sample.index, sample.epoch))  # a pure function, whoever asks
        drawn.setdefault(document.id, []).append(str([(s.modality, len(s.ids_T)) for s in document.segments]))
    assert {id: len(set(shapes)) for id, shapes in drawn.items()} == {"d0": 4, "d1": 4, "d2": 4}
    again = ParallelSource(items, TOKENIZER.encode, seed=5)
    check_equal(again.in_epoch(1, 3), source.in_epoch(1, 3))


def test_pieces_of_the_specs_example():
    # spec 2, 5: span s0..s10, word 1 = [2, 4], word 2 = [6, 9] with pieces [6, 7] and [8, 9]
    word_T = np.array([-1, -1, 0, 0, 0, -1, 1, 1, 1, 1, -1], dtype=np.int32)
    item = AlignedTokens(id="d", text="ab cdef", words=("ab", "cdef"), ids_T=np.arange(11), word_T=word_T)
    lengths = {"ab": [2], "cdef": [2, 2]}
    document = interleave_first_speech(item, lengths.__getitem__)
    N, W, S, P = UnitEnd.NONE, UnitEnd.WORD, UnitEnd.SILENCE, UnitEnd.PIECE
    assert document.segments[0].unit_end_T.tolist() == [N, S, N, N, W, S, N, P, N, W, S]


def interleave_first_speech(item: AlignedTokens, piece_lengths) -> Document:
    """The document of a seed for which two words become one block of speech."""
    seed = next(s for s in range(50) if draw_blocks(2, np.random.default_rng(s)) == [("speech", 0, 2)])
    return interleave_parallel(item, np.random.default_rng(seed), TOKENIZER.encode, piece_lengths=piece_lengths)


@settings(max_examples=150, deadline=None)
@given(spoken_texts(), st.randoms(use_true_random=False))
def test_pieces_divide_the_tokens_of_every_word_by_characters(item, random):
    lengths = {
        word: [random.randint(1, 5)] + [random.randint(0, 5) for _ in range(random.randint(0, 3))]
        for word in item.words
    }
    ends_T = interleave_all_speech(item)
    marked_T = mark_pieces(ends_T, item.word_T, item.words, lengths.__getitem__)
    pieces = marked_T == UnitEnd.PIECE
    np.testing.assert_array_equal(np.where(pieces, 0, marked_T), ends_T)  # words and silences keep their ends
    for k, word in enumerate(item.words):
        at = np.flatnonzero(item.word_T == k)
        share = np.cumsum(lengths[word])[:-1] / sum(lengths[word])
        bounds = np.floor(share * len(at) + 0.5)
        expected = sorted({int(b) for b in bounds if 0 < b < len(at)})
        assert (np.flatnonzero(pieces[at]) + 1).tolist() == expected
    assert not pieces[item.word_T < 0].any()


def interleave_all_speech(item: AlignedTokens) -> np.ndarray:
    """Word and silence ends of the whole recording."""
    ended_T = np.append(item.word_T[1:] != item.word_T[:-1], True)[: len(item.word_T)]
    kind_T = np.where(item.word_T < 0, UnitEnd.SILENCE, UnitEnd.WORD)
    return np.where(ended_T, kind_T, UnitEnd.NONE).astype(np.uint8)


def test_pieces_are_those_of_the_text_tokenizer():
    lengths = word_pieces(TOKENIZER)
    assert lengths("the") == (3,)  # a word of the training text is one piece
    assert sum(lengths("unheard")) == 7
    assert len(lengths("unheard")) == len(TOKENIZER.encode("unheard")) > 1
    assert lengths("unheard")[0] == 0  # the space before a word nobody has seen is a piece of its own
    assert sum(lengths("東京")) >= 2
    assert lengths(" ") == (1,)


def test_a_source_marks_pieces_only_when_asked():
    item = spoken(["unheard"] * 40, tokens_per_word=7)
    plain = ParallelSource([item], TOKENIZER.encode)[0]
    marked = ParallelSource([item], TOKENIZER.encode, piece_lengths=word_pieces(TOKENIZER))[0]
    codes = [np.concatenate([s.unit_end_T for s in d.segments if s.unit_end_T is not None]) for d in (plain, marked)]
    assert UnitEnd.PIECE not in codes[0]
    assert UnitEnd.PIECE in codes[1]
    np.testing.assert_array_equal(np.where(codes[1] == UnitEnd.PIECE, UnitEnd.NONE, codes[1]), codes[0])
