"""The embedded voice: same text same sound, and word times that point at the words."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import protocols
from speechquilt.tts.espeak import LATE, MIN_GAP_S, SAMPLE_RATE, EspeakTTS, EspeakTTSConfig
from speechquilt.types import Utterance

TEXT = "where does tom live? rome. the cat of the farm is in the red boat. i want to go."


@pytest.fixture(scope="module")
def speaker() -> EspeakTTS:
    return EspeakTTSConfig().build()


def _cut(said: Utterance, start_s: float, end_s: float) -> np.ndarray:
    return said.audio.samples_S[int(start_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)]


def _rms(samples_S: np.ndarray) -> float:
    return float(np.sqrt((samples_S.astype(np.float64) ** 2).mean()))


def test_is_a_text_to_speech(speaker: EspeakTTS) -> None:
    as_protocol: protocols.TextToSpeech = speaker  # mypy checks the signature
    assert len(as_protocol.voices) == 4


@given(words=st.lists(st.sampled_from(TEXT.split()), min_size=1, max_size=10), voice=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_word_times_are_a_timeline(speaker: EspeakTTS, words: list[str], voice: int) -> None:
    said = speaker.speak(" ".join(words), speaker.voices[voice])
    assert [w.text for w in said.alignment] == words
    edges = [t for w in said.alignment for t in (w.start_s, w.end_s)]
    assert edges == sorted(edges)
    assert all(w.end_s - w.start_s > 0.01 for w in said.alignment)
    assert said.alignment[0].start_s == 0.0
    assert said.alignment[-1].end_s <= said.duration_s
    assert said.audio.samples_S.dtype == np.float32
    assert np.abs(said.audio.samples_S).max() <= 1.0


@pytest.mark.parametrize("voice", EspeakTTSConfig().voices)
def test_words_sound_and_gaps_do_not(speaker: EspeakTTS, voice: str) -> None:
    said = speaker.speak(TEXT, voice)
    whole = _rms(said.audio.samples_S)
    for word, after in zip(said.alignment, said.alignment[1:]):
        assert _rms(_cut(said, word.start_s, word.end_s)) > 0.15 * whole
        gap_s = after.start_s - word.end_s
        if word.text[-1] in ".?":
            assert gap_s > MIN_GAP_S
        if gap_s > 0:
            late_s = LATE / SAMPLE_RATE
            assert _rms(_cut(said, word.end_s, after.start_s - late_s)) < 0.03 * whole


def test_a_word_is_where_it_is_said_to_be(speaker: EspeakTTS) -> None:
    """The tail of a longer utterance is the shorter one: "rome." after a question sounds like "rome." alone."""
    said, alone = speaker.speak("where does tom live? rome.", "en-us"), speaker.speak("rome.", "en-us")
    word = said.alignment[-1]
    assert word.end_s - word.start_s == pytest.approx(alone.alignment[0].end_s, abs=0.03)
    other = speaker.speak("where does tom live? oslo.", "en-us")
    n = int(word.start_s * SAMPLE_RATE) - LATE
    np.testing.assert_array_equal(said.audio.samples_S[:n], other.audio.samples_S[:n])
    m = n + 2 * LATE
    assert np.abs(said.audio.samples_S[n:m] - other.audio.samples_S[n:m]).max() > 0


def test_pauses_are_cut_but_words_are_not() -> None:
    long = EspeakTTSConfig(max_pause_s=10.0).build().speak(TEXT, "en-us")
    short = EspeakTTSConfig(max_pause_s=0.08).build().speak(TEXT, "en-us")
    assert short.duration_s < long.duration_s
    for a, b in zip(long.alignment, short.alignment):
        assert a.end_s - a.start_s == pytest.approx(b.end_s - b.start_s)
        np.testing.assert_array_equal(_cut(long, a.start_s, a.end_s)[5:-5], _shifted(short, b.start_s, a)[5:-5])
    gaps = [b.start_s - a.end_s for a, b in zip(short.alignment, short.alignment[1:])]
    assert max(gaps) <= 0.08 + 2 * LATE / SAMPLE_RATE


def _shifted(said: Utterance, start_s: float, like) -> np.ndarray:
    """As many samples from `start_s` on as `like` has, free of rounding."""
    start = round(start_s * SAMPLE_RATE)
    return said.audio.samples_S[
        start : start + len(range(int(like.start_s * SAMPLE_RATE), int(like.end_s * SAMPLE_RATE)))
    ]


def test_same_text_same_sound_whatever_came_before(speaker: EspeakTTS) -> None:
    """The plain library fails this: flutter, noise and phase run on from one utterance to the next."""
    for voice in speaker.voices:
        first = speaker.speak("the cat is in the boat.", voice)
        speaker.speak("something else was said.", speaker.voices[0])
        again = EspeakTTSConfig().build().speak("the cat is in the boat.", voice)
        np.testing.assert_array_equal(first.audio.samples_S, again.audio.samples_S)
        assert first.id == again.id
        assert first.alignment == again.alignment


def test_threads_take_turns(speaker: EspeakTTS) -> None:
    texts = [f"{name} took the egg. {TEXT}" for name in ("tom", "ann", "kate")] * 4
    expected = [speaker.speak(t, "en-us").audio.samples_S for t in texts]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda t: speaker.speak(t, "en-us").audio.samples_S, texts), expected):
            np.testing.assert_array_equal(got, want)


def test_voices_and_settings_differ(speaker: EspeakTTS) -> None:
    said = [speaker.speak("the cat is here.", v) for v in speaker.voices]
    assert len({s.audio.samples_S.tobytes() for s in said}) == 4
    assert len({s.id for s in said}) == 4
    slow = EspeakTTSConfig(words_per_minute=120).build().speak("the cat is here.", "en-us")
    assert slow.duration_s > 1.3 * said[0].duration_s
    assert slow.id != said[0].id
    high = EspeakTTSConfig(pitch=90).build().speak("the cat is here.", "en-us")
    assert high.audio.samples_S.tobytes() != said[0].audio.samples_S.tobytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- it costs 1234 euros - no", ["- it", "costs", "1234", "euros -", "no"]),
        ("  two   spaces\n\na line ", ["two", "spaces", "a", "line"]),
        ("a well-known e-mail don't", ["a", "well-known", "e-mail", "don't"]),
        ("in the middle of the <b> [[x]] &amp;", ["in", "the", "middle", "of", "the", "<b>", "[[x]]", "&amp;"]),
        ("où est-il né? ça va.", ["où", "est-il", "né?", "ça", "va."]),
        ("nul\0byte here", ["nul\0byte", "here"]),
    ],
)
def test_every_word_of_the_text_is_in_the_alignment(speaker: EspeakTTS, text: str, words: list[str]) -> None:
    said = speaker.speak(text, "en-us")
    assert [w.text for w in said.alignment] == words
    edges = [t for w in said.alignment for t in (w.start_s, w.end_s)]
    assert edges == sorted(edges)


@pytest.mark.parametrize("text", ["", "   ", "...", "?!"])
def test_nothing_to_say_is_an_error(speaker: EspeakTTS, text: str) -> None:
    with pytest.raises(ValueError, match="no words"):
        speaker.speak(text, "en-us")


def test_unknown_voices_are_errors(speaker: EspeakTTS) -> None:
    with pytest.raises(ValueError, match="'klingon' is not one of"):
        speaker.speak("hello", "klingon")
    with pytest.raises(ValueError, match="no voice 'xx-zz'"):
        EspeakTTSConfig(voices=("xx-zz",)).build()
    with pytest.raises(ValueError, match="no variant 'nobody'"):
        EspeakTTSConfig(voices=("en-us+nobody",)).build()


def test_absent_espeak_names_the_extra(speaker: EspeakTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"speechquilt\[espeak\]"):
        EspeakTTSConfig().build()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("voices", ()),
        ("voices", ("en", "en")),
        ("words_per_minute", 20),
        ("pitch", 101),
        ("pitch_range", -1),
        ("max_pause_s", -0.1),
        ("max_pause_s", float("nan")),
    ],
)
def test_wrong_settings_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        EspeakTTSConfig(**{key: value})  # type: ignore[arg-type]
