"""A codebook for an encoder that already hears words: k-means over what it says of the training audio.

Trap: the vectors come from one fixed encoder. Those collected while it still learns are of many encoders, and codes made
from them lie between what it says now.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.files import replacing
from speechquilt.nn.quantize import gather_ranks, kmeans
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed

CODEBOOK = "codebook.safetensors"


def first_codebook(
    model: SupervisedTokenizer, loader: UtteranceLoader, folder: Path, *, vectors: int, passes: int, seed: int
) -> torch.Tensor:
    """Codes `[K, D]` from at least `vectors` vectors of this loader's audio, all ranks' together; kept in `folder`."""
    path = folder / CODEBOOK
    if path.is_file():
        return load_file(path)["codebook"]
    vectors_ND = collect(model, loader, vectors)
    generator = torch.Generator().manual_seed(seed)
    codebook_KD = kmeans(vectors_ND, model.config.codebook_size, generator, passes=passes)
    if distributed.rank() == 0:
        with replacing(path) as file:
            file.write(save({"codebook": codebook_KD.cpu().contiguous()}))
    return codebook_KD


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
