"""Stage 3: train the text-to-token model and let the tokenizer's ASR head read its tokens back.

Place in the pipeline: layer 4, after the tokenizer. Cost of the default: about 2 minutes on two cores.
Trap: interleaving asks for spans, so spans are measured by length class, not only whole sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.evals.wer import wer
from speechquilt.nn.llama import LlamaConfig
from speechquilt.recipes.speech import text_tokenizer_of, tokenize
from speechquilt.text import spoken_form
from speechquilt.text_to_token import model as models
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.tokenizer.model import SpeechTokenizer
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import Utterance

SPAN_CLASSES = {"1_3": (1, 3), "4_9": (4, 9), "10_plus": (10, 15)}  # words, spec 1 section 4


@dataclass(frozen=True, kw_only=True)
class TextToTokenRecipe:
    """Sizes of the stack, the rows it trains on, the run, and how spans are sampled."""

    llama: LlamaConfig
    data: TextToTokenDataConfig
    train: TrainConfig
    engine: EngineConfig


def train_text_to_token(
    recipe: TextToTokenRecipe,
    tokenizer: SpeechTokenizer,
    train: Sequence[Utterance],
    held_out: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Train, save to `folder` as a Hugging Face Llama, return flat results (`text_to_token.*`).

    Utterances without word times are left out where there are others: the model is cued word by word, or, when no
    utterance has word times, by whole texts.
    """
    text_tokenizer = text_tokenizer_of(tokenizer)
    aligned = [u for u in train if u.alignment]
    if 0 < len(aligned) < len(train):
        print(f"text-to-token: {len(train) - len(aligned)} of {len(train)} utterances have no word times, left out")
    config = models.TextToTokenConfig(
        num_text=text_tokenizer.size,
        num_speech=tokenizer.vocab_size,
        llama=recipe.llama,
        cue="word" if aligned else "text",
    )
    model = config.build(recipe.train.seed)
    loader = recipe.data.build(tokenize(tokenizer, aligned or train), text_tokenizer, model.vocab)
    Trainer(recipe.train, model, NextTokenObjective(model.vocab), loader, folder, name="text-to-token").train()
    models.save(folder, model.eval().to("cpu"), text_tokenizer, tokenizer.fingerprint)
    engine = recipe.engine.build(model, text_tokenizer)
    return {
        "text_to_token.steps": recipe.train.steps,
        "text_to_token.parameters": sum(p.numel() for p in model.parameters()),
        **measure_text_to_token(engine, tokenizer, held_out),
    }


def measure_text_to_token(
    engine: TextToTokenEngine, tokenizer: SpeechTokenizer, held_out: Sequence[str]
) -> dict[str, Any]:
    """Word error rates of generated tokens: held-out sentences, and spans of running held-out text by length.

    A rejected text counts as silence, so every one of its words is an error.
    """
    rng = np.random.default_rng(0)
    words = " ".join(map(spoken_form, held_out)).split()
    classes = {"wer": list(held_out)}
    for name, (low, high) in {**SPAN_CLASSES, "1_10": (1, 10)}.items():
        if len(words) > high:
            classes[f"wer_spans_{name}"] = [_span(words, low, high, rng) for _ in held_out]
    results: dict[str, Any] = {"text_to_token.n": len(held_out)}
    for name, texts in classes.items():
        spans = engine.generate(texts, range(len(texts)))
        heard = tokenizer.read_back([span.ids_T[: 0 if span.reject else None] for span in spans])
        results[f"text_to_token.{name}"] = wer(zip(texts, heard)).rate
    results["text_to_token.rejected"] = sum(engine.stats.rejects.values()) / engine.stats.texts
    return results


def _span(words: Sequence[str], low: int, high: int, rng: np.random.Generator) -> str:
    length = int(rng.integers(low, high + 1))
    start = int(rng.integers(0, len(words) - length + 1))
    return " ".join(words[start : start + length])
