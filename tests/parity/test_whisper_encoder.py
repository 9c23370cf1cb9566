"""Without causality and codebook, the encoder is transformers' WhisperEncoder."""

import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechquilt.tokenizer.encoder import EncoderConfig


def test_equals_whisper_encoder() -> None:
    whisper = WhisperEncoder(
        WhisperConfig(
            num_mel_bins=20,
            d_model=32,
            encoder_layers=4,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            max_source_positions=60,
            dropout=0.0,
        )
    ).eval()
    for p in whisper.parameters():  # biases and norms too: nothing may stay at its neutral value
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    ours = EncoderConfig(
        num_mels=20, width=32, num_heads=4, ffn_width=64, layers_below=2, layers_above=2, pooling=1, max_frames=60,
        causal=False,
    ).build().eval()  # fmt: skip
    missing, unexpected = ours.load_state_dict(whisper.state_dict(), strict=False)
    assert (missing, unexpected) == (["embed_positions2.weight"], [])
    torch.nn.init.zeros_(ours.embed_positions2.weight)
    mel_BMF = torch.randn(2, 20, 120, generator=torch.Generator().manual_seed(0))
    num_frames_B = torch.tensor([60, 60])
    with torch.no_grad():
        lower_BFD, _ = ours.lower(ours.stem(mel_BMF), num_frames_B)
        result = ours.upper(lower_BFD, num_frames_B)
        expected = whisper(mel_BMF).last_hidden_state
    assert (result - expected).abs().max() <= 1e-4


def test_position_table_is_whispers() -> None:
    whisper = WhisperEncoder(WhisperConfig(d_model=64, encoder_layers=1, encoder_attention_heads=2))
    ours = EncoderConfig(width=64, num_heads=2, layers_below=1, layers_above=0).build()
    assert (ours.embed_positions.weight - whisper.embed_positions.weight).abs().max() < 1e-6
    assert torch.equal(ours.embed_positions2.weight, ours.embed_positions.weight[:375])
