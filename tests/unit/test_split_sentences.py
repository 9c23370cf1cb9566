"""Sentences cut at a word: nothing of what comes after the cut reaches the prompt, in sound or in ids."""

from dataclasses import replace

import numpy as np

from speechquilt.stages.split_sentences import split_sentences
from speechquilt.types import AlignedWord, Utterance, Waveform
from tests.contracts.tiny_tokenizer import TEXT, build
from tests.parity.tiny_tokenizers import noise

WORD_S = 0.31  # no multiple of a token
WORDS = ["Where", "does", "anna", "live,", "cat", "mat."]


def utterance(seed: int, words: list[str] = WORDS, rate: int = 16000) -> Utterance:
    times = [AlignedWord(text=w, start_s=WORD_S * i, end_s=WORD_S * (i + 1)) for i, w in enumerate(words)]
    wave = Waveform(samples_S=noise(seed, WORD_S * len(words)).numpy(), sample_rate=rate)
    return Utterance(id=f"u{seed}", text=" ".join(words), audio=wave, alignment=tuple(times))


def test_both_parts_are_the_words_on_their_side():
    (found,) = split_sentences([utterance(0)], build(), TEXT)
    assert TEXT.decode(found.written.ids_T) == "Where does anna"
    assert TEXT.decode(found.ending.ids_T) == "live, cat mat."
    ids = [*found.written.ids_T, *found.ending.ids_T]
    assert ids == TEXT.encode(" ".join(WORDS))
    assert found.spoken.modality == "speech"


def test_the_prompt_does_not_know_the_sound_after_the_cut():
    """The tokenizer hears ahead, so tokens of the whole recording change with what follows; these do not."""
    speech, whole = build(), utterance(0)
    assert speech.lookahead_s > 0
    cut = round(3 * WORD_S * 16000)
    samples_S = np.concatenate([whole.audio.samples_S[:cut], noise(9, 3 * WORD_S).numpy()])
    other = replace(whole, audio=replace(whole.audio, samples_S=samples_S))
    (found,), (same,) = split_sentences([whole], speech, TEXT), split_sentences([other], speech, TEXT)
    assert found.spoken.ids_T.tolist() == same.spoken.ids_T.tolist()
    assert len(found.spoken.ids_T) == -(-cut // speech.token_samples)


def test_sentences_that_are_too_short_or_have_no_word_times_are_left_out():
    bare = replace(utterance(1), alignment=())
    short = utterance(2, WORDS[:5])
    assert [s.id for s in split_sentences([bare, short, utterance(3)], build(), TEXT)] == ["u3"]
    assert [s.id for s in split_sentences([short], build(), TEXT, min_words=2)] == ["u2"]
