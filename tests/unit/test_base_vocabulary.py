"""A base fits when every text token of the shards has its own id there, whatever else its tokenizer.json says."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from speechquilt.model.base_vocabulary import check_base
from speechquilt.stages.encode import load_text_tokenizer
from speechquilt.text import TextTokenizer

TEXT = TextTokenizer.train(["the cat sat on the mat"], 270)


def changed(folder: Path, change) -> Path:
    """A base whose tokenizer.json is that of `TEXT` after `change`."""
    data = json.loads(TEXT.json)
    change(data)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_more_tokens_templates_and_lengths_change_no_row(tmp_path):
    def more(data):
        data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        data["added_tokens"].append({"id": TEXT.size, "content": "<|speech_0|>", **flags})

    base = changed(tmp_path, more)
    assert Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab_size() == TEXT.size + 1
    check_base(base, TEXT)
    long = "the cat sat on the mat " * 9
    assert len(load_text_tokenizer(base).encode(long)) == len(TEXT.encode(long)) > 4


def test_equal_sizes_with_other_ids_are_refused(tmp_path):
    def swap(data):
        vocab = data["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    base = changed(tmp_path, swap)
    with pytest.raises(ValueError, match=rf"warm_start='{base}': 2 of the {TEXT.size} text tokens .*--text-tokenizer"):
        check_base(base, TEXT)


def test_a_base_that_knows_less_is_refused(tmp_path):
    TextTokenizer.train(["the cat sat on the mat"], 260).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="there unknown"):
        check_base(tmp_path, TEXT)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        check_base(tmp_path, TEXT)
    (tmp_path / "tokenizer.json").write_text(TEXT.json[:-9])
    with pytest.raises(ValueError, match=r"tokenizer\.json is no text tokenizer"):
        check_base(tmp_path, TEXT)
