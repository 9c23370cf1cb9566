"""The natural voice: what it says of a text and in which style, with a network that only listens, and for real."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from speechquilt import audio, protocols
from speechquilt.evals.wer import word_errors
from speechquilt.files import write_json
from speechquilt.tokenizer.whisper import whisper_start
from speechquilt.tts import kokoro
from speechquilt.tts.espeak import Clause, clauses
from speechquilt.tts.kokoro import KokoroTTS, KokoroTTSConfig
from tests.real_weights import KOKORO, WHISPER, real_weights

LONGEST = 40
ALPHABET = " ,.!?həlˈoʊwɜːdæzʌntuːɹiɪfvk"


class Listener:
    """Instead of onnxruntime's session: keeps what it was asked to say, and answers a sample per id."""

    def __init__(self) -> None:
        self.heard: list[dict[str, np.ndarray]] = []

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.heard.append(inputs)
        return [np.linspace(-2, 2, inputs["tokens"].shape[1])]


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listener:
    """`tmp_path` is a model folder with the voices anna and ben."""
    found = Listener()
    monkeypatch.setattr(kokoro, "_session", lambda path, num_threads: found)
    (tmp_path / "model.onnx").touch()
    write_json(tmp_path / "config.json", {"sample_rate": 24000, "phonemes": {c: i for i, c in enumerate(ALPHABET, 1)}})
    styles_NS = np.arange(LONGEST, dtype=np.float32)[:, None].repeat(3, 1)
    save_file({"anna": styles_NS, "ben": -styles_NS}, tmp_path / "voices.safetensors")
    return found


def built(folder: Path, **changes: Any) -> KokoroTTS:
    return KokoroTTSConfig(**{"folder": str(folder), "voices": ("anna", "ben")} | changes).build()


def said(listener: Listener) -> list[str]:
    """The phonemes of each call, without the edges."""
    calls = [inputs["tokens"][0].tolist() for inputs in listener.heard]
    assert all(ids[0] == ids[-1] == 0 for ids in calls)
    return ["".join(ALPHABET[i - 1] for i in ids[1:-1]) for ids in calls]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", [Clause("həlˈoʊ", ","), Clause("wˈɜːld", "!")]),
        ("one", [Clause("wˌʌn", "")]),
        ("Is it 3.5?! No…", [Clause("ɪz ɪt θɹˈiː pɔɪnt fˈaɪv", "?!"), Clause("nˈoʊ", "…")]),
        ('He said: "No!" and left', [Clause("hiː sˈɛd", ":"), Clause("nˈoʊ", "!"), Clause("ænd lˈɛft", "")]),
        ("two \0 cafés", [Clause("tˈuː kæfˈeɪz", "")]),
        ("", []),
        ("  … ", []),
    ],
)
def test_clauses_and_the_signs_that_close_them(text: str, expected: list[Clause]) -> None:
    assert clauses(text, "en-us") == expected


def test_a_language_that_nobody_speaks_is_refused(listener: Listener, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="espeak-ng has no voice 'xx'"):
        built(tmp_path, language="xx")


def test_phonemes_style_and_speed_reach_the_network(listener: Listener, tmp_path: Path) -> None:
    speaker: protocols.TextToSpeech = built(tmp_path, rate=1.25)
    spoken = speaker.speak("Hello, world!", "ben")
    assert said(listener) == ["həlˈoʊ, wˈɜːld!"]
    (inputs,) = listener.heard
    assert inputs["style"].tolist() == [[-14.0] * 3], "15 phonemes: the row 14 of the voice"
    assert inputs["speed"].tolist() == [1.25]
    assert spoken.audio.sample_rate == 24000
    assert spoken.audio.samples_S.dtype == np.float32
    assert np.abs(spoken.audio.samples_S).max() == 1.0, "clipped"
    assert spoken.alignment == ()
    assert spoken.id != built(tmp_path).speak("Hello, world!", "ben").id


def test_letters_outside_the_alphabet_are_left_out(listener: Listener, tmp_path: Path) -> None:
    built(tmp_path).speak("three", "anna")
    assert said(listener) == ["ɹˈiː"]
    with pytest.raises(ValueError, match="has nothing to say"):
        built(tmp_path).speak("…", "anna")


def test_a_long_text_is_said_in_whole_clauses(listener: Listener, tmp_path: Path) -> None:
    spoken = built(tmp_path).speak("Hello, world, hello, two. " + "two two " * 12, "anna")
    first, *rest = said(listener)
    assert first == "həlˈoʊ, wˈɜːld, həlˈoʊ, tˈuː."
    assert all(0 < len(breath) <= LONGEST for breath in rest)
    assert "".join(rest).replace(" ", "") == "tˈuː" * 24, "a clause that is too long is cut, and nothing is lost"
    assert len(spoken.audio.samples_S) == sum(len(breath) + 2 for breath in (first, *rest))


def test_what_cannot_be_built_says_why(listener: Listener, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no carl; it has anna, ben"):
        built(tmp_path, voices=("carl",))
    with pytest.raises(ValueError, match="voice 'ben' is not one of this speaker's: anna"):
        built(tmp_path, voices=("anna",)).speak("two", "ben")
    for changes, message in (
        ({"rate": 3}, "rate=3"),
        ({"voices": ("a", "a")}, "voices="),
        ({"num_threads": -1}, "least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            KokoroTTSConfig(**changes)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="`speechquilt weights kokoro-82m` makes"):
        built(tmp_path)


@pytest.mark.slow
def test_whisper_understands_the_real_one() -> None:
    pytest.importorskip("onnxruntime")
    whisper, speaker = (
        real_weights(WHISPER),
        KokoroTTSConfig(folder=str(real_weights(KOKORO)), voices=("jm_kumo",)).build(),
    )
    as_whisper = {"causal": False, "features": "whisper", "pooling": 1, "codebook_size": 8, "block_frames": 100}
    reader = whisper_start(whisper, language=None, max_frames=1500, **as_whisper)
    text = "He asked whether the train would arrive before noon, but nobody answered him."
    spoken = speaker.speak(text, "jm_kumo")
    assert 4 < spoken.duration_s < 7
    assert np.array_equal(spoken.audio.samples_S, speaker.speak(text, "jm_kumo").audio.samples_S)
    wav_S = torch.from_numpy(audio.resample(spoken.audio, 16000).samples_S)
    wav_BS = torch.nn.functional.pad(wav_S, (0, 30 * 16000 - len(wav_S)))[None]
    (heard,) = reader.transcribe(wav_BS, torch.tensor([wav_BS.shape[1]]))
    assert word_errors(text, heard).errors <= 1
