"""Started from a Whisper folder, without causality and codebook, encoder and decoder are transformers' Whisper."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.encoder import EncoderConfig
from speechquilt.tokenizer.loops import repeated_ids
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tokenizer.whisper import whisper_start
from speechquilt.types import IGNORE
from tests.parity import tiny_tokenizers

RATE = {"codebook_size": 8, "block_frames": 20, "max_frames": 120}  # of no published frame rate
AS_WHISPER = {"causal": False, "features": "whisper", "pooling": 1, **RATE}


def started(folder: Path, **changes: Any) -> tuple[SupervisedTokenizer, Any]:
    whisper = tiny_tokenizers.whisper(folder, **changes)
    return whisper_start(folder, **AS_WHISPER), whisper


def encoded(model: SupervisedTokenizer, mel_BMF: Tensor) -> Tensor:
    num_frames_B = torch.full((len(mel_BMF),), mel_BMF.shape[2] // 2)
    lower_BTD, _ = model.encoder.lower(model.encoder.stem(mel_BMF), num_frames_B)
    return model.encoder.upper(lower_BTD, -(-num_frames_B // model.config.pooling))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_mel_bins": 128}, {"encoder_layers": 3, "decoder_layers": 1}, {"max_shard_size": "60KB"}],
    ids=["80 mels' layout", "128 mels", "turbo's short decoder", "shards"],
)
def test_encoder_and_decoder_are_whispers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, whisper = started(tmp_path, **changes)
    assert (tmp_path / "model.safetensors.index.json").is_file() == ("max_shard_size" in changes)
    mel_BMF = torch.randn(2, whisper.config.num_mel_bins, 240, generator=torch.Generator().manual_seed(0))
    ids_BL = torch.randint(0, model.config.text_vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states_BTD = encoded(model, mel_BMF)
        logits_BLV = model.decoder(ids_BL, states_BTD, torch.tensor([120, 120]))
        expected = whisper(input_features=mel_BMF, decoder_input_ids=ids_BL)
    assert (states_BTD - expected.encoder_last_hidden_state).abs().max() <= 1e-4
    assert (logits_BLV - expected.logits).abs().max() <= 1e-4
    assert expected.logits.std() > 0.1, "a model that answers nothing would pass"


def test_the_whole_path_from_samples_is_whispers(tmp_path: Path) -> None:
    """Features included: a full window, which is what Whisper takes. The codebook is bypassed before its warm-up."""
    model, whisper = started(tmp_path)
    wav_S = tiny_tokenizers.noise(0, 2.4)
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=2.4)
    mel = extractor(wav_S.numpy(), sampling_rate=16000, padding=False, return_tensors="pt").input_features
    with torch.no_grad():
        ours = model(wav_S[None], torch.tensor([len(wav_S)])).states_BTD
        theirs = whisper.model.encoder(mel).last_hidden_state
    assert (ours - theirs).abs().max() <= 1e-4


def test_text_losses_are_whispers_own(tmp_path: Path) -> None:
    """Prompt, text, end of text, with Whisper's own tokenizer; only text and end are scored."""
    model, whisper = started(tmp_path)
    text, end = model.text_tokenizer, model.config.decoder_end
    assert isinstance(text, TextTokenizer)
    special = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    prompt = special.convert_tokens_to_ids(names)
    assert list(model.config.decoder_prompt) == prompt
    rows = [text.encode(" the cat sat"), text.encode(" anna")]
    text_BL = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=IGNORE)
    mel_BMF = torch.randn(2, 20, 240, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss_B = model.decoder.loss(encoded(model, mel_BMF), torch.tensor([120, 120]), text_BL)
        for b, row in enumerate(rows):
            ids = torch.tensor([[*prompt, *row]])
            log_p = whisper(input_features=mel_BMF[b : b + 1], decoder_input_ids=ids).logits[0].log_softmax(-1)
            expected = -sum(log_p[len(prompt) - 1 + i, t] for i, t in enumerate([*row, end]))
            assert loss_B[b].item() == pytest.approx(expected.item(), rel=1e-4)


def test_greedy_reading_is_whispers_generate(tmp_path: Path) -> None:
    model, whisper = started(tmp_path)
    mel_BMF = torch.randn(3, 20, 240, generator=torch.Generator().manual_seed(3))
    prompt = torch.tensor([model.config.decoder_prompt])
    with torch.no_grad():
        rows = model.decoder.greedy(encoded(model, mel_BMF), torch.full((3,), 120))
        for b, row in enumerate(rows):
            ids = prompt
            while ids.shape[1] - prompt.shape[1] < model.config.max_text_ids:
                logits = whisper(input_features=mel_BMF[b : b + 1], decoder_input_ids=ids).logits[0, -1]
                if int(logits.argmax()) == model.config.decoder_end:
                    break
                ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
                if extra := repeated_ids(ids[0, prompt.shape[1] :].tolist()):
                    ids = ids[:, :-extra]
                    break
            assert row == ids[0, prompt.shape[1] :].tolist()
    assert any(rows)


@pytest.mark.parametrize("positions", ["out", "kept"])
def test_a_start_computes_what_whisper_computes(tmp_path: Path, positions: Any) -> None:
    whisper = tiny_tokenizers.whisper(tmp_path)
    model = whisper_start(tmp_path, positions=positions, **AS_WHISPER)
    mel_BMF = torch.randn(2, 20, 240)
    with torch.no_grad():
        theirs_BFD = whisper.model.encoder(mel_BMF).last_hidden_state
        torch.testing.assert_close(encoded(model, mel_BMF), theirs_BFD, atol=1e-5, rtol=1e-4)
        twice = whisper_start(tmp_path, positions="twice", **AS_WHISPER)
        assert (encoded(twice, mel_BMF) - theirs_BFD).abs().max() > 0.1


def test_positions_out_of_the_vectors_return_behind_the_codebook_at_every_pooling(tmp_path: Path) -> None:
    tiny_tokenizers.whisper(tmp_path)
    fields = {**AS_WHISPER, "pooling": 4, "causal": True, "features": "stream"}
    out, kept = (whisper_start(tmp_path, positions=p, **fields) for p in ("out", "kept"))  # type: ignore[arg-type]
    mel_BMF = torch.randn(1, 20, 174)  # the last token has three frames of four
    with torch.no_grad():
        torch.testing.assert_close(encoded(out, mel_BMF), encoded(kept, mel_BMF), atol=1e-5, rtol=1e-4)


def test_a_start_for_training_is_causal_and_keeps_whispers_weights(tmp_path: Path) -> None:
    whisper = tiny_tokenizers.whisper(tmp_path)
    model = whisper_start(tmp_path, layers_below=3, positions="twice")
    config = model.config
    assert (config.pooling, config.codebook_size, config.block_frames, config.max_frames) == (4, 16384, 100, 120)
    assert (config.causal, config.features, config.layers_below, config.layers_above) == (True, "stream", 3, 1)
    assert torch.equal(model.encoder.embed_positions2.weight, whisper.model.encoder.embed_positions.weight[:30])
    theirs, ours = whisper.model.state_dict(), model.state_dict()
    shared = [name for name in theirs if name in ours]
    assert len(shared) == len(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert not model.encoder.embed_positions.weight.requires_grad
    assert model.encoder.conv1.weight.requires_grad


def test_a_start_learns_saves_and_loads(tmp_path: Path) -> None:
    tiny_tokenizers.whisper(tmp_path / "whisper")
    model = whisper_start(tmp_path / "whisper", **RATE | {"codebook_size": 4}, pooling=4, vq_warmup_updates=1).train()
    wav_BS = tiny_tokenizers.noise(1, 2.0)[None]
    assert model.text_tokenizer is not None
    text_BL = torch.tensor([model.text_tokenizer.encode(" the cat")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        result = model(wav_BS, torch.tensor([wav_BS.shape[1]]), text_BL)
        assert result.ctc_B is None  # the paper's loss is the decoder's alone
        result.attention_B.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.attention_B.item())
    assert losses[-1] < losses[0] / 5
    model.eval().save(tmp_path / "run")
    loaded = SupervisedTokenizer.load(tmp_path / "run")
    assert loaded.fingerprint == model.fingerprint
    ids_T = loaded.encode(wav_BS, torch.tensor([wav_BS.shape[1]]))[0][0].numpy()
    assert loaded.read_back([ids_T]) == model.read_back([ids_T])
    assert "cat" in loaded.read_back([ids_T])[0]


def test_english_only_models_have_a_short_prompt(tmp_path: Path) -> None:
    tiny_tokenizers.whisper(tmp_path)
    model = whisper_start(tmp_path, language=None, **RATE)
    assert len(model.config.decoder_prompt) == 2
    assert model.config.max_text_ids == 22


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 64}, "width=64: the checkpoint decides"),
        ({"layers_below": 4}, r"layers_below=4 must lie in 1\.\.3"),
        ({"pooling": 5}, "pooling=5 has no published codebook"),
        ({"language": "xx"}, r"no token '<\|xx\|>'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"max_frames": 1500}, "max_source_positions=120"),
    ],
)
def test_fields_that_cannot_work_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    tiny_tokenizers.whisper(tmp_path)
    with pytest.raises(ValueError, match=message):
        whisper_start(tmp_path, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"decoder_ffn_dim": 32}, "decoder_ffn_dim=32 .* must be 64"),
        ({"decoder_attention_heads": 2}, "decoder_attention_heads=2"),
    ],
)
def test_other_whispers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiny_tokenizers.whisper(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        whisper_start(tmp_path)


def test_folders_without_weights_or_tokenizer_say_so(tmp_path: Path) -> None:
    whisper = tiny_tokenizers.whisper(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        whisper_start(tmp_path)
    (tmp_path / "kept.json").rename(tmp_path / "tokenizer.json")
    whisper.model.save_pretrained(tmp_path)  # WhisperModel's names, without "model."
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration"):
        whisper_start(tmp_path)


def test_position_table_is_whispers() -> None:
    whisper = WhisperEncoder(transformers.WhisperConfig(d_model=64, encoder_layers=1, encoder_attention_heads=2))
    ours = EncoderConfig(width=64, num_heads=2, layers_below=1, layers_above=0).build()
    assert (ours.embed_positions.weight - whisper.embed_positions.weight).abs().max() < 1e-6
    assert torch.equal(ours.embed_positions2.weight, ours.embed_positions.weight[:375])
