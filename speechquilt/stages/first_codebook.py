"""A codebook for an encoder that already hears words: k-means over what it says of the training audio.

Distances may be weighed by what the reader above would lose: `metric_width` directions of the vectors, as sensitive as the
recognition loss is to them. Then codes are not spent on what nobody reads.
Trap: the vectors come from one fixed encoder. Those collected while it still learns are of many encoders, and codes made
from them lie between what it says now.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.files import replacing
from speechquilt.nn.batching import valid_places
from speechquilt.nn.quantize import gather_ranks, kmeans, nearest_codes
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed

CODEBOOK = "codebook.safetensors"
SENSED = 8000  # vectors whose gradients make a metric, at the least
RIDGE = 0.01  # of the mean sensitivity, added in every direction: none is thrown away for want of a gradient


@dataclass(frozen=True)
class FirstCodebook:
    """`codes_KD`, and the map to the space in which distances to them are measured; None: plain distances."""

    codes_KD: torch.Tensor
    metric_DE: torch.Tensor | None


def first_codebook(
    model: SupervisedTokenizer, loader: UtteranceLoader, folder: Path, *, vectors: int, passes: int, seed: int
) -> FirstCodebook:
    """From at least `vectors` vectors of this loader's audio, all ranks' together; kept in `folder`."""
    path = folder / CODEBOOK
    if not path.is_file():
        made = _made(model, loader, vectors=vectors, passes=passes, seed=seed)
        if distributed.rank() > 0:
            return made
        tensors = {"codebook": made.codes_KD} | ({} if made.metric_DE is None else {"metric": made.metric_DE})
        with replacing(path) as file:
            file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    read = load_file(path)
    return FirstCodebook(read["codebook"], read.get("metric"))


def _made(
    model: SupervisedTokenizer, loader: UtteranceLoader, *, vectors: int, passes: int, seed: int
) -> FirstCodebook:
    size, width = model.config.codebook_size, model.config.metric_width
    sensitivity_DD = sensitivity(model, loader) if width else None
    vectors_ND = collect(model, loader, vectors)
    generator = torch.Generator().manual_seed(seed)
    if sensitivity_DD is None:
        return FirstCodebook(kmeans(vectors_ND, size, generator, passes=passes), None)
    metric_DE = metric(sensitivity_DD, vectors_ND, width)
    seen_NE = (vectors_ND - vectors_ND.mean(0)) @ metric_DE
    centres_KE = kmeans(seen_NE, size, generator, passes=passes)
    return FirstCodebook(_means(vectors_ND, seen_NE, centres_KE), metric_DE)


@torch.no_grad()
def collect(model: SupervisedTokenizer, loader: UtteranceLoader, vectors: int) -> torch.Tensor:
    """At least `vectors` of the vectors that reach the bottleneck `[N, D]`, the same on all ranks."""
    model.eval()
    parts, count = [], 0
    with tqdm(
        total=vectors, desc="codebook", unit="vectors", mininterval=5.0, disable=distributed.rank() > 0
    ) as progress:
        while count < vectors:
            batch = loader.next_batch().to(model.device)
            vectors_ND = gather_ranks(model.vectors(batch.wav_BS, batch.num_samples_B))
            parts.append(vectors_ND)
            count += len(vectors_ND)
            progress.update(len(vectors_ND))
    return torch.cat(parts)


def sensitivity(model: SupervisedTokenizer, loader: UtteranceLoader) -> torch.Tensor:
    """Mean outer product `[D, D]` of the recognition loss's gradients at the open bottleneck, over at least `SENSED` vectors
    (the empirical Fisher matrix)."""
    model.eval()
    reached: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, quantized: object) -> None:
        reached.append(quantized.values_BTD)  # type: ignore[attr-defined]

    width = model.config.width
    summed_DD, count = torch.zeros(width, width, device=model.device), 0
    hook = model.quantizer.register_forward_hook(keep)
    try:
        while count < SENSED:
            batch = loader.next_batch().to(model.device)
            encoded = model(batch.wav_BS, batch.num_samples_B, batch.text_BL)
            (gradient_BTD,) = torch.autograd.grad(encoded.attention_B.sum(), reached.pop())
            valid_BT = valid_places(encoded.num_tokens_B, gradient_BTD.shape[1])
            gradient_ND = gather_ranks(gradient_BTD[valid_BT].float())
            summed_DD += gradient_ND.T @ gradient_ND
            count += len(gradient_ND)
    finally:
        hook.remove()
    return summed_DD / count


def metric(sensitivity_DD: torch.Tensor, vectors_ND: torch.Tensor, width: int) -> torch.Tensor:
    """The map `[D, width]` after which a squared distance is the loss's second-order change, in the directions in which
    these vectors differ most so."""
    mean = sensitivity_DD.trace() / len(sensitivity_DD)
    values_D, vectors_DD = torch.linalg.eigh(sensitivity_DD + RIDGE * mean * torch.eye(len(sensitivity_DD)).to(mean))
    root_DD = vectors_DD * values_D.clamp(min=0).sqrt() @ vectors_DD.T
    _, directions_DD = torch.linalg.eigh(root_DD @ torch.cov(vectors_ND.T) @ root_DD)
    return root_DD @ directions_DD[:, -width:]


def _means(vectors_ND: torch.Tensor, seen_NE: torch.Tensor, centres_KE: torch.Tensor) -> torch.Tensor:
    """Of the vectors that are nearest to each centre; a centre that is nearest to none takes the vector nearest to it."""
    ids_N = nearest_codes(seen_NE, centres_KE)
    count_K = torch.bincount(ids_N, minlength=len(centres_KE))
    sum_KD = vectors_ND.new_zeros(len(centres_KE), vectors_ND.shape[1]).index_add_(0, ids_N, vectors_ND)
    means_KD = sum_KD / count_K.clamp(min=1)[:, None]
    if (empty_K := count_K == 0).any():
        means_KD[empty_K] = vectors_ND[nearest_codes(centres_KE[empty_K], seen_NE)]
    return means_KD
