"""A GGUF file and the transformers Llama that it was written from compute the same; what is not understood is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from speechquilt.model.warm_start import read_base
from speechquilt.pretrained.gguf import convert_llama, in_halves, read_gguf
from tests.foreign_files import as_floats, gguf_llama, write_gguf
from tests.parity.tiny_checkpoints import checkpoint

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "Ġ th", "Ġth e"]
TOKENS = [*SPECIAL, *ALPHABET, "th", "Ġth", "Ġthe"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return checkpoint("llama", vocab_size=len(TOKENS), bos_token_id=1, eos_token_id=2)


def written(path: Path, llama: Any, *, without: str = "", **changes: Any) -> Path:
    """The file, with changed or added metadata (`__` for a dot) and without one key."""
    metadata, tensors = gguf_llama(llama, TOKENS, MERGES)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata.pop(without, None)
    write_gguf(path, metadata, as_floats(tensors))
    return path


@torch.no_grad()
def test_transformers_computes_the_same_from_the_folder(tmp_path: Path, llama: Any) -> None:
    convert_llama(written(tmp_path / "m.gguf", llama), tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids_BT = torch.randint(0, len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(0))
    expected = llama(ids_BT).logits
    torch.testing.assert_close(loaded(ids_BT).logits, expected)
    assert expected.std() > 0.1
    assert loaded.generation_config.eos_token_id == 2
    assert read_base(tmp_path).llama.rope_theta == 500_000.0


def test_a_tied_head_is_said_in_the_config(tmp_path: Path, llama: Any) -> None:
    metadata, tensors = gguf_llama(llama, TOKENS, MERGES)
    del tensors["output.weight"]
    write_gguf(tmp_path / "m.gguf", metadata, as_floats(tensors))
    convert_llama(tmp_path / "m.gguf", tmp_path)
    base = read_base(tmp_path)
    assert base.config["tie_word_embeddings"]
    assert torch.equal(base.head_RD, base.embedding_RD)


def test_the_tokenizer_is_the_files(tmp_path: Path, llama: Any) -> None:
    template = {"tokenizer__chat_template": "{{ messages }}"}
    convert_llama(written(tmp_path / "m.gguf", llama, **template), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>in the 42 houses"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.tokens[:4] == ["<|im_start|>", "i", "n", "Ġthe"]
    assert encoded.tokens[4:7] == ["Ġ", "4", "2"], "digits stand alone"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert loaded(text).input_ids == encoded.ids
    assert loaded.chat_template == "{{ messages }}"


def test_a_quantised_tensor_has_its_shape(tmp_path: Path) -> None:
    """Rows of 64 in Q8_0 with scale 1: what stands in the bytes."""
    values = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
    one = np.frombuffer(np.array(1, "<f2").tobytes(), np.int8)
    blocks = b"".join(one.tobytes() + block.tobytes() for block in values.reshape(-1, 32))
    write_gguf(tmp_path / "m.gguf", {"a": [1.5, 2.5], "b": True}, {"w": (8, (2, 64), blocks)})
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    assert metadata == {"a": [1.5, 2.5], "b": True}
    assert np.array_equal(tensors["w"], values)


def test_pairs_become_halves() -> None:
    rows = np.arange(12).reshape(12, 1)
    assert in_halves(rows, 2).ravel().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general__architecture": "gemma"}, "architecture 'gemma'; give a llama"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn' must be 'none'"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count=4 must be 8"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "tokenizer gpt2/llama-bpe; gpt2 with one of gpt-2, smollm"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer llama/smollm"),
        ({"tokenizer__ggml__tokens": TOKENS[:-1]}, "do not belong together"),
        ({"without": "llama.block_count"}, "no value llama.block_count"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, llama: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert_llama(written(tmp_path / "m.gguf", llama, **changes), tmp_path)


def test_tensors_that_cannot_be_used_are_refused(tmp_path: Path, llama: Any) -> None:
    metadata, tensors = gguf_llama(llama, TOKENS, MERGES)
    floats, path = as_floats(tensors), tmp_path / "m.gguf"
    for extra, said in (
        ({"rope_freqs.weight": (0, (4,), bytes(16))}, "rope_freqs.weight has no place"),
        ({"blk.0.attn_q.bias": (0, (4,), bytes(16))}, "attn_q.bias has no place"),
        ({"w": (12, (256,), bytes(144))}, "quantisation number 12; F32, F16, Q4_0"),
        ({"w": (8, (40,), bytes(34))}, "not made of blocks of 32"),
    ):
        write_gguf(path, metadata, floats | extra)
        with pytest.raises(ValueError, match=said):
            convert_llama(path, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_foreign_and_cut_files_say_so(tmp_path: Path, llama: Any) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match=r"m\.gguf is missing"):
        read_gguf(path)
    for kind, said in (({"magic": b"GGML"}, "does not begin with GGUF"), ({"version": 1}, r"version 1, not one of")):
        write_gguf(path, {}, {}, **kind)
        with pytest.raises(ValueError, match=said):
            read_gguf(path)
    whole = written(path, llama).read_bytes()
    for length in (0, 3, 10, 30, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="does not begin with GGUF" if length < 4 else "cut short"):
            read_gguf(path)
    path.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])  # a first key of 2^64 - 1 bytes
    with pytest.raises(ValueError, match="cut short or of another kind"):
        read_gguf(path)
