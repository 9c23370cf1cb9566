"""Flite's voices: same text same sound, and word times that point at the words."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import protocols
from speechquilt.tts.flite import VOICES, FliteTTS, FliteTTSConfig, is_there
from speechquilt.types import Utterance
from tests.flite import FOLDER, needs_flite

pytestmark = needs_flite
TEXT = 'Who was 27 years old, and didn\'t jump? The "well-known" man; he, too, was there.'
QUIET = 0.03  # of the whole recording's level


@pytest.fixture(scope="module")
def speaker() -> FliteTTS:
    return FliteTTSConfig(folder=FOLDER).build()


def _level(said: Utterance, start_s: float, end_s: float) -> float:
    rate = said.audio.sample_rate
    samples_S = said.audio.samples_S[int(start_s * rate) : int(end_s * rate)].astype(np.float64)
    return float(np.sqrt((samples_S**2).mean()))


def test_is_a_text_to_speech(speaker: FliteTTS) -> None:
    as_protocol: protocols.TextToSpeech = speaker  # mypy checks the signature
    assert tuple(as_protocol.voices) == VOICES


@given(words=st.lists(st.sampled_from(TEXT.split()), min_size=1, max_size=8), voice=st.sampled_from(VOICES))
@settings(max_examples=15, deadline=None)
def test_word_times_are_a_timeline(speaker: FliteTTS, words: list[str], voice: str) -> None:
    said = speaker.speak(" ".join(words), voice)
    assert [w.text for w in said.alignment] == words
    edges = [t for w in said.alignment for t in (w.start_s, w.end_s)]
    assert edges == sorted(edges)
    assert all(w.end_s - w.start_s > 0.02 for w in said.alignment)
    assert edges[0] >= 0
    assert edges[-1] <= said.duration_s
    assert said.audio.sample_rate == 16_000
    assert said.audio.samples_S.dtype == np.float32
    assert np.abs(said.audio.samples_S).max() <= 1


@pytest.mark.parametrize("voice", VOICES)
def test_words_sound_and_pauses_do_not(speaker: FliteTTS, voice: str) -> None:
    """A word that was given a neighbour's phones would take a pause in, or leave sound in one."""
    said = speaker.speak("Seven, eleven, nine, a hundred and five, forty, seven.", voice)
    whole = _level(said, 0, said.duration_s)
    pauses = [(w.end_s, after.start_s) for w, after in zip(said.alignment, said.alignment[1:]) if w.text[-1] == ","]
    assert len(pauses) == 5
    for start_s, end_s in pauses:
        assert end_s - start_s > 0.05
        assert _level(said, start_s + 0.035, end_s - 0.015) < QUIET * whole
    assert all(_level(said, w.start_s, w.end_s) > 5 * QUIET * whole for w in said.alignment)


@pytest.mark.parametrize("voice", VOICES)
def test_same_text_same_sound_whatever_came_before(speaker: FliteTTS, voice: str) -> None:
    """The plain library fails this: its noise runs on from one utterance to the next."""
    first = speaker.speak("The cat is in the boat.", voice)
    speaker.speak("Something else was said.", voice)
    again = FliteTTSConfig(folder=FOLDER).build().speak("The cat is in the boat.", voice)
    np.testing.assert_array_equal(first.audio.samples_S, again.audio.samples_S)
    assert first.id == again.id
    assert first.alignment == again.alignment


@pytest.mark.parametrize("voice", VOICES)
def test_rate_is_speed(speaker: FliteTTS, voice: str) -> None:
    fast = FliteTTSConfig(rate=1.25, folder=FOLDER).build()
    own = speaker.speak(TEXT, voice)
    assert own.duration_s / fast.speak(TEXT, voice).duration_s == pytest.approx(1.25, rel=0.05)
    assert speaker.speak(TEXT, voice).duration_s == own.duration_s  # a setting of one speaker is not another's


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- it costs $5.00 & more - no", ["- it", "costs", "$5.00 &", "more -", "no"]),
        ("  two   spaces\n\na line ", ["two", "spaces", "a", "line"]),
        ("the U.S.A. and e-mail don't a.m.", ["the", "U.S.A.", "and", "e-mail", "don't", "a.m."]),
        ("“Café” — he’s naïve… yes", ["“Café” —", "he’s", "naïve…", "yes"]),
        ("1,234 and 3.5 (or 2nd) <b> [x]", ["1,234", "and", "3.5", "(or", "2nd)", "<b>", "[x]"]),
    ],
)
def test_every_word_of_the_text_is_in_the_alignment(speaker: FliteTTS, text: str, words: list[str]) -> None:
    said = speaker.speak(text, "kal16")
    assert [w.text for w in said.alignment] == words
    edges = [t for w in said.alignment for t in (w.start_s, w.end_s)]
    assert edges == sorted(edges)


def test_what_cannot_be_spoken_is_an_error(speaker: FliteTTS) -> None:
    with pytest.raises(ValueError, match="no words"):
        speaker.speak("...", "slt")
    with pytest.raises(ValueError, match="English letters alone, not 'ж'"):
        speaker.speak("ж is a letter", "slt")
    with pytest.raises(ValueError, match="'nobody' is not one of"):
        speaker.speak("hello", "nobody")


def test_absent_flite_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert not is_there(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make speech"):
        _ = FliteTTSConfig(folder=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("key", "value"),
    [("voices", ()), ("voices", ("slt", "slt")), ("voices", ("nobody",)), ("rate", 0.4), ("rate", float("nan"))],
)
def test_wrong_settings_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        FliteTTSConfig(**{key: value})  # type: ignore[arg-type]
