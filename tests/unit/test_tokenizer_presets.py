"""Full sizes, built without memory: they are Whisper's, and the path that makes tokens is as large as the paper's."""

import pytest
import torch
import transformers

from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tokenizer.whisper_sizes import RATES, WHISPER, preset


def meta(name: str, frame_rate: float = 12.5) -> SupervisedTokenizer:
    with torch.device("meta"):
        return preset(name, frame_rate).build()


def whisper_parameters(name: str) -> int:
    """Counted by transformers for the published sizes."""
    size = WHISPER[name]
    config = transformers.WhisperConfig(
        vocab_size=size.vocab_size,
        num_mel_bins=size.num_mels,
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.decoder_layers or size.layers,
        encoder_attention_heads=size.num_heads,
        decoder_attention_heads=size.num_heads,
        encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width,
    )
    with torch.device("meta"):
        return transformers.WhisperForConditionalGeneration(config).num_parameters()


@pytest.mark.parametrize("name", WHISPER)
def test_a_preset_is_whisper_of_its_size(name: str) -> None:
    """All but the new parts: second position table, and the decoder's one extra id and its position."""
    model = meta(name)
    extra_rows = 2 * model.config.width
    total = sum(p.numel() for p in model.parameters())
    assert total - model.encoder.embed_positions2.weight.numel() - extra_rows == whisper_parameters(name)


PUBLISHED = {
    "tiny": 39,
    "base": 74,
    "small": 244,
    "medium": 769,
    "large-v2": 1550,
    "large-v3": 1550,
    "large-v3-turbo": 809,
}


@pytest.mark.parametrize("name", WHISPER)
def test_the_sizes_are_the_published_ones(name: str) -> None:
    """Millions of parameters in Whisper's model card, to within 4 %."""
    assert whisper_parameters(name) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.04)


def test_the_paths_that_make_tokens_have_the_papers_size() -> None:
    """Spec 1, 2.1: stem, 16 layers, codebook and second table are 343.6 M numbers at 12.5 Hz."""
    model = meta("large-v3")
    kept = model._encoding_weights() | {
        "codebook": model.quantizer.codebook_KD,
        "table 2": model.encoder.embed_positions2.weight,
    }
    assert sum(tensor.numel() for tensor in kept.values()) == 343_599_360


@pytest.mark.parametrize(("rate", "bits_per_second"), [(50.0, 600), (25.0, 300), (12.5, 175), (6.25, 100)])
def test_frame_rates_have_the_papers_bit_rates(rate: float, bits_per_second: int) -> None:
    model = meta("large-v3", rate)
    assert model.frame_rate == rate
    assert rate * (model.vocab_size - 1).bit_length() == bits_per_second
    assert model.window_samples == pytest.approx(30 * 16000, rel=0.003)
    assert model.lookahead_s <= 2.0
    assert len(model.encoder.embed_positions2.weight) == int(model.window_samples / 16000 * rate)


def test_names_and_rates_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="did you mean large-v3"):
        preset("large-v4")
    with pytest.raises(ValueError, match="frame_rate=10"):
        preset("tiny", 10)
    assert set(RATES) == {50, 25, 12.5, 6.25}
