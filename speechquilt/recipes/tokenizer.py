"""Stage 2: train the speech tokenizer as an ASR model and measure it on held-out sentences.

Place in the pipeline: layer 4. Cost of the default: about 4 minutes on two cores; expected word error rate: docs/results.md.
Trap: what is measured is the *tokens*: held-out audio is encoded to ids, and the ids alone are read back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.utterances import UtteranceLoader
from speechquilt.evals.wer import wer
from speechquilt.recipes.speech import encode_all
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.model import SpeechTokenizer, SpeechTokenizerConfig
from speechquilt.train.objectives.asr import asr_objective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import Utterance

STREAM_CHUNKS = (1, 37, 160, 1111, 5000)  # samples per call when streaming is compared with offline, in turn
STREAMED = 20  # held-out utterances that are streamed


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """`model.text_vocab_size` is the most ids the text tokenizer may have; it gets fewer when the text needs fewer. The
    first `sorted_epochs` go from short to long recordings.
    """

    model: SpeechTokenizerConfig
    train: TrainConfig
    batch_seconds: float = 60.0
    gain_db: float = 3.0
    sorted_epochs: int = 1


def train_tokenizer(
    recipe: TokenizerRecipe,
    text_tokenizer: TextTokenizer,
    train: Sequence[Utterance],
    held_out: Sequence[Utterance],
    folder: Path,
) -> dict[str, Any]:
    """Train, save to `folder`, return flat results (`tokenizer.*`)."""
    model = replace(recipe.model, text_vocab_size=text_tokenizer.size).build(text_tokenizer)
    loader = UtteranceLoader(
        train,
        text_tokenizer,
        batch_seconds=recipe.batch_seconds,
        seed=recipe.train.seed,
        gain_db=recipe.gain_db,
        sorted_epochs=recipe.sorted_epochs,
    )
    if loader.rejects:
        print(f"  {len(loader.rejects)} recordings left out: {loader.reject_summary()}")
    Trainer(recipe.train, model, asr_objective, loader, folder, name="tokenizer").train()
    model.eval().to("cpu").save(folder)
    return {
        "tokenizer.steps": recipe.train.steps,
        "tokenizer.parameters": sum(p.numel() for p in model.parameters()),
        **measure_tokenizer(model, held_out),
    }


def measure_tokenizer(model: SpeechTokenizer, held_out: Sequence[Utterance]) -> dict[str, Any]:
    """Word error rate of the tokens, use of the codebook, and whether streaming gives the same tokens."""
    waves = [audio.resample(u.audio, model.sample_rate) for u in held_out]
    ids = encode_all(model, waves, what="held-out")
    counts_K = np.bincount(np.concatenate(ids), minlength=model.vocab_size)
    share_K = counts_K[counts_K > 0] / counts_K.sum()
    texts = [u.text for u in held_out]
    return {
        "tokenizer.wer": wer(zip(texts, model.read_back(ids))).rate,
        "tokenizer.wer_n": len(held_out),
        "tokenizer.wer_attention": wer(zip(texts, model.read_back(ids, "attention"))).rate,
        "tokenizer.frame_rate": model.frame_rate,
        "tokenizer.lookahead_s": model.lookahead_s,
        "tokenizer.codebook_size": model.vocab_size,
        "tokenizer.codebook_used": float((counts_K > 0).mean()),
        "tokenizer.perplexity": float(np.exp(-(share_K * np.log(share_K)).sum())),
        "tokenizer.streaming_equals_offline": all(
            np.array_equal(stream(model, wave.samples_S, STREAM_CHUNKS[i % len(STREAM_CHUNKS)]), offline)
            for i, (wave, offline) in enumerate(zip(waves[:STREAMED], ids))
        ),
    }


def stream(model: SpeechTokenizer, samples_S: np.ndarray, chunk: int) -> np.ndarray:
    """The ids of a waveform fed `chunk` samples at a time (never more than 2,000 calls, so the first part is longer)."""
    wav_S = torch.from_numpy(samples_S)
    head = max(0, len(wav_S) - 2000 * chunk)
    state = model.init_state()
    parts = []
    for piece_S in (wav_S[:head], *wav_S[head:].split(chunk)):
        ids_T, state = model.step(piece_S, state)
        parts.append(ids_T)
    ids_T, _ = model.step(wav_S[:0], state, final=True)
    return torch.cat([*parts, ids_T]).numpy()
