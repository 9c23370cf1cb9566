"""White space stays with the text run: for a tokenizer that puts no space of its own before a text (SmolLM2, Whisper), an
interleaved document has the ids that the text has as a whole."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from speechquilt.data.interleaving.parallel import interleave_parallel, word_by_word, word_pieces
from speechquilt.data.interleaving.synthetic import InterleaveConfig, assemble, plan
from speechquilt.stages.training_documents import pair_documents
from speechquilt.text import TextTokenizer
from speechquilt.types import AlignedTokens, SpokenSpan
from tests.dummies import base_text_tokenizer

TEXTS = ["the cat sat on the mat and the dog ran to the old house.\n\nIt rained, didn't it?  A red fox."] * 4
BASE = base_text_tokenizer(TEXTS)  # adds no space, as those of SmolLM2, GPT-2 and Whisper
OURS = TextTokenizer.train(TEXTS, 320)
WORDS = st.lists(
    st.tuples(
        st.sampled_from([" ", "  ", "\n", "\n\n", " \n ", "\t"]),
        st.sampled_from(["the", "cat,", "house.", "It's", "fox", "é", "世"]),
    ),
    max_size=60,
)
RULE = InterleaveConfig(poisson_mean=2, min_words=4, languages=("en", "zh"))


def spoken(num_tokens: int, reject: str = "") -> SpokenSpan:
    return SpokenSpan(ids_T=np.arange(num_tokens), unit_end_T=np.zeros(num_tokens, dtype=np.uint8), reject=reject)


def of_sentencepiece() -> TextTokenizer:
    """A tokenizer in the manner of Llama 2, which prefixes a space by its normalizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return TextTokenizer(tokenizer)


def test_who_prefixes_a_space() -> None:
    assert OURS.prefixes_space
    assert of_sentencepiece().prefixes_space
    assert not BASE.prefixes_space
    assert BASE.encode("the") != BASE.encode(" the")


@settings(max_examples=150, deadline=None)
@given(
    words=WORDS, start=st.sampled_from(["", " ", "\n"]), end=st.sampled_from(["", " ", "\n"]), seed=st.integers(0, 9)
)
def test_a_document_whose_spans_were_all_refused_has_the_ids_of_its_text(words, start, end, seed) -> None:
    text = start + "".join(space + word for space, word in words).lstrip() + end
    made = plan("id", text, seed, RULE)
    document = assemble(made, [spoken(3, "cap")] * len(made.spans), BASE.encode_run)
    assert [i for segment in document.segments for i in segment.ids_T.tolist()] == (
        BASE.encode(text) if text.strip() else []
    )


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from(["the", "cat,", "house.", "It's", "fox", "é"]), max_size=60), seed=st.integers(0, 9)
)
def test_text_runs_and_the_spoken_words_are_the_text(words, seed) -> None:
    """No white space is lost at a switch: it stays with the text."""
    text = " ".join(words)
    made = plan("id", text, seed, RULE)
    document = assemble(made, [spoken(len(BASE.encode(s))) for s in made.spans], BASE.encode_run)
    spans = iter(made.spans)
    said = [
        BASE.decode_as_is(segment.ids_T.tolist()) if segment.modality == "text" else next(spans)
        for segment in document.segments
    ]
    assert "".join(said) == text


def test_text_behind_a_spoken_span_starts_with_its_space() -> None:
    text = " ".join(["the cat sat on the mat and the dog ran to the old house."] * 4)
    made = plan("id", text, 0, RULE)
    document = assemble(made, [spoken(2 * len(s)) for s in made.spans], BASE.encode_run)
    behind = [b for a, b in pairwise(document.segments) if a.modality == "speech"]
    assert behind
    assert all(BASE.decode_as_is(segment.ids_T.tolist()).startswith(" ") for segment in behind)
    before = [a for a, b in pairwise(document.segments) if b.modality == "speech"]
    assert all(BASE.decode_as_is(segment.ids_T.tolist()).endswith(" ") for segment in before)


@settings(max_examples=50, deadline=None)
@given(words=WORDS, seed=st.integers(0, 9))
def test_our_tokenizers_runs_are_encoded_without_the_white_space_around_them(words, seed) -> None:
    text = "".join(space + word for space, word in words)
    made = plan("id", text, seed, RULE)
    spans = [spoken(2 * len(s)) for s in made.spans]
    stripped = assemble(made, spans, lambda run: OURS.encode(run.strip()))
    for a, b in zip(assemble(made, spans, OURS.encode_run).segments, stripped.segments, strict=True):
        np.testing.assert_array_equal(a.ids_T, b.ids_T)


ITEM = AlignedTokens(
    id="x",
    text=" ".join(["the cat sat on the mat."] * 6),
    words=tuple(["the", "cat", "sat", "on", "the", "mat."] * 6),
    ids_T=np.arange(72),
    word_T=np.repeat(np.arange(36), 2),
)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_of_a_recording_keep_their_spaces(seed: int) -> None:
    document = interleave_parallel(ITEM, np.random.default_rng(seed), word_by_word(BASE))
    texts = [BASE.decode_as_is(s.ids_T.tolist()) if s.modality == "text" else "" for s in document.segments]
    assert any(texts)
    for k, text in enumerate(texts):
        assert text.startswith(" ") == bool(text and k)
        assert text.strip() in ITEM.text
    ours = interleave_parallel(ITEM, np.random.default_rng(seed), word_by_word(OURS))
    plain = interleave_parallel(ITEM, np.random.default_rng(seed), lambda run: OURS.encode(run.strip()))
    for a, b in zip(ours.segments, plain.segments, strict=True):
        np.testing.assert_array_equal(a.ids_T, b.ids_T)


def test_a_transcript_behind_its_speech_starts_with_a_space() -> None:
    ((asr, _),) = pair_documents("asr", [ITEM], BASE)
    assert BASE.decode_as_is(asr.segments[0].ids_T.tolist()) == "transcribe:"
    assert BASE.decode_as_is(asr.segments[2].ids_T.tolist()) == f" {ITEM.text}"
    ((tts, _),) = pair_documents("tts", [ITEM], BASE)
    assert tts.segments[0].ids_T.tolist() == BASE.encode(f"say: {ITEM.text}")


def test_pieces_of_a_word_are_those_behind_a_space() -> None:
    assert sum(word_pieces(BASE)("house.")) == len("house.")
    assert BASE.encode_inside("house.") == BASE.encode(" house.")
    assert OURS.encode_inside("house.") == OURS.encode("house.")
