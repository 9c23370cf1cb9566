"""Audio files good and bad, resampling, and log-mel that streams."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.types import Waveform


def _tone(rate: int = 16_000, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_stereo_at_8_khz_gives_the_first_channel(tmp_path: Path) -> None:
    left, right = _tone(8_000), _tone(8_000, hz=300.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8_000)
    wav = audio.check(audio.load(tmp_path / "a.wav"))
    assert wav.sample_rate == 8_000
    assert wav.samples_S.dtype == np.float32
    np.testing.assert_allclose(wav.samples_S, left, atol=1e-4)
    assert len(audio.resample(wav, audio.SAMPLE_RATE).samples_S) == 2 * len(left)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_save_and_load(tmp_path: Path, suffix: str) -> None:
    wav = Waveform(samples_S=_tone(), sample_rate=16_000)
    audio.save(tmp_path / f"a.{suffix}", wav)
    back = audio.load(tmp_path / f"a.{suffix}")
    assert back.sample_rate == 16_000
    np.testing.assert_allclose(back.samples_S, wav.samples_S, atol=1e-4 if suffix != "ogg" else 0.05)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.wav is missing"):
        audio.load(tmp_path / "nowhere.wav")
    with pytest.raises(FileNotFoundError, match="missing"):
        audio.load(tmp_path)
    for name, content in (("text.wav", b"this is not audio"), ("empty.wav", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as audio"):
            audio.load(tmp_path / name)


def test_save_says_why_it_cannot(tmp_path: Path) -> None:
    wav = Waveform(samples_S=_tone(), sample_rate=16_000)
    for path in (tmp_path / "no" / "folder.wav", tmp_path / "a.unknown"):
        with pytest.raises(OSError, match="cannot write audio"):
            audio.save(path, wav)


@pytest.mark.parametrize(
    ("samples_S", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "empty"),
        (np.array([0.0, np.nan], np.float32), 16_000, "1 samples that are NaN"),
        (np.array([np.inf, -np.inf], np.float32), 16_000, "2 samples that are NaN or infinite"),
        (np.zeros((4, 2), np.float32), 16_000, "one channel"),
        (np.zeros(4, np.float32), 0, "sample_rate=0"),
    ],
)
def test_bad_audio_is_refused(samples_S: np.ndarray, rate: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audio.check(Waveform(samples_S=samples_S, sample_rate=rate))


def test_an_empty_recording_loads_and_is_refused_by_check(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(ValueError, match="empty"):
        audio.check(audio.load(tmp_path / "a.wav"))


def test_resampling_keeps_the_tone() -> None:
    wav = Waveform(samples_S=_tone(22_050, 1.0), sample_rate=22_050)
    out = audio.resample(wav, 16_000)
    assert out.sample_rate == 16_000
    assert out.samples_S.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(out.samples_S))
    assert spectrum.argmax() == pytest.approx(440, abs=1)
    assert audio.resample(wav, 22_050) is wav
    with pytest.raises(ValueError, match="sample_rate=0"):
        audio.resample(wav, 0)


def test_absent_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"soundfile is not installed.*speechquilt\[audio\]"):
        audio.load("a.wav")
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"soxr is not installed.*speechquilt\[audio\]"):
        audio.resample(Waveform(samples_S=_tone(), sample_rate=16_000), 8_000)


@pytest.fixture(scope="module")
def stream() -> audio.LogMel:
    return audio.LogMel(80, "stream")


def _noise(num_samples: int, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


@given(chunks=st.lists(st.integers(0, 1500), max_size=8), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_stream_equals_offline_for_every_chunking(stream: audio.LogMel, chunks: list[int], seed: int) -> None:
    wav_S = _noise(sum(chunks), seed)
    state, pieces = stream.stream_init(), []
    for chunk_S in wav_S.split(chunks):
        mel_MF, state = stream.stream_step(chunk_S, state)
        pieces.append(mel_MF)
    streamed_MF = torch.cat([*pieces, torch.zeros(80, 0)], 1)
    assert streamed_MF.shape == (80, len(wav_S) // audio.HOP)
    torch.testing.assert_close(streamed_MF, stream(wav_S[None])[0], atol=1e-5, rtol=0)


@given(frame=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_stream_frame_sees_nothing_past_its_end(stream: audio.LogMel, frame: int) -> None:
    """Frame f reads samples [160 f - 240, 160 f + 160): it ignores all others, and uses the last before its end."""
    wav_S = _noise(1600, 0)
    end = (frame + 1) * audio.HOP
    mel_MF = stream(wav_S[None])[0]

    after_S = torch.cat([wav_S[:end], 5 + wav_S[end:]])
    torch.testing.assert_close(stream(after_S[None])[0, :, : frame + 1], mel_MF[:, : frame + 1], atol=1e-6, rtol=0)
    before_S = wav_S.clone()
    before_S[: max(0, end - audio.WINDOW)] = 5
    torch.testing.assert_close(stream(before_S[None])[0, :, frame], mel_MF[:, frame], atol=1e-6, rtol=0)
    inside_S = wav_S.clone()
    inside_S[end - 20 : end] += 1
    assert (stream(inside_S[None])[0, :, frame] - mel_MF[:, frame]).abs().max() > 1e-3


def test_stream_floor_does_not_depend_on_the_clip(stream: audio.LogMel) -> None:
    silence_BMF = stream(torch.zeros(1, 1600))
    assert torch.equal(silence_BMF, torch.full_like(silence_BMF, (audio.STREAM_FLOOR + 4) / 4))
    loud_S = torch.cat([torch.zeros(800), torch.from_numpy(_tone(seconds=0.05))])
    assert torch.equal(stream(loud_S[None])[0, :, :5], silence_BMF[0, :, :5])


def test_a_row_alone_is_the_row_in_a_batch(stream: audio.LogMel) -> None:
    wav_BS = torch.stack([_noise(3200, 0), 3 * _noise(3200, 1)])
    torch.testing.assert_close(stream(wav_BS)[1], stream(wav_BS[1:])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["whisper", "stream"])
def test_mixed_precision_leaves_features_alone(mode: audio.MelMode) -> None:
    log_mel, wav_BS = audio.LogMel(80, mode), _noise(3200, 0)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_BMF = log_mel(wav_BS)
    assert mixed_BMF.dtype == torch.float32
    assert torch.equal(mixed_BMF, log_mel(wav_BS))


@pytest.mark.parametrize("mode", ["whisper", "stream"])
def test_nothing_is_kept_in_checkpoints(mode: audio.MelMode) -> None:
    assert not audio.LogMel(80, mode).state_dict()


def test_log_mel_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="num_mels=0"):
        audio.LogMel(0)
    with pytest.raises(ValueError, match="mode='fast'"):
        audio.LogMel(80, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need the whole clip"):
        audio.LogMel(80, "whisper").stream_init()
    with pytest.raises(ValueError, match="200 samples are too few"):
        audio.LogMel(80, "whisper")(torch.zeros(1, 200))
    assert audio.LogMel(80, "whisper")(torch.zeros(1, 201)).shape == (1, 80, 1)
    assert audio.LogMel(80, "stream")(torch.zeros(2, 0)).shape == (2, 80, 0)
