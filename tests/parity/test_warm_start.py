"""A warm start changes nothing about text: logits equal transformers', in `forward` and in `step`."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechquilt.model import saving
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.warm_start import Ends, latent_from_hugging_face, plain_from_hugging_face, read_base
from speechquilt.nn.llama import LlamaConfig
from speechquilt.text import TextTokenizer
from speechquilt.types import IGNORE, Batch
from speechquilt.vocab import Special, Vocab
from tests.dummies import base_text_tokenizer
from tests.parity.tiny_checkpoints import VARIANTS, VOCAB, saved

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "warm-start.md"
VOCABULARY = Vocab(num_text=VOCAB - 2, num_speech=23)  # the base's table is padded beyond the tokenizer
LOCAL = LatentLMConfig(
    vocab_size=0,
    global_=LlamaConfig(width=8, num_layers=1, num_heads=1, num_kv_heads=1, ffn_width=8),
    local_width=24,
    encoder_layers=1,
    decoder_layers=2,
    local_heads=2,
    local_ffn=32,
)


def warm(kind: str, folder: Path, vocab: Vocab = VOCABULARY, seed: int = 0) -> Any:
    if kind == "plain":
        return plain_from_hugging_face(folder, vocab, seed).eval()
    like = LOCAL if kind == "latent" else replace(LOCAL, local_width=16)  # then to_global is the identity
    return latent_from_hugging_face(folder, vocab, like, seed).eval()


def text_batch(num_rows: int = 2, num_tokens: int = 64) -> Batch:
    ids_BT = torch.randint(0, VOCABULARY.num_text, (num_rows, num_tokens), generator=torch.Generator().manual_seed(2))
    ones_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    zeros_BT = torch.zeros_like(ids_BT)
    return Batch(ids_BT=ids_BT, labels_BT=zeros_BT + IGNORE, doc_BT=zeros_BT, opens_BT=ones_BT, closes_BT=ones_BT)


def stepped(model: Any, batch: Batch) -> Tensor:
    state = model.init_state(*batch.ids_BT.shape)
    ones_B = torch.ones(len(batch.ids_BT), dtype=torch.bool)
    logits = []
    for ids_B in batch.ids_BT.unbind(1):
        logits_BV, state = model.step(ids_B, ones_B, ones_B, state)
        logits.append(logits_BV)
    return torch.stack(logits, 1)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base"), "llama")[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["plain", "latent", "latent_identity"])
@torch.no_grad()
def test_text_logits_are_those_of_the_base(kind: str, variant: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, variant)
    model, batch = warm(kind, folder), text_batch()
    expected = theirs(batch.ids_BT).logits[..., : VOCABULARY.num_text]
    for logits_BTV in (model(batch), stepped(model, batch)):
        torch.testing.assert_close(logits_BTV[..., : VOCABULARY.num_text], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "latent"])
@torch.no_grad()
def test_shards_and_bfloat16_are_read(kind: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "one", "qwen3")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 1
    one, shards = warm(kind, folder).state_dict(), warm(kind, tmp_path / "shards").state_dict()
    prefix = "llama." if kind == "plain" else "global_."
    for name in (n for n in one if n.startswith(prefix)):
        assert shards[name].dtype == torch.float32
        assert torch.equal(shards[name], one[name].bfloat16().float()), name


@torch.no_grad()
def test_known_ids_take_their_rows_and_new_special_ids_the_mean(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "llama")
    plain, latent = warm("plain", folder), warm("latent", folder)
    vocab, tables = VOCABULARY, (theirs.model.embed_tokens.weight, theirs.lm_head.weight)
    for is_head, old_RD, new_VD, short_GD in zip(
        (False, True),
        tables,
        (plain.embedding.weight, plain.head.weight),
        (latent.text_embedding.weight, latent.text_head.weight),
    ):
        assert torch.equal(new_VD[: vocab.num_text], old_RD[: vocab.num_text])
        assert torch.equal(new_VD[vocab.eos], old_RD[49])
        mean_D = old_RD[: vocab.num_text].mean(0)
        if not is_head:
            assert torch.equal(new_VD[vocab.bos], old_RD[48])
        new = [Special.BOS] if is_head else []  # never predicted, so it must not take the probability of another id
        for special in (*new, Special.PAD, Special.TEXT, Special.SPEECH, Special.WORD_END):
            torch.testing.assert_close(new_VD[vocab.special(special)], mean_D)
        assert torch.equal(short_GD, new_VD[: vocab.speech_start])


@pytest.mark.parametrize(("eos", "row"), [([49, 3], 49), (3, 3), (None, None)])
def test_the_bases_eos_may_be_one_of_several_or_missing(eos: Any, row: int | None, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    old_RD = theirs.model.embed_tokens.weight.detach()
    expected_D = old_RD[: VOCABULARY.num_text].mean(0) if row is None else old_RD[row]
    torch.testing.assert_close(warm("plain", folder).embedding.weight[VOCABULARY.eos].detach(), expected_D)


@torch.no_grad()
def test_a_text_token_that_ends_documents_gives_its_head_row_to_eos(tmp_path: Path) -> None:
    """As SmolLM2's <|endoftext|>, which is BOS and EOS at once: its probability must not be there three times."""
    folder, theirs = saved(tmp_path, "llama")
    base_text_tokenizer([], vocab_size=0, specials=[f"<{i}>" for i in range(48)]).save(folder / "tokenizer.json")
    model = plain_from_hugging_face(folder, VOCABULARY, ends=Ends(bos="<3>", eos="<3>"))
    vocab, old_RD = VOCABULARY, theirs.lm_head.weight
    for special in (vocab.bos, vocab.eos):
        assert torch.equal(model.embedding.weight[special], theirs.model.embed_tokens.weight[3])
    assert torch.equal(model.head.weight[vocab.eos], old_RD[3])
    mean_D = old_RD[: vocab.num_text].mean(0)
    torch.testing.assert_close(model.head.weight[vocab.bos], mean_D)
    torch.testing.assert_close(model.head.weight[3], mean_D)
    others = [i for i in range(vocab.num_text) if i != 3]
    assert torch.equal(model.head.weight[others], old_RD[others])


def test_a_token_that_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llama")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        plain_from_hugging_face(folder, VOCABULARY, ends=Ends(bos="<end>"))
    base_text_tokenizer([], vocab_size=0, specials=["<|end|>"]).save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"eos_token='<\|ende\|>' is no token of .*; did you mean <\|end\|>\?"):
        plain_from_hugging_face(folder, VOCABULARY, ends=Ends(eos="<|ende|>"))


@torch.no_grad()
def test_new_speech_rows_look_like_the_bases_rows_and_follow_the_seed(llama_folder: Path) -> None:
    vocab = Vocab(num_text=VOCABULARY.num_text, num_speech=4000)
    model = warm("plain", llama_folder, vocab)
    base = read_base(llama_folder)
    for old_RD, new_VD, spread in (
        (base.embedding_RD, model.embedding.weight, 1.0),
        (base.head_RD, model.head.weight, 0.02),
    ):
        old_ND, new_ND = old_RD[: vocab.num_text], new_VD[vocab.speech_start :]
        std_D = old_ND.std(0, correction=0)
        torch.testing.assert_close(new_ND.std(0), spread * std_D, rtol=0.1, atol=0)
        assert ((new_ND.mean(0) - old_ND.mean(0)).abs() < 5 * spread * std_D / math.sqrt(4000)).all()
    again, other = warm("plain", llama_folder, vocab), warm("plain", llama_folder, vocab, seed=1)
    assert torch.equal(again.embedding.weight, model.embedding.weight)
    assert torch.equal(again.head.weight, model.head.weight)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


@given(num_speech=st.integers(1, 300), seed=st.integers(0, 3))
@torch.no_grad()
def test_new_ids_take_no_more_than_their_share_of_probability(llama_folder: Path, num_speech: int, seed: int) -> None:
    """Jensen: exp(mean logit) <= mean exp(logit), so n rows that are the mean get at most n / (n + num_text)."""
    vocab = Vocab(num_text=VOCABULARY.num_text, num_speech=num_speech)
    model = warm("plain", llama_folder, vocab, seed)
    probs_BTV = model(text_batch(num_tokens=32)).softmax(-1)
    known = probs_BTV[..., : vocab.num_text].sum(-1) + probs_BTV[..., [vocab.bos, vocab.eos]].sum(-1)
    n = vocab.size - vocab.num_text - 2
    assert float((1 - known).max()) <= 1.1 * n / (n + vocab.num_text)  # a tenth for the noise


@pytest.mark.parametrize("kind", ["latent", "latent_identity"])
@torch.no_grad()
def test_speech_units_enter_the_global_transformer_as_large_as_text(kind: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 0.05
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = warm(kind, folder)
    assert isinstance(model, LatentLM)
    rms = inputs_rms(model)
    assert rms["speech"] == pytest.approx(rms["text"], rel=0.25)


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_every_weight_learns_and_tied_tables_become_two(kind: str, tmp_path: Path) -> None:
    model, batch, vocab = warm(kind, saved(tmp_path, "llama31_tied")[0]), text_batch(num_tokens=16), VOCABULARY
    ids_BT = batch.ids_BT.clone()
    ids_BT[:, 4] = vocab.marker("speech")
    ids_BT[:, 5:12] = vocab.speech_start + torch.arange(7)
    ids_BT[:, 12] = vocab.marker("text")
    labels_BT = ids_BT.roll(-1, 1)
    labels_BT[:, -1] = IGNORE
    opens_BT, closes_BT = torch.ones_like(ids_BT, dtype=torch.bool), torch.ones_like(ids_BT, dtype=torch.bool)
    opens_BT[:, [6, 8, 10]] = closes_BT[:, [5, 7, 9, 11]] = False  # patches of two and a short one
    logits_BTV = model(replace(batch, ids_BT=ids_BT, opens_BT=opens_BT, closes_BT=closes_BT))
    torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name
    tables = (model.embedding, model.head) if kind == "plain" else (model.text_embedding, model.text_head)
    assert tables[0].weight.data_ptr() != tables[1].weight.data_ptr()


def test_the_page_that_explains_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer.train(["the red fox"], 300)
    saved(tmp_path / "base", "qwen2", vocab_size=tokenizer.size)
    tokenizer.save(tmp_path / "base" / "tokenizer.json")
    code = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(), flags=re.M | re.S)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(HOW_TO), "exec"), {})
    for kind in ("plain", "latent"):
        assert (
            saving.load(tmp_path / "warm" / kind).config.vocab_size
            == Vocab(num_text=tokenizer.size, num_speech=512).size
        )


def inputs_rms(model: LatentLM) -> dict[str, float]:
    """RMS of what the global transformer reads in a text and in a speech document."""
    seen: list[Tensor] = []
    hook = model.global_.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch, vocab = text_batch(), VOCABULARY
    opens_BT = torch.zeros_like(batch.ids_BT, dtype=torch.bool)
    opens_BT[:, ::4] = True
    speech_BT = vocab.speech_start + batch.ids_BT % vocab.num_speech
    model(batch)
    model(replace(batch, ids_BT=speech_BT, opens_BT=opens_BT, closes_BT=opens_BT.roll(-1, 1)))
    hook.remove()
    return {name: float(x.square().mean().sqrt()) for name, x in zip(("text", "speech"), seen)}


def test_a_vocabulary_larger_than_the_base_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="num_text=51 must be at most the 50 text ids"):
        warm("plain", llama_folder, Vocab(num_text=51, num_speech=3))


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llama")
    path = folder / "model.safetensors"
    good = load_file(path)
    norm = "model.norm.weight"

    for weights, said in (
        ({k: v for k, v in good.items() if k != norm}, rf"lack {norm} \(1 such\)"),
        (good | {"model.norm.bias": torch.zeros(32)}, r"unknown tensor model\.norm\.bias"),
        (good | {norm: torch.zeros(31)}, rf"{norm} in .* has shape \(31,\), config.json means \(32,\)"),
    ):
        save_file(weights, path)
        with pytest.raises(ValueError, match=said):
            read_base(folder)
    save_file(good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path)
    read_base(folder)  # of old checkpoints, harmless
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_base(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin but no model.safetensors: pickled weights"):
        read_base(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        read_base(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {norm: "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors is missing"):
        read_base(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_base(folder)
