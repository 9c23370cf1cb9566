"""The text-to-token model learns from shards what it would learn from the recordings, and starts from a text model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechquilt.data.feed.spoken_parts import SpokenParts
from speechquilt.recipes import defaults
from speechquilt.stages.train_text_to_token import TextToTokenRecipe, new_model
from speechquilt.stages.training_documents import shard_info, write_spoken
from speechquilt.text_to_token import network
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.vocab import Vocab
from tests.dummies import base_text_tokenizer
from tests.parity.tiny_checkpoints import saved
from tests.unit.test_budget import NUM_SPEECH, TOKENIZER, utterance

VOCAB = Vocab(num_text=TOKENIZER.size, num_speech=NUM_SPEECH)
ITEMS = [utterance(f"u{i}", np.random.default_rng(i)) for i in range(47)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, info = tmp_path_factory.mktemp("spoken"), shard_info(VOCAB, TOKENIZER, "speech-a")
    for name, items in (("a", ITEMS[:30]), ("b", ITEMS[30:])):
        write_spoken(root / name, info, [(item, item.text) for item in items])
    return [root / "a", root / "b"]


def test_folders_are_one_sequence_and_give_the_batches_of_a_list(folders: list[Path]) -> None:
    parts = SpokenParts.open(folders)
    assert [item.id for item in parts] == [item.id for item in ITEMS]
    assert [item.id for item in parts[28:33]] == ["u28", "u29", "u30", "u31", "u32"]
    data = TextToTokenDataConfig(rows=2, row_tokens=400)
    stored, listed = (data.build(items, TOKENIZER, VOCAB) for items in (parts, ITEMS))
    assert stored.state_dict() == listed.state_dict()
    for _ in range(5):
        a, b = stored.next_batch(), listed.next_batch()
        assert torch.equal(a.ids_BT, b.ids_BT)
        assert torch.equal(a.labels_BT, b.labels_BT)


def test_one_in_twenty_is_held_out_and_stays_so(folders: list[Path]) -> None:
    train, held_out = SpokenParts.open(folders).split(20)
    assert (len(train), len(held_out)) == (45, 2)
    assert {item.id for item in train} | {item.id for item in held_out} == {item.id for item in ITEMS}
    assert [i.id for i in SpokenParts.open(folders).split(20)[1]] == [i.id for i in held_out]
    with pytest.raises(ValueError, match=r"1 spoken texts in .* at least two"):
        SpokenParts.open(folders)[:1].split(20)


@torch.no_grad()
def test_a_warm_start_has_the_bases_weights_and_rows_for_speech(tmp_path: Path) -> None:
    texts = base_text_tokenizer(["the cat sat on the mat"], vocab_size=270)
    base, theirs = saved(tmp_path, "qwen3", vocab_size=texts.size, bos_token_id=1, eos_token_id=1)
    texts.save(base / "tokenizer.json")
    recipe: TextToTokenRecipe = replace(defaults.TEXT_TO_TOKEN, warm_start=str(base), bos_token="<|endoftext|>")
    config = network.TextToTokenConfig(num_text=texts.size, num_speech=9, llama=recipe.llama)
    model = new_model(recipe, config, texts)
    assert model.vocab.num_speech == 9
    rows_VD, old_RD = model.model.embed_tokens.weight, theirs.model.embed_tokens.weight
    assert torch.equal(rows_VD[: texts.size], old_RD)
    assert torch.equal(rows_VD[model.vocab.bos], old_RD[0])
    assert torch.equal(rows_VD[model.vocab.eos], old_RD[1])
    ids = texts.encode("the cat sat")
    state, ours = model.init_state(1, len(ids)), []
    ones_B = torch.ones(1, dtype=torch.bool)
    for i in ids:
        logits_BV, state = model.step(torch.tensor([i]), ones_B, ones_B, state)
        ours.append(logits_BV[0, 2 : texts.size])  # the row of <|im_start|>, its EOS, went to EOS
    torch.testing.assert_close(torch.stack(ours), theirs(torch.tensor([ids])).logits[0, :, 2:], atol=1e-4, rtol=0)
    network.save(tmp_path / "model", model, texts, "speech")
    assert network.load(tmp_path / "model").model.config.llama.qk_norm
    with pytest.raises(ValueError, match="bos_token='<s>' names a token of a base"):
        replace(defaults.TEXT_TO_TOKEN, bos_token="<s>")
    with pytest.raises(ValueError, match="made with the base's own"):
        new_model(recipe, config, TOKENIZER)
