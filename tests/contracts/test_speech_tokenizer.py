"""What every SpeechTokenizer keeps: streaming == offline, bounded look-ahead, a row alone == the row in a batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import protocols
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import streaming
from speechquilt.tokenizer.model import SpeechTokenizer, SpeechTokenizerConfig

TEXT = TextTokenizer.train(["the cat sat on the mat", "where does anna live"], 300)
# Windows of 2.4 s and blocks of 0.32 s that do not divide them: all edges occur in a few seconds of audio.
# derandomize: a token whose two nearest codes are equally near to the last bit may go either way; no luck in CI.
SETTINGS = {"deadline": None, "derandomize": True}
CONFIG = SpeechTokenizerConfig(
    text_vocab_size=TEXT.size, num_mels=20, width=32, num_heads=2, ffn_width=64, layers_below=2, layers_above=1,
    decoder_layers=1, block_frames=16, max_frames=120, codebook_size=24, max_text_ids=32,
)  # fmt: skip


def build(**keys) -> SpeechTokenizer:
    """Random weights, and codes that are pooled vectors of noise, so that neighbouring tokens differ."""
    model = replace(CONFIG, **keys).build(TEXT).eval()
    wav_S = noise(1, 20.0)
    with torch.no_grad():
        pooled_BTD, _ = model._pooled(wav_S[None], torch.tensor([len(wav_S)]))
    model.quantizer.codebook_KD.copy_(pooled_BTD[0, :: pooled_BTD.shape[1] // 24][:24])
    return model


def noise(seed: int, seconds: float) -> torch.Tensor:
    """Noise whose loudness and colour change every 50 ms."""
    draw = np.random.default_rng(seed)
    num_samples = round(seconds * 16000)
    loudness = np.exp(draw.uniform(-6, -1, num_samples // 800 + 1)).repeat(800)[:num_samples]
    white = draw.standard_normal(num_samples + 1)
    mix = draw.uniform(-1, 1, num_samples // 800 + 1).repeat(800)[:num_samples]
    return torch.tensor((white[1:] + mix * white[:-1]) * loudness, dtype=torch.float32)


@pytest.fixture(scope="module", params=["default", "pooling 8"])
def model(request: pytest.FixtureRequest) -> SpeechTokenizer:
    return build() if request.param == "default" else build(pooling=8, width=48)


def alone(model: SpeechTokenizer, wav_S: torch.Tensor) -> torch.Tensor:
    ids_BT, num_tokens_B = model.encode(wav_S[None], torch.tensor([len(wav_S)]))
    assert num_tokens_B.tolist() == [-(-len(wav_S) // model.token_samples)]
    return ids_BT[0]


def streamed(model: SpeechTokenizer, wav_S: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Tokens of the pieces between `cuts`; the audio of the last piece comes with `final`."""
    state = model.init_state()
    edges = [0, *sorted(c % (len(wav_S) + 1) for c in cuts), len(wav_S)]
    ids = []
    for i in range(len(edges) - 1):
        ids_T, state = model.step(wav_S[edges[i] : edges[i + 1]], state, final=i == len(edges) - 2)
        ids.append(ids_T)
    assert len(state.wav_S) == state.num_context == state.frame == len(state.past) == 0
    return torch.cat(ids)


def test_implements_the_protocol(model: SpeechTokenizer) -> None:
    assert isinstance(model, protocols.SpeechTokenizer)
    assert model.frame_rate == 16000 / model.token_samples
    ids_T = alone(model, noise(0, 3.0))
    assert len(ids_T.unique()) > 5, "the test model must not give one token for everything"
    assert ids_T.min() >= 0
    assert ids_T.max() < model.vocab_size


@settings(max_examples=25, **SETTINGS)
@given(
    seed=st.integers(0, 50),
    seconds=st.floats(0.001, 6.0),
    cuts=st.lists(st.integers(0, 100_000), max_size=12),
)
def test_streaming_equals_offline_for_every_chunking(
    model: SpeechTokenizer, seed: int, seconds: float, cuts: list[int]
) -> None:
    wav_S = noise(seed, max(seconds, 1 / 16000))
    assert torch.equal(streamed(model, wav_S, cuts), alone(model, wav_S))


def test_streaming_one_sample_at_a_time(model: SpeechTokenizer) -> None:
    wav_S = noise(3, 0.7)
    assert torch.equal(streamed(model, wav_S, list(range(len(wav_S)))), alone(model, wav_S))


def test_streaming_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting the left context of a block changes tokens; the comparison must see it."""
    monkeypatch.setattr(streaming, "CONTEXT_FRAMES", 0)
    model, wav_S = build(), noise(4, 2.0)
    assert not torch.equal(streamed(model, wav_S, []), alone(model, wav_S))


def test_tokens_leave_as_soon_as_their_block_is_complete(model: SpeechTokenizer) -> None:
    wav_S, state, block = noise(5, 1.0), model.init_state(), model.config.block_frames * 320
    early_T, state = model.step(wav_S[: block - 1], state)
    assert len(early_T) == 0
    late_T, state = model.step(wav_S[block - 1 : block], state)
    assert len(late_T) == block // model.token_samples


def test_state_is_bounded_and_not_changed_in_place(model: SpeechTokenizer) -> None:
    state, largest = model.init_state(), 0
    for i in range(40):
        before = state.wav_S.clone()
        _, after = model.step(noise(i, 0.21), state)
        assert torch.equal(state.wav_S, before)
        state = after
        largest = max(largest, len(state.wav_S), *(k.shape[2] * 320 for k, _ in state.past))
    assert largest <= model.window_samples


@settings(max_examples=15, **SETTINGS)
@given(seed=st.integers(0, 50), token=st.integers(0, 55))
def test_a_token_depends_on_nothing_beyond_the_look_ahead(model: SpeechTokenizer, seed: int, token: int) -> None:
    wav_S = noise(seed, 5.0)
    token = min(token, len(alone(model, wav_S)) - 1)
    known = (token + 1) * model.token_samples + round(model.lookahead_s * 16000)
    changed_S = torch.cat([wav_S[:known], noise(seed + 100, 5.0)[known:]])
    assert torch.equal(alone(model, wav_S)[: token + 1], alone(model, changed_S)[: token + 1])


def test_a_model_that_leaks_is_caught() -> None:
    """Full attention declares an honest look-ahead, but under the block's look-ahead it must fail."""
    model, honest = build(causal=False), build()
    wav_S = noise(6, 2.3)
    known = model.token_samples + round(honest.lookahead_s * 16000)
    changed_S = torch.cat([wav_S[:known], noise(106, 2.3)[known:]])
    with torch.no_grad():
        before, _ = model._pooled(wav_S[None], torch.tensor([len(wav_S)]))
        after, _ = model._pooled(changed_S[None], torch.tensor([len(wav_S)]))
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3
    assert model.lookahead_s > honest.lookahead_s


@settings(max_examples=10, **SETTINGS)
@given(lengths=st.lists(st.floats(0.01, 5.5), min_size=2, max_size=4), seed=st.integers(0, 50))
def test_a_row_alone_is_the_row_in_a_batch(model: SpeechTokenizer, lengths: list[float], seed: int) -> None:
    wavs = [noise(seed + i, seconds) for i, seconds in enumerate(lengths)]
    num_samples_B = torch.tensor([len(w) for w in wavs])
    wav_BS = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=0.9)  # padding is not silence
    ids_BT, num_tokens_B = model.encode(wav_BS, num_samples_B)
    for b, wav_S in enumerate(wavs):
        assert torch.equal(ids_BT[b, : num_tokens_B[b]], alone(model, wav_S))
        assert not ids_BT[b, num_tokens_B[b] :].any()


def test_training_pass_ignores_padding_too(model: SpeechTokenizer) -> None:
    wav_S = noise(7, 1.3)
    padded_BS = torch.stack([torch.cat([wav_S, torch.full((16000,), 0.9)]), noise(8, 1.3 + 1.0)])
    num_samples_B = torch.tensor([len(wav_S), padded_BS.shape[1]])
    with torch.no_grad():
        one = model(wav_S[None], torch.tensor([len(wav_S)]))
        two = model(padded_BS, num_samples_B)
    n = int(one.num_tokens_B[0])
    assert torch.allclose(two.states_BTD[0, :n], one.states_BTD[0], atol=1e-4)
    assert not two.commitment_BT[0, n:].any()


def test_audio_longer_than_a_window_is_its_windows(model: SpeechTokenizer) -> None:
    wav_S = noise(9, 6.0)
    parts = [alone(model, part_S) for part_S in wav_S.split(model.window_samples)]
    assert len(parts) == 3
    assert torch.equal(alone(model, wav_S), torch.cat(parts))


def test_a_45_second_clip_at_the_default_window() -> None:
    model, wav_S = build(max_frames=1500, block_frames=100), noise(10, 45.0)
    ids_T = alone(model, wav_S)
    assert len(ids_T) == 563
    assert torch.equal(streamed(model, wav_S, [7_777 * i for i in range(90)]), ids_T)
    assert isinstance(model.read_back([ids_T.numpy()])[0], str)


def test_bad_audio_says_what_is_wrong(model: SpeechTokenizer) -> None:
    with pytest.raises(ValueError, match="empty audio"):
        model.encode(torch.zeros(1, 0), torch.tensor([0]))
    with pytest.raises(ValueError, match="empty audio"):
        model.encode(torch.zeros(2, 400), torch.tensor([400, 0]))
    with pytest.raises(ValueError, match="NaN"):
        model.encode(torch.tensor([[0.1, float("nan")]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="finite"):
        model.step(torch.tensor([float("inf")]), model.init_state())
    with pytest.raises(ValueError, match="holds 2"):
        model.encode(torch.zeros(1, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="int16"):
        model.encode(torch.zeros(1, 2, dtype=torch.int16), torch.tensor([2]))


def test_nothing_streamed_is_no_token(model: SpeechTokenizer) -> None:
    ids_T, _ = model.step(torch.zeros(0), model.init_state(), final=True)
    assert ids_T.tolist() == []


@pytest.mark.parametrize("head", ["ctc", "attention"])
def test_reading_back_tokens_is_transcribing_their_audio(model: SpeechTokenizer, head: str) -> None:
    wavs = [noise(20 + i, s) for i, s in enumerate((0.5, 3.1, 1.2))]
    wav_BS = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    num_samples_B = torch.tensor([len(w) for w in wavs])
    tokens = [alone(model, w).numpy() for w in wavs]
    texts = model.read_back([*tokens, np.zeros(0, dtype=np.int32)], head)
    assert texts == [*model.transcribe(wav_BS, num_samples_B, head), ""]
    assert texts[:3] == [model.read_back([t], head)[0] for t in tokens]
    assert any(texts)


def test_the_config_chooses_the_head() -> None:
    ids_T = alone(build(), noise(0, 1.0)).numpy()
    for head in ("ctc", "attention"):
        model = build(read_back_head=head)
        assert model.read_back([ids_T]) == model.read_back([ids_T], head)


def test_save_and_load_keep_tokens_texts_and_fingerprint(tmp_path: Path) -> None:
    model, wav_S = build(), noise(11, 2.0)
    model.save(tmp_path / "tokenizer")
    loaded = SpeechTokenizer.load(tmp_path / "tokenizer")
    assert torch.equal(alone(loaded, wav_S), alone(model, wav_S))
    assert loaded.fingerprint == model.fingerprint
    ids_T = alone(model, wav_S).numpy()
    assert loaded.read_back([ids_T]) == model.read_back([ids_T])
    assert loaded.config == model.config
    (tmp_path / "tokenizer" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        SpeechTokenizer.load(tmp_path / "tokenizer")


def test_loading_weights_of_another_size_names_the_file(tmp_path: Path) -> None:
    build().save(tmp_path)
    build(layers_above=2).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        SpeechTokenizer.load(tmp_path)


def test_fingerprint_is_that_of_the_tokens() -> None:
    model = build()
    first = model.fingerprint
    assert build().fingerprint == first
    assert build(ctc_weight=0.1, decoder_layers=2).fingerprint == first  # heads do not make tokens
    assert build(block_frames=20).fingerprint != first
    with torch.no_grad():
        model.encoder.layers[0].fc1.bias[0] += 1e-3
    second = model.fingerprint
    assert second != first
    model.quantizer.codebook_KD[0, 0] += 1e-3
    assert model.fingerprint not in (first, second)
    with torch.no_grad():
        model.encoder.layers[2].fc1.bias[0] += 1  # above the bottleneck
    assert model.fingerprint == (third := model.fingerprint)
    assert third not in (first, second)


def test_a_codebook_that_does_not_exist_yet_is_an_error() -> None:
    model = replace(CONFIG, vq_warmup_updates=10).build(TEXT).eval()
    with pytest.raises(ValueError, match="warmup_updates=10"):
        model.encode(noise(0, 1.0)[None], torch.tensor([16000]))
    assert len(model.transcribe(noise(0, 1.0)[None], torch.tensor([16000]))) == 1


def test_configs_refuse_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="block_frames=30"):
        replace(CONFIG, block_frames=30)
    with pytest.raises(ValueError, match="text_vocab_size=9"):
        replace(CONFIG, text_vocab_size=9).build(TEXT)
    with pytest.raises(ValueError, match="ctc_weight=2"):
        replace(CONFIG, ctc_weight=2.0)
