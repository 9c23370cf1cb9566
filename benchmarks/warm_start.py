"""Does a warm start keep what the base knows? Nats per text token of a Hugging Face base alone and in our layout, with and
without the marker before text that opens a document.

    python benchmarks/warm_start.py BASE TEXTS [--bos '<|endoftext|>'] [--documents 12] [--num-speech 16384]

BASE: folder of a Llama, Qwen2 or Qwen3 with its tokenizer.json; TEXTS: folder or file of plain text.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from speechquilt.data.sources.text_files import read_texts
from speechquilt.model.warm_start import Ends, plain_from_hugging_face
from speechquilt.text import TextTokenizer
from speechquilt.types import IGNORE, Batch, Document, Segment, TextDocument
from speechquilt.vocab import Vocab

MOST_TOKENS = 512  # of a document


def nats_of_base(model: torch.nn.Module, bos: int, documents: list[list[int]]) -> float:
    """Behind the base's own BOS; the first token of a document is left out, as everywhere here."""
    return sum(_nats(model(torch.tensor([[bos, *ids]])).logits, [bos, *ids], first=2) for ids in documents)


def nats_in_layout(model: torch.nn.Module, vocab: Vocab, documents: list[list[int]]) -> float:
    total = 0.0
    for ids in documents:
        segment = Segment(modality="text", ids_T=np.asarray(ids, dtype=np.int32))
        laid_out = vocab.lay_out(Document(id="x", source="text", segments=(segment,)))
        ids_BT = torch.from_numpy(laid_out.ids_T)[None]
        batch = Batch(ids_BT=ids_BT, labels_BT=torch.full_like(ids_BT, IGNORE), doc_BT=torch.zeros_like(ids_BT))
        row = laid_out.ids_T[:-1].tolist()  # the base has seen no end either
        total += _nats(model(batch)[:, : len(row)], row, first=len(row) - len(ids) + 1)
    return total


def _nats(logits_BTV: torch.Tensor, ids: list[int], first: int) -> float:
    """Of the tokens from number `first` on."""
    log_p = logits_BTV[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return -float(log_p[first - 1 :].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("texts")
    parser.add_argument("--bos", default="<|endoftext|>", help="token of the base that stands between documents")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--num-speech", type=int, default=16_384)
    arguments = parser.parse_args()
    tokenizer = TextTokenizer.load(arguments.base / "tokenizer.json")
    texts = (t.text for t in read_texts(arguments.texts) if isinstance(t, TextDocument))
    documents = [tokenizer.encode(text)[:MOST_TOKENS] for text in islice(texts, arguments.documents)]
    num_tokens = sum(len(ids) - 1 for ids in documents)
    (bos,) = tokenizer.encode(arguments.bos)
    with torch.no_grad():
        base = nats_of_base(AutoModelForCausalLM.from_pretrained(arguments.base).eval(), bos, documents) / num_tokens
        print(f"base alone                     {base:.4f} nats per token, {num_tokens} tokens")
        for marker, name in ((False, "without the opening marker"), (True, "with it")):
            vocab = Vocab(num_text=tokenizer.size, num_speech=arguments.num_speech, opening_marker=marker)
            ends = Ends(bos=arguments.bos, eos=arguments.bos)
            model = plain_from_hugging_face(arguments.base, vocab, ends=ends).eval()
            ours = nats_in_layout(model, vocab, documents) / num_tokens
            print(f"{name:<31}{ours:.4f} ({ours - base:+.4f})")


if __name__ == "__main__":
    main()
