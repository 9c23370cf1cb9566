"""Real recordings: five LibriVox clips, which `make clips` fetches (Debian's pocketsphinx-testdata).

Networks here are small and have never heard people; nothing below expects them to understand. What must hold holds for any
sound: words in order inside the clip, streaming == offline, resampling that keeps the sound.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import human_speech
from benchmarks.human_speech import CLIPS
from speechquilt import audio
from speechquilt.aligner import CTCAligner, Wav2Vec2Emitter
from speechquilt.stages.train_tokenizer import stream
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.emitters import CharacterCTCConfig
from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.types import Utterance
from tests.contracts.test_aligner import wav2vec2_folder

ROOT = Path(__file__).parents[2]
TOY = ROOT / "runs" / "toy" / "tokenizer"
pytestmark = pytest.mark.skipif(
    not (CLIPS / "transcription").is_file(), reason="the recordings are absent; `make clips` fetches them"
)


@pytest.fixture(scope="module")
def clips() -> list[Utterance]:
    return human_speech.clips()


@pytest.fixture(scope="module")
def tokenizer(clips: list[Utterance]) -> SupervisedTokenizer:
    """The toy story's when it was trained here; else random weights with codes drawn from one of the clips."""
    if (TOY / "done.json").is_file():
        return SupervisedTokenizer.load(TOY)
    text = TextTokenizer.train([u.text for u in clips], 300)
    sizes = {"num_mels": 20, "width": 32, "num_heads": 2, "ffn_width": 64, "layers_below": 2, "codebook_size": 24}
    model = SupervisedTokenizerConfig(text_vocab_size=text.size, **sizes).build(text).eval()
    wav_S = torch.from_numpy(clips[0].audio.samples_S)
    with torch.no_grad():
        pooled_BTD, _ = model._pooled(wav_S[None], torch.tensor([len(wav_S)]))
    model.quantizer.codebook_KD.copy_(pooled_BTD[0, :72:3])
    return model


def test_there_are_five_clips_with_their_texts(clips: list[Utterance]) -> None:
    assert len(clips) == 5
    assert {u.audio.sample_rate for u in clips} == {16000}
    assert all(2.9 < u.duration_s < 7.2 for u in clips)
    assert clips[1].text == "he was not an ill disposed young man"


@pytest.mark.parametrize("kind", ["characters", "wav2vec2"])
def test_words_lie_in_order_inside_the_clip(clips: list[Utterance], kind: str, tmp_path: Path) -> None:
    if kind == "characters":
        config = CharacterCTCConfig(alphabet="abcdefghijklmnopqrstuvwxyz'", width=32, num_heads=2, ffn_width=64)
        aligner = CTCAligner(config.build().eval())
    else:
        aligner = CTCAligner(Wav2Vec2Emitter(wav2vec2_folder(tmp_path)))
    for clip in clips:
        found = aligner.align(clip.audio, clip.text)
        assert [w.text for w in found] == clip.text.split()
        times = [t for w in found for t in (w.start_s, w.end_s)]
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] <= clip.duration_s
        assert all(w.score > 0 for w in found)


def test_streaming_equals_offline(clips: list[Utterance], tokenizer: SupervisedTokenizer) -> None:
    for clip, chunk in zip(clips, (1, 37, 160, 1111, 5000)):
        wav_S = torch.from_numpy(clip.audio.samples_S)
        ids_BT, _ = tokenizer.encode(wav_S[None], torch.tensor([len(wav_S)]))
        offline_T = ids_BT[0].numpy()
        np.testing.assert_array_equal(stream(tokenizer, clip.audio.samples_S, chunk), offline_T)
        assert len(np.unique(offline_T)) > 3


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_resampling_up_and_back_keeps_the_recording(clips: list[Utterance], rate: int) -> None:
    for clip in clips:
        there = audio.resample(clip.audio, rate)
        assert there.duration_s == pytest.approx(clip.duration_s, abs=1 / rate)
        back_S = audio.resample(there, 16000).samples_S
        inner = slice(200, min(len(back_S), len(clip.audio.samples_S)) - 200)
        error_S = back_S[inner] - clip.audio.samples_S[inner]
        assert np.square(error_S).mean() < 1e-3 * np.square(clip.audio.samples_S).mean()


def test_features_are_those_of_whisper(clips: list[Utterance]) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    for clip in clips[:2]:
        samples_S = clip.audio.samples_S[: len(clip.audio.samples_S) // 160 * 160]
        expected_MF = extractor(samples_S, sampling_rate=16000, padding=False, return_tensors="np").input_features[0]
        found_MF = audio.LogMel(num_mels=80, mode="whisper")(torch.from_numpy(samples_S)[None])[0].numpy()
        assert np.abs(found_MF - expected_MF).max() <= 1e-4


def test_an_alignment_survives_another_sample_rate(clips: list[Utterance], tmp_path: Path) -> None:
    """The same clip at 48 kHz: the same words, and scores of the same size."""
    aligner = CTCAligner(Wav2Vec2Emitter(wav2vec2_folder(tmp_path)))
    clip = clips[1]
    faster = replace(clip, audio=audio.resample(clip.audio, 48000))
    first, second = aligner.align(clip.audio, clip.text), aligner.align(faster.audio, clip.text)
    assert [w.text for w in first] == [w.text for w in second]
    np.testing.assert_allclose([w.score for w in first], [w.score for w in second], rtol=0.2)
