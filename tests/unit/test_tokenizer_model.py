"""The tokenizer that we train: its windows, training pass, heads, folder and fingerprint (its contract: tests/contracts)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechquilt.tokenizer.emitters import TokenizerEmitter
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from tests.contracts.tiny_tokenizer import CONFIG, TEXT, build
from tests.parity.tiny_tokenizers import noise


@pytest.fixture(scope="module", params=["default", "pooling 8"])
def model(request: pytest.FixtureRequest) -> SupervisedTokenizer:
    return build() if request.param == "default" else build(pooling=8, width=48)


def alone(model: SupervisedTokenizer, wav_S: torch.Tensor) -> torch.Tensor:
    return model.encode(wav_S[None], torch.tensor([len(wav_S)]))[0][0]


def test_tokens_leave_as_soon_as_their_block_is_complete(model: SupervisedTokenizer) -> None:
    wav_S, state, block = noise(5, 1.0), model.init_state(), model.config.block_frames * 320
    early_T, state = model.step(wav_S[: block - 1], state)
    assert len(early_T) == 0
    late_T, state = model.step(wav_S[block - 1 : block], state)
    assert len(late_T) == block // model.token_samples


def test_training_pass_ignores_padding_too(model: SupervisedTokenizer) -> None:
    wav_S = noise(7, 1.3)
    padded_BS = torch.stack([torch.cat([wav_S, torch.full((16000,), 0.9)]), noise(8, 1.3 + 1.0)])
    num_samples_B = torch.tensor([len(wav_S), padded_BS.shape[1]])
    with torch.no_grad():
        one = model(wav_S[None], torch.tensor([len(wav_S)]))
        two = model(padded_BS, num_samples_B)
    n = int(one.num_tokens_B[0])
    assert torch.allclose(two.states_BTD[0, :n], one.states_BTD[0], atol=1e-4)
    assert not two.commitment_BT[0, n:].any()


def test_audio_longer_than_a_window_is_its_windows(model: SupervisedTokenizer) -> None:
    wav_S = noise(9, 6.0)
    parts = [alone(model, part_S) for part_S in wav_S.split(model.window_samples)]
    assert len(parts) == 3
    assert torch.equal(alone(model, wav_S), torch.cat(parts))


def test_a_45_second_clip_at_the_default_window() -> None:
    model, wav_S = build(max_frames=1500, block_frames=100), noise(10, 45.0)
    ids_T = alone(model, wav_S)
    assert len(ids_T) == 563
    state, parts = model.init_state(), []
    for chunk_S in wav_S.split(7_777):
        part_T, state = model.step(chunk_S, state)
        parts.append(part_T)
    last_T, _ = model.step(wav_S[:0], state, final=True)
    assert torch.equal(torch.cat([*parts, last_T]), ids_T)
    assert isinstance(model.read_back([ids_T.numpy()])[0], str)


@pytest.mark.parametrize("head", ["ctc", "attention"])
def test_reading_back_tokens_is_transcribing_their_audio(model: SupervisedTokenizer, head: str) -> None:
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
    loaded = SupervisedTokenizer.load(tmp_path / "tokenizer")
    assert torch.equal(alone(loaded, wav_S), alone(model, wav_S))
    assert loaded.fingerprint == model.fingerprint
    ids_T = alone(model, wav_S).numpy()
    assert loaded.read_back([ids_T]) == model.read_back([ids_T])
    assert loaded.config == model.config
    (tmp_path / "tokenizer" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        SupervisedTokenizer.load(tmp_path / "tokenizer")


def test_loading_weights_of_another_size_names_the_file(tmp_path: Path) -> None:
    build().save(tmp_path)
    build(layers_above=2).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        SupervisedTokenizer.load(tmp_path)


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
    with pytest.raises(ValueError, match="ctc_weight=0 makes none"):
        replace(CONFIG, ctc_weight=0.0)
    with pytest.raises(ValueError, match="text_ids_per_s=0"):
        replace(CONFIG, text_ids_per_s=0.0)


def test_without_a_ctc_head_tokens_are_read_by_attention_alone(tmp_path: Path) -> None:
    model = build(ctc_weight=0.0, read_back_head="attention")
    ids_T = alone(model, noise(0, 1.0)).numpy()
    model.save(tmp_path)
    assert SupervisedTokenizer.load(tmp_path).read_back([ids_T]) == model.read_back([ids_T])
    with pytest.raises(ValueError, match="trained with ctc_weight=0"):
        model.read_back([ids_T], "ctc")
    with pytest.raises(ValueError, match="no CTC head"):
        TokenizerEmitter(model)
