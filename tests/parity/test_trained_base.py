"""A warm start keeps a *trained* base's function in the layout that we train on: the loss of a document is the base's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.evals.scorer import Scorer
from speechquilt.model.export import export
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.warm_start import Ends, latent_from_hugging_face, layout_of, plain_from_hugging_face
from speechquilt.nn.llama import LlamaConfig
from speechquilt.types import Batch, Document, Segment
from speechquilt.vocab import Vocab
from tests.dummies import BaseTextTokenizer, base_text_tokenizer

END = "<|endoftext|>"  # between the documents that the base was trained on; its config.json names another BOS
STEPS, ROW = 300, 64
LOCAL = LatentLMConfig(
    vocab_size=0,
    global_=LlamaConfig(width=8, num_layers=1, num_heads=1, num_kv_heads=1, ffn_width=8),
    local_width=24,
    encoder_layers=1,
    decoder_layers=1,
    local_heads=2,
    local_ffn=32,
)


def texts(count: int) -> list[str]:
    world = MicroWorldConfig().build()
    return [story.context for story in world.stories(count, "train")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BaseTextTokenizer]:
    """A Llama of transformers that has learned its small corpus, in the folder that `save_pretrained` makes."""
    folder, corpus = tmp_path_factory.mktemp("base"), texts(200)
    tokenizer = base_text_tokenizer(corpus, vocab_size=400)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=tokenizer.size, bos_token_id=1, eos_token_id=0, **sizes)
    )
    stream_T = torch.tensor([i for text in corpus for i in (0, *tokenizer.encode(text))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(stream_T) - ROW, (8,), generator=generator).tolist()
        ids_BT = torch.stack([stream_T[s : s + ROW] for s in starts])
        loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder, tokenizer


@torch.no_grad()
def base_losses(folder: Path, tokenizer: BaseTextTokenizer, text: str) -> np.ndarray:
    """The base's own, of every token behind the first, its end included."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids_T = torch.tensor([0, *tokenizer.encode(text), 0])
    losses_T = functional.cross_entropy(model(ids_T[None]).logits[0, :-1], ids_T[1:], reduction="none")
    return losses_T[1:].numpy()


@torch.no_grad()
def our_losses(model: torch.nn.Module, vocab: Vocab, tokenizer: BaseTextTokenizer, text: str) -> np.ndarray:
    """Of the laid-out document, every token behind the first token of text."""
    segment = Segment(modality="text", ids_T=np.array(tokenizer.encode(text), dtype=np.int32))
    laid_out = vocab.lay_out(Document(id="x", source="text", segments=(segment,)))
    ids_BT = torch.from_numpy(laid_out.ids_T)[None]
    zeros_BT, ones_BT = torch.zeros_like(ids_BT), torch.ones_like(ids_BT, dtype=torch.bool)
    batch = Batch(ids_BT=ids_BT, labels_BT=zeros_BT, doc_BT=zeros_BT, opens_BT=ones_BT, closes_BT=ones_BT)
    losses_T = functional.cross_entropy(model(batch)[0, :-1], ids_BT[0, 1:], reduction="none")
    return losses_T[-len(segment.ids_T) :].numpy()


@torch.no_grad()
def test_an_export_keeps_the_layout(base: tuple[Path, BaseTextTokenizer], tmp_path: Path) -> None:
    folder, tokenizer = base
    vocab = Vocab(num_text=tokenizer.size, num_speech=9, opening_marker=False)
    model = plain_from_hugging_face(folder, vocab, ends=Ends(bos=END, eos=END)).eval()
    export(model, vocab, tokenizer, tmp_path)
    assert layout_of(tmp_path) == vocab
    assert layout_of(folder) is None
    with pytest.raises(ValueError, match="which has BOS and EOS of its own"):
        plain_from_hugging_face(tmp_path, vocab, ends=Ends(eos=END))
    assert "`<|bos|>the red fox<|speech|>`" in (tmp_path / "README.md").read_text()
    exported = json.loads((tmp_path / "config.json").read_text())["speechquilt"]
    assert exported == {"num_text": vocab.num_text, "num_speech": 9, "opening_marker": False}
    prompt = Segment(modality="text", ids_T=np.array(tokenizer.encode(texts(1)[0])[:8], dtype=np.int32))
    (answer,) = Scorer(model, vocab, None).generate([(prompt,)], "text", max_tokens=12)
    start_T = vocab.lay_out(Document(id="", segments=(prompt,), source="")).ids_T[:-1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    out_T = theirs.generate(torch.from_numpy(start_T)[None], max_new_tokens=12, do_sample=False)[0, len(start_T) :]
    ended = [i for i in out_T.tolist() if i != vocab.eos]
    assert ended == answer.tolist()


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_the_loss_of_a_document_is_the_bases(kind: str, base: tuple[Path, BaseTextTokenizer]) -> None:
    folder, tokenizer = base
    vocab = Vocab(num_text=tokenizer.size, num_speech=tokenizer.size // 3, opening_marker=False)  # as 16,384 to 49,152
    ends = Ends(bos=END, eos=END)
    if kind == "plain":
        model: torch.nn.Module = plain_from_hugging_face(folder, vocab, ends=ends).eval()
    else:
        model = latent_from_hugging_face(folder, vocab, LOCAL, ends=ends).eval()
    ours, theirs, marked = [], [], []
    for text in texts(20):
        theirs += base_losses(folder, tokenizer, text).tolist()
        ours += our_losses(model, vocab, tokenizer, text).tolist()
        marked += our_losses(model, replace(vocab, opening_marker=True), tokenizer, text).tolist()
    assert np.mean(theirs) < 0.5 * np.log(tokenizer.size)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=1e-3)
    assert np.mean(marked) > np.mean(theirs) + 1e-3  # what the marker costs
