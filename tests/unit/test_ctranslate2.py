"""A model.bin and the transformers Whisper that it was written from compute the same; what is not understood is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from speechquilt.pretrained.ctranslate2 import convert_whisper, read_model, whisper_weights
from speechquilt.tokenizer.whisper import whisper_start
from tests.foreign_files import ct2_folder, ct2_settings, ct2_variables, write_ct2
from tests.parity import tiny_tokenizers

PREVIOUS = "<|startofprev|>"


@pytest.fixture
def whisper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny one, with its tokenizer.json in `tmp_path`."""
    monkeypatch.setattr(tiny_tokenizers, "WHISPER_TOKENS", [*tiny_tokenizers.WHISPER_TOKENS, PREVIOUS])
    model = tiny_tokenizers.whisper(tmp_path)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    return model


def converted(source: Path) -> Path:
    out = source / "out"
    out.mkdir()
    convert_whisper(source, out)
    return out


@torch.no_grad()
def test_transformers_computes_the_same_from_the_folder(tmp_path: Path, whisper: Any) -> None:
    out = converted(ct2_folder(tmp_path, whisper))
    loaded = transformers.WhisperForConditionalGeneration.from_pretrained(out)
    mel_BMF = torch.randn(2, 20, 240, generator=torch.Generator().manual_seed(0))
    ids_BL = torch.randint(0, whisper.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = [model(input_features=mel_BMF, decoder_input_ids=ids_BL).logits for model in (loaded, whisper)]
    torch.testing.assert_close(*logits)
    generation = loaded.generation_config
    assert generation.suppress_tokens == [1, 2]
    assert generation.alignment_heads == [[0, 0]]
    assert generation.decoder_start_token_id == whisper_start(out).config.decoder_prompt[0]
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert processor.feature_extractor.feature_size == 20
    assert processor.tokenizer.decode(processor.tokenizer(" the cat").input_ids, skip_special_tokens=True) == " the cat"


@pytest.mark.parametrize(
    ("kind", "error"), [("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.5 / 127), ("int16", 0.5 / 1024)]
)
def test_every_type_comes_back_as_near_as_it_can(tmp_path: Path, whisper: Any, kind: str, error: float) -> None:
    weights = whisper_weights(read_model(ct2_folder(tmp_path, whisper, kind) / "model.bin"))
    theirs = {f"model.{name}": tensor.numpy() for name, tensor in whisper.model.state_dict().items()}
    assert weights.keys() == theirs.keys()
    for name, array in weights.items():
        assert array.dtype == np.float32
        largest = np.abs(theirs[name]).max(-1, keepdims=True)  # of a row, which has one scale
        allowed = error if kind == "int16" else error * largest
        assert (np.abs(array - theirs[name]) <= 1.01 * allowed + 1e-7).all(), name


def test_a_key_with_a_bias_is_no_whispers(whisper: Any) -> None:
    variables = ct2_variables(whisper)
    variables["decoder/layer_1/attention/linear_1/bias"][:32] = 0.1
    with pytest.raises(ValueError, match="attention/linear_1: the keys have a bias"):
        whisper_weights(variables)


def test_missing_and_unknown_variables_are_named(whisper: Any) -> None:
    variables = ct2_variables(whisper)
    with pytest.raises(ValueError, match=r"encoder/layer_0/gate/weight \(1 such\) is no part"):
        whisper_weights(variables | {"encoder/layer_0/gate/weight": np.zeros((2, 2))})
    del variables["encoder/layer_3/ffn/linear_1/bias"]
    with pytest.raises(ValueError, match="encoder/layer_3/ffn/linear_1/bias is missing"):
        whisper_weights(variables)


def test_another_computation_is_refused(tmp_path: Path, whisper: Any) -> None:
    with pytest.raises(ValueError, match="decoder/activation=1 must be 3"):
        converted(ct2_folder(tmp_path, whisper, **{"decoder/activation": 1}))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, whisper: Any) -> None:
    ct2_folder(tmp_path, whisper)
    settings, variables = ct2_settings(whisper), ct2_variables(whisper)
    variables["decoder/embeddings/weight"] = variables["decoder/embeddings/weight"][:-9]
    write_ct2(tmp_path / "model.bin", {name: ("float32", array) for name, array in variables.items()} | settings)
    with pytest.raises(ValueError, match="they do not belong together"):
        converted(tmp_path)


def test_foreign_and_cut_files_say_so(tmp_path: Path, whisper: Any) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(FileNotFoundError, match=r"model\.bin is missing"):
        read_model(path)
    one = {"a": ("float32", np.zeros((2, 2), np.float32))}
    for kind, said in (
        ({"version": 3}, "begins with version 3"),
        ({"spec": "TransformerSpec"}, "a 'TransformerSpec', not a WhisperSpec"),
        ({"aliases": (("a", "b"),)}, "a stands for b"),
    ):
        write_ct2(path, one, **kind)
        with pytest.raises(ValueError, match=said):
            read_model(path)
    whole = ct2_folder(tmp_path, whisper).joinpath("model.bin").read_bytes()
    for length in (0, 3, 10, 30, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short or of another kind"):
            read_model(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="1 bytes behind its last variable"):
        read_model(path)
    path.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(ValueError, match="begins with version"):
        read_model(path)
