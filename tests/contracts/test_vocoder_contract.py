"""What every Vocoder keeps: streaming == offline, bounded look-ahead and state, a row alone == the row in a batch."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from speechquilt import protocols
from speechquilt.decoder.hifi_gan import HifiGan
from speechquilt.decoder.hift import Hift, HiftConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.overlap import OverlapAdd, OverlapState
from speechquilt.decoder.phase import PhaseVocoderConfig
from speechquilt.decoder.vocos import VocosConfig

SETTINGS = {"deadline": None, "derandomize": True}
MEL = MelConfig(sample_rate=8000, num_mels=20, fft_samples=128, hop=32, high_hz=4000.0)
ODD = MelConfig(sample_rate=8000, num_mels=12, fft_samples=96, hop=36, high_hz=4000.0)  # a hop that divides nothing


def vocos(mel: MelConfig = MEL, **keys: Any) -> Any:
    """Weights large enough for everything within reach to be heard."""
    torch.manual_seed(0)
    made = VocosConfig(mel=mel, width=16, ffn_width=32, num_layers=2, kernel=5, **keys).build().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    return made


def hifi_gan() -> Any:
    torch.manual_seed(1)
    sizes = SpeechT5HifiGanConfig(
        model_in_dim=20, sampling_rate=8000, upsample_initial_channel=16, upsample_rates=[4, 8],
        upsample_kernel_sizes=[8, 16], resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1, 2]],
        initializer_range=0.2,
    )  # fmt: skip
    return HifiGan(SpeechT5HifiGan(sizes), MEL, 10.0).eval()


def hift() -> Any:
    torch.manual_seed(2)
    sizes = HiftConfig(
        mel=MEL, width=16, pitch_width=8, num_harmonics=2, upsample_rates=(4, 4), upsample_kernels=(8, 8),
        short_points=8, short_hop=2, block_kernels=(3, 5), block_dilations=((1, 3), (1, 2)), source_kernels=(3, 5),
        source_dilations=((1, 2), (1, 2)),
    )  # fmt: skip
    made = sizes.build().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)
        made.f0_predictor.classifier.weight.mul_(100.0)  # up to some hundred Hz, now and then below the voiced 10
        made.f0_predictor.classifier.bias.zero_()
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "phase": PhaseVocoderConfig(mel=MEL, rounds=2).build,
    "phase, no frames ahead": PhaseVocoderConfig(mel=MEL, frames_ahead=0, rounds=1).build,
    "phase, odd hop": PhaseVocoderConfig(mel=ODD, frames_ahead=1, rounds=2).build,
    "vocos": lambda: vocos(frames_ahead=3),
    "vocos, causal": lambda: vocos(frames_ahead=0),
    "vocos, as published": lambda: vocos(frames_ahead=6),
    "vocos, odd hop": lambda: vocos(ODD, frames_ahead=2),
    "HiFi-GAN": hifi_gan,
    "HiFT": hift,
}
EXACT = "phase"  # kinds that take frames one by one, so that nothing is rounded otherwise in another chunking
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=KINDS)
def vocoder(request: pytest.FixtureRequest) -> Any:
    made = KINDS[request.param]()
    made.tolerance = 0.0 if request.param.startswith(EXACT) else TOLERANCE
    return made


def frames(vocoder: Any, seed: int, num_frames: int) -> torch.Tensor:
    """A log-mel that moves like speech: slowly in time, from silence to loud."""
    noise_MF = torch.randn(vocoder.mel.num_mels, num_frames, generator=torch.Generator().manual_seed(seed))
    return 2.0 * noise_MF.cumsum(1) / (1 + torch.arange(num_frames)).sqrt() - 2.0


@torch.no_grad()
def alone(vocoder: Any, mel_MF: torch.Tensor) -> torch.Tensor:
    return vocoder.forward(mel_MF[None], torch.tensor([mel_MF.shape[1]]))[0]


@torch.no_grad()
def streamed(vocoder: Any, mel_MF: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Samples of the pieces between `cuts`; the last piece comes with `final`."""
    num_frames = mel_MF.shape[1]
    edges = [0, *sorted(c % (num_frames + 1) for c in cuts), num_frames]
    waves, state = [], vocoder.init_state()
    for i in range(len(edges) - 1):
        wav_S, state = vocoder.step(mel_MF[:, edges[i] : edges[i + 1]], state, final=i == len(edges) - 2)
        waves.append(wav_S)
    again_S, _ = vocoder.step(mel_MF, state, final=True)
    assert len(again_S) == sum(map(len, waves)), "after `final` the state is a fresh one"
    return torch.cat(waves)


def same(vocoder: Any, one_S: torch.Tensor, other_S: torch.Tensor) -> bool:
    if one_S.shape != other_S.shape:
        return False
    return not len(one_S) or bool((one_S - other_S).abs().max() <= vocoder.tolerance * one_S.abs().max())


def tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from tensors(part)
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from tensors(getattr(state, field.name))


def test_implements_the_protocol(vocoder: Any) -> None:
    assert isinstance(vocoder, protocols.Vocoder)
    assert isinstance(vocoder.mel, MelConfig)
    wav_S = alone(vocoder, frames(vocoder, 0, 31))
    assert wav_S.dtype == torch.float32
    assert wav_S.shape == (31 * vocoder.mel.hop,)
    assert wav_S.std() > 0
    assert wav_S.isfinite().all()


@settings(max_examples=10, **SETTINGS)
@given(seed=st.integers(0, 50), num_frames=st.integers(1, 40), cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_streaming_equals_offline_for_every_chunking(vocoder: Any, seed: int, num_frames: int, cuts: list[int]) -> None:
    mel_MF = frames(vocoder, seed, num_frames)
    assert same(vocoder, alone(vocoder, mel_MF), streamed(vocoder, mel_MF, cuts))


def test_streaming_one_frame_at_a_time_and_the_end_alone(vocoder: Any) -> None:
    mel_MF = frames(vocoder, 3, 30)
    assert same(vocoder, alone(vocoder, mel_MF), streamed(vocoder, mel_MF, list(range(31))))


def test_a_frame_becomes_sound_when_its_look_ahead_is_there(vocoder: Any) -> None:
    mel_MF, state, given, got = frames(vocoder, 4, 60), vocoder.init_state(), 0, 0
    for chunk_MF in mel_MF.split(7, 1):
        with torch.no_grad():
            wav_S, state = vocoder.step(chunk_MF, state)
        given, got = given + chunk_MF.shape[1], got + len(wav_S)
        assert got >= (given - vocoder.lookahead_frames) * vocoder.mel.hop
        assert got <= given * vocoder.mel.hop
    assert got > 0


@settings(max_examples=5, **SETTINGS)
@given(seed=st.integers(0, 50), frame=st.integers(0, 30))
def test_a_frame_depends_on_nothing_beyond_the_look_ahead(vocoder: Any, seed: int, frame: int) -> None:
    mel_MF = frames(vocoder, seed, 30 + vocoder.lookahead_frames + 9)
    known, stop = frame + 1 + vocoder.lookahead_frames, (frame + 1) * vocoder.mel.hop
    changed_MF = torch.cat([mel_MF[:, :known], frames(vocoder, seed + 100, mel_MF.shape[1])[:, known:]], 1)
    assert same(vocoder, alone(vocoder, mel_MF)[:stop], alone(vocoder, changed_MF)[:stop])


def test_the_look_ahead_is_not_overstated(vocoder: Any) -> None:
    """The last frame that may change a sample does; of HiFT one a little nearer, for what comes through the outermost taps
    of twenty convolutions is less than float32 holds."""
    last = 20 + vocoder.lookahead_frames - (4 if isinstance(vocoder, Hift) else 0)
    mel_MF = frames(vocoder, 5, last + 20)
    changed_MF, stop = mel_MF.clone(), 21 * vocoder.mel.hop
    changed_MF[:, last:] += 3.0
    assert not torch.equal(alone(vocoder, mel_MF)[:stop], alone(vocoder, changed_MF)[:stop])


def test_state_is_bounded_and_not_changed_in_place(vocoder: Any) -> None:
    state, sizes = vocoder.init_state(), []
    for i in range(40):
        before = [tensor.clone() for tensor in tensors(state)]
        with torch.no_grad():
            _, after = vocoder.step(frames(vocoder, i, 3), state)
        assert all(torch.equal(old, new) for old, new in zip(before, tensors(state)))
        state = after
        sizes.append(sum(tensor.numel() for tensor in tensors(state)))
    assert max(sizes) == max(sizes[:20]), "what is kept does not grow with what was heard"


@settings(max_examples=4, **SETTINGS)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), seed=st.integers(0, 50))
def test_a_row_alone_is_the_row_in_a_batch(vocoder: Any, lengths: list[int], seed: int) -> None:
    rows = [frames(vocoder, seed + i, n) for i, n in enumerate(lengths)]
    mel_BMF = torch.full((len(rows), vocoder.mel.num_mels, max(lengths)), 0.7)  # padding is not silence
    for b, mel_MF in enumerate(rows):
        mel_BMF[b, :, : mel_MF.shape[1]] = mel_MF
    with torch.no_grad():
        wav_BS = vocoder.forward(mel_BMF, torch.tensor(lengths))
    for b, mel_MF in enumerate(rows):
        stop = lengths[b] * vocoder.mel.hop
        assert same(vocoder, alone(vocoder, mel_MF), wav_BS[b, :stop])
        assert not wav_BS[b, stop:].any()


def test_nothing_streamed_is_no_sound(vocoder: Any) -> None:
    none_MF = torch.zeros(vocoder.mel.num_mels, 0)
    wav_S, state = vocoder.step(none_MF, vocoder.init_state())
    assert len(wav_S) == 0
    assert len(vocoder.step(none_MF, state, final=True)[0]) == 0


def test_bad_frames_say_what_is_wrong(vocoder: Any) -> None:
    num_mels, state = vocoder.mel.num_mels, vocoder.init_state()
    with pytest.raises(ValueError, match="finite"):
        vocoder.step(torch.full((num_mels, 2), float("nan")), state)
    with pytest.raises(ValueError, match=rf"no log-mel; floats \[{num_mels}, frames\]"):
        vocoder.step(torch.zeros(num_mels + 1, 2), state)
    with pytest.raises(ValueError, match="int64"):
        vocoder.step(torch.zeros(num_mels, 2, dtype=torch.long), state)
    with pytest.raises(ValueError, match=r"row 1 has 0 frames; 1\.\.3"):
        vocoder.forward(torch.zeros(2, num_mels, 3), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="row 0 has 4 frames"):
        vocoder.forward(torch.zeros(1, num_mels, 3), torch.tensor([4]))
    with pytest.raises(ValueError, match="a length per row"):
        vocoder.forward(torch.zeros(2, num_mels, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match="finite"):
        vocoder.forward(torch.full((1, num_mels, 3), float("inf")), torch.tensor([3]))


def test_a_forgotten_overlap_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's frames alone, as in plain Griffin-Lim: the comparison must see it."""
    vocoder = KINDS["phase"]()
    vocoder.tolerance = 0.05
    whole = OverlapAdd.step

    def forgetful(self: OverlapAdd, frames_BFN: torch.Tensor, state: OverlapState, **keys: Any) -> Any:
        wav_BS, after = whole(self, frames_BFN, state, **keys)
        return wav_BS, OverlapState(torch.zeros_like(after.sum_BS), after.weight_BS, after.skip)

    mel_MF = frames(vocoder, 6, 20)
    before_S = alone(vocoder, mel_MF)
    monkeypatch.setattr(OverlapAdd, "step", forgetful)
    assert not same(vocoder, before_S, streamed(vocoder, mel_MF, [5, 9]))
