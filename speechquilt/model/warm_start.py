"""Start from a text model: a Hugging Face Llama, Qwen2 or Qwen3 folder becomes a plain or a latent speech-text model.

It reads config.json and safetensors (one file, or shards with their index), nothing that runs code. Before any training
the logits of text ids after text ids are the original's (docs/decisions/0008-warm-start.md).
Trap: text ids are the base model's own, so the vocabulary must be made with the base's tokenizer. Here only the number
of rows is checked; `base_vocabulary` compares the ids.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from speechquilt.config import from_dict, nearest
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.nn.attention import causal_mask
from speechquilt.nn.hub import local_folder
from speechquilt.nn.hugging_face import (
    BODY,
    EMBEDDING,
    HEAD,
    LAYOUT_KEY,
    llama_config,
    read_json,
    read_weights,
    weight_files,
)
from speechquilt.nn.llama import LlamaConfig, LlamaStack
from speechquilt.vocab import Special, Vocab

TOKENIZER = "tokenizer.json"
EMBEDDING_SPREAD, HEAD_SPREAD = 1.0, 0.02  # of new speech rows, in standard deviations of the base's rows
PROBES = 256  # random patches on which the scale of a unit vector is measured


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Which tokens of the base stand for BOS and EOS, as its tokenizer.json writes them; "" = those of its config.json."""

    bos: str = ""
    eos: str = ""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A text model in memory, float32. `stack`: weights of `LlamaStack`; `embedding_RD`, `head_RD`: a row per id of the
    base."""

    folder: Path
    config: dict[str, Any]
    llama: LlamaConfig
    stack: dict[str, Tensor]
    embedding_RD: Tensor
    head_RD: Tensor


def plain_from_hugging_face(folder: Path, vocab: Vocab, seed: int = 0, ends: Ends = Ends()) -> PlainLM:
    """The base with rows for the special and speech ids; text logits unchanged (spec 1, 6.3).

    A folder that `export` wrote for the same vocabulary gives back all of its rows. `seed` draws the new ones. Raises
    FileNotFoundError or ValueError naming the file or key, the rule and the remedy.
    """
    base = read_base(folder)
    rows = _vocabulary_rows(base, vocab, seed, ends)
    with torch.device("meta"):
        model = PlainLM(PlainLMConfig(vocab_size=vocab.size, llama=base.llama))
    weights = {f"llama.{name}": tensor for name, tensor in base.stack.items()}
    model.load_state_dict(weights | {"embedding.weight": rows.embedding_VD, "head.weight": rows.head_VD}, assign=True)
    return model


def latent_from_hugging_face(
    folder: Path, vocab: Vocab, like: LatentLMConfig, seed: int = 0, ends: Ends = Ends()
) -> LatentLM:
    """The base as the global transformer of a latent model whose text bypasses the local modules.

    `like` gives the sizes of the local modules (a preset will do); its global transformer, vocabulary and text path are
    replaced. The local modules are new, drawn with `seed`, and speech units enter the global transformer as large as
    the base's text embeddings. Raises as `plain_from_hugging_face`.
    """
    base = read_base(folder)
    rows = _vocabulary_rows(base, vocab, seed, ends)
    model = replace(like, global_=base.llama, text_path="bypass").for_vocab(vocab).build(seed)
    model.global_.load_state_dict(base.stack, assign=True)
    num_global_ids = model.config.num_global_ids
    with torch.no_grad():
        model.text_embedding.weight.copy_(rows.embedding_VD[:num_global_ids])
        model.text_head.weight.copy_(rows.head_VD[:num_global_ids])
        _match_scale(model, float(base.embedding_RD[: vocab.num_text].square().mean().sqrt()), seed)
    return model


def read_base(folder: Path) -> Base:
    """Read config and weights. Raises FileNotFoundError or ValueError saying what of the folder does not fit."""
    folder = local_folder(folder)
    config = read_json(folder / "config.json")
    llama = llama_config(config)
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= {name: tensor.float() for name, tensor in read_weights(path).items()}
    if config.get("tie_word_embeddings") and EMBEDDING in weights:
        weights[HEAD] = weights[EMBEDDING]
    _check_weights(folder, llama, weights)
    embedding_RD, head_RD = weights.pop(EMBEDDING), weights.pop(HEAD)
    stack = {name.removeprefix(BODY): tensor for name, tensor in weights.items() if not _is_buffer(name)}
    return Base(folder=folder, config=config, llama=llama, stack=stack, embedding_RD=embedding_RD, head_RD=head_RD)


def _check_weights(folder: Path, llama: LlamaConfig, weights: dict[str, Tensor]) -> None:
    """Names and shapes must be those of the stack that config.json describes, or ValueError."""
    with torch.device("meta"):
        expected = {BODY + name: tensor.shape for name, tensor in LlamaStack(llama).state_dict().items()}
    missing = sorted((expected.keys() | {EMBEDDING, HEAD}) - weights.keys())
    extra = sorted(name for name in weights.keys() - expected.keys() - {EMBEDDING, HEAD} if not _is_buffer(name))
    for what, names in (("lack", missing), ("have the unknown tensor", extra)):
        if names:
            raise ValueError(
                f"the weights in {folder} {what} {names[0]} ({len(names)} such); they do not belong to its config.json, "
                "download the folder again"
            )
    rows = weights[EMBEDDING].shape[0]
    expected |= {EMBEDDING: torch.Size((rows, llama.width)), HEAD: torch.Size((rows, llama.width))}
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{name} in {folder} has shape {tuple(weights[name].shape)}, config.json means {tuple(shape)}; "
                "they do not belong together, download the folder again"
            )


def _is_buffer(name: str) -> bool:
    """Old checkpoints carry RoPE's frequencies, which the config says anyway."""
    return name.endswith("rotary_emb.inv_freq")


@dataclass(frozen=True, kw_only=True)
class _Rows:
    embedding_VD: Tensor
    head_VD: Tensor


def layout_of(folder: Path) -> Vocab | None:
    """The layout of a folder that we exported; None of any other base."""
    layout = read_json(local_folder(folder) / "config.json").get(LAYOUT_KEY)
    return from_dict(Vocab, layout) if layout else None


def _vocabulary_rows(base: Base, vocab: Vocab, seed: int, ends: Ends) -> _Rows:
    """Embedding and head rows for every id of `vocab`: the base's where it has one, else new ones."""
    read_V, written_V = _source_rows(base, vocab, ends)
    generator = torch.Generator().manual_seed(seed)
    return _Rows(
        embedding_VD=_extended(base.embedding_RD, read_V, vocab, EMBEDDING_SPREAD, generator),
        head_VD=_extended(base.head_RD, written_V, vocab, HEAD_SPREAD, generator),
    )


def _source_rows(base: Base, vocab: Vocab, ends: Ends) -> tuple[Tensor, Tensor]:
    """For every id of `vocab` the rows of the base that it takes over in embedding and head, -1 = none: int64 `[V]`.

    No row of the base's head is taken twice, or its token would count double: BOS is never predicted, and EOS takes the
    place of the text id that ended the base's documents.
    """
    before = layout_of(base.folder)
    num_rows = before.num_text if before else len(base.embedding_RD)
    if num_rows < vocab.num_text:
        raise ValueError(
            f"num_text={vocab.num_text} must be at most the {num_rows} text ids of the base; text must be tokenized with "
            "the base's own tokenizer, make the shards with it"
        )
    if before and (ends.bos or ends.eos):
        raise ValueError(
            f"bos_token={ends.bos!r} and eos_token={ends.eos!r} with {base.folder}, which has BOS and EOS of its own since it was "
            "exported by speechquilt; leave them out"
        )
    if before and (before.num_text, before.num_speech) == (vocab.num_text, vocab.num_speech):
        return torch.arange(vocab.size), torch.arange(vocab.size)
    read_V = torch.full((vocab.size,), -1)
    read_V[: vocab.num_text] = torch.arange(vocab.num_text)
    if before:
        for special in Special:
            read_V[vocab.special(special)] = before.special(special)
        return read_V, read_V
    written_V = read_V.clone()
    bos, eos = _base_special(base, Special.BOS, ends.bos), _base_special(base, Special.EOS, ends.eos)
    read_V[vocab.bos], read_V[vocab.eos], written_V[vocab.eos] = bos, eos, eos
    if 0 <= eos < vocab.num_text:
        written_V[eos] = -1
    return read_V, written_V


def _base_special(base: Base, special: Special, name: str) -> int:
    """Row of the base's token `name`, or of its own BOS or EOS (the first, where it has several), -1 when it has none."""
    if name:
        return _row_of(base, special, name)
    row = base.config.get(f"{special.name.lower()}_token_id")
    if isinstance(row, list):
        row = row[0] if row else None
    return row if row is not None and 0 <= row < len(base.embedding_RD) else -1


def _row_of(base: Base, special: Special, name: str) -> int:
    vocabulary = Tokenizer.from_str(json.dumps(read_json(base.folder / TOKENIZER))).get_vocab()
    row = vocabulary.get(name, -1)
    if not 0 <= row < len(base.embedding_RD):
        raise ValueError(
            f"{special.name.lower()}_token={name!r} is no token of {base.folder / TOKENIZER}; "
            f"{nearest(name, [token for token in vocabulary if token.startswith('<')])}"
        )
    return row


def _extended(old_RD: Tensor, source_V: Tensor, vocab: Vocab, spread: float, generator: torch.Generator) -> Tensor:
    """`[V, D]`: old rows where `source_V` names one; else their mean, for ids after the specials with noise of
    `spread`."""
    text_ND = old_RD[: vocab.num_text]
    mean_D, std_D = text_ND.mean(0), text_ND.std(0, correction=0)
    new_VD = mean_D.repeat(vocab.size, 1)
    noise_ND = torch.randn(vocab.size - vocab.speech_start, old_RD.shape[1], generator=generator)
    new_VD[vocab.speech_start :] += spread * std_D * noise_ND
    known_V = source_V >= 0
    new_VD[known_V] = old_RD[source_V[known_V]]
    return new_VD


def _match_scale(model: LatentLM, rms: float, seed: int) -> None:
    """Scale what turns patches into unit vectors, so that random patches enter the global transformer with this RMS.

    New local modules give vectors of order one and pretrained embeddings are far smaller: what the base's blocks add to
    the residual stream would drown.
    """
    patch_length = 4
    generator = torch.Generator().manual_seed(seed)
    first, count = model.config.num_global_ids - model.config.first_local_id, model.embedding.num_embeddings
    ids_NP = torch.randint(first, count, (PROBES, patch_length), generator=generator)
    x_NPD, doc_NP = model.embedding(ids_NP), torch.zeros_like(ids_NP)
    rope = model.local.rope(torch.arange(patch_length)[None])
    for block in model.encoder:
        x_NPD = block(x_NPD, causal_mask(doc_NP), rope)
    unit_ND = model.to_global(model.unit_encoder.over(x_NPD, torch.ones_like(doc_NP, dtype=torch.bool)))
    scale = rms / float(unit_ND.square().mean().sqrt())
    last = [model.to_global] if isinstance(model.to_global, torch.nn.Linear) else []
    for linear in last or [model.unit_encoder.to_queries, model.unit_encoder.cross.o_proj]:
        linear.weight.mul_(scale)
