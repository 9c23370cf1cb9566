"""A bank of voices: names say all of a voice, pitch and rate do what they say, word times follow."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.tts import pico
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.tts.pico import PicoTTSConfig
from speechquilt.tts.voices import ESPEAK_WORDS_PER_MINUTE, VoiceBank, VoiceBankConfig, VoiceName, faster
from speechquilt.types import Utterance, Waveform
from tests.flite import FOLDER, needs_flite

TEXT = "The cat is in the boat, and we are all here."


@pytest.fixture(scope="module")
def bank() -> VoiceBank:
    names = ("espeak:en-us", "espeak:en-us+f3", "espeak:en-us+p1.20r1.00", "espeak:en-us+p1.00r0.80")
    return VoiceBankConfig(voices=names).build()


def pitch_hz(said: Utterance) -> float:
    """Median of the strongest periods between 60 and 300 Hz."""
    rate = said.audio.sample_rate
    samples_S = said.audio.samples_S.astype(np.float64)
    width = rate // 20
    frames_FS = samples_S[: len(samples_S) // width * width].reshape(-1, width)
    found = []
    for frame_S in frames_FS[(frames_FS**2).mean(1) > 0.5 * (samples_S**2).mean()]:
        products_S = np.correlate(frame_S, frame_S, "full")[width - 1 :]
        period = rate // 300 + int(np.argmax(products_S[rate // 300 : rate // 60]))
        if products_S[period] > 0.5 * products_S[0]:
            found.append(rate / period)
    return float(np.median(found))


@given(
    st.builds(
        VoiceName,
        engine=st.sampled_from(["espeak", "flite", "pico"]),
        own=st.sampled_from(["slt", "en-us", "en-us+f3", "en-gb-x-rp+m3", "en-GB"]),
        pitch=st.integers(70, 140).map(lambda n: n / 100),
        rate=st.integers(70, 140).map(lambda n: n / 100),
    )
)
def test_a_name_says_all_of_a_voice(name: VoiceName) -> None:
    assert VoiceName.parse(str(name)) == name
    assert VoiceName.parse(name.speaker) == VoiceName(name.engine, name.own)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("slt", "must look like"),
        ("flite:", "must look like"),
        ("flite:slt p1.10", "must look like"),
        ("festival:slt", "no engine 'festival'"),
        ("flite:slt+p2.00r1.00", "pitch must be"),
        ("flite:slt+p1.00r0.10", "rate must be"),
    ],
)
def test_a_wrong_name_is_an_error(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VoiceBankConfig(voices=(name,))


def test_an_engines_own_voice_is_left_alone(bank: VoiceBank) -> None:
    own = EspeakTTSConfig(voices=("en-us",), words_per_minute=ESPEAK_WORDS_PER_MINUTE).build().speak(TEXT, "en-us")
    said = bank.speak(TEXT, "espeak:en-us")
    np.testing.assert_array_equal(said.audio.samples_S, own.audio.samples_S)
    assert said.alignment == own.alignment
    assert said.id.startswith("espeak:en-us/")


def test_pitch_is_higher_at_the_same_speed(bank: VoiceBank) -> None:
    own, high = bank.speak(TEXT, "espeak:en-us"), bank.speak(TEXT, "espeak:en-us+p1.20r1.00")
    assert pitch_hz(high) / pitch_hz(own) == pytest.approx(1.2, rel=0.06)
    assert high.duration_s == pytest.approx(own.duration_s, rel=0.1)
    assert [w.text for w in high.alignment] == TEXT.split()


def test_rate_is_slower_at_the_same_pitch(bank: VoiceBank) -> None:
    own, slow = bank.speak(TEXT, "espeak:en-us"), bank.speak(TEXT, "espeak:en-us+p1.00r0.80")
    assert own.duration_s / slow.duration_s == pytest.approx(0.8, rel=0.1)
    assert pitch_hz(slow) / pitch_hz(own) == pytest.approx(1, rel=0.06)


def test_words_are_where_they_sound_when_played_faster(bank: VoiceBank) -> None:
    said = bank.speak(TEXT, "espeak:en-us")
    fast = faster(said, 1.1)
    assert fast.duration_s == pytest.approx(said.duration_s / 1.1, abs=1e-3)
    for word, moved in zip(said.alignment, fast.alignment):
        assert (moved.start_s, moved.end_s) == pytest.approx((word.start_s / 1.1, word.end_s / 1.1), abs=1e-3)
        assert moved.text == word.text
    assert faster(said, 1.0) is said


@needs_flite
def test_engines_stand_side_by_side() -> None:
    names = ("flite:slt", "flite:slt+p1.20r1.00", "espeak:en-us")
    bank = VoiceBankConfig(voices=names, flite_folder=FOLDER).build()
    own, high, _ = (bank.speak(TEXT, name) for name in names)
    assert pitch_hz(high) / pitch_hz(own) == pytest.approx(1.2, rel=0.06)
    assert high.duration_s == pytest.approx(own.duration_s, rel=0.05)
    assert len({bank.speak(TEXT, name).id for name in names}) == 3


def test_a_voice_outside_the_bank_is_an_error(bank: VoiceBank) -> None:
    with pytest.raises(ValueError, match="'espeak:de' is not one of"):
        bank.speak(TEXT, "espeak:de")
    with pytest.raises(ValueError, match="no voice"):
        VoiceBankConfig(voices=("espeak:nobody",)).build()


def test_pico_is_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pico is in no free archive; a script stands in its place that notes what it was given and writes a file."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="libttspico-utils"):
        PicoTTSConfig().build()
    sound = tmp_path / "sound.wav"

    audio.save(sound, Waveform(samples_S=np.full(1600, 0.1, np.float32), sample_rate=16_000))
    command = tmp_path / pico.COMMAND
    command.write_text(f'#!/bin/sh\necho "$3" > {tmp_path}/text\n/bin/cp {sound} "${{2#--wave=}}"\n')
    command.chmod(0o755)
    said = PicoTTSConfig(rate=0.9).build().speak("Salt & <pepper>", "en-GB")
    assert said.duration_s == 0.1
    assert not said.alignment
    assert (tmp_path / "text").read_text().strip() == '<speed level="90">Salt &amp; &lt;pepper&gt;</speed>'
    command.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    with pytest.raises(ValueError, match="out of memory"):
        PicoTTSConfig().build().speak("hello", "en-US")
