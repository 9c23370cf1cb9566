"""Stage 3: train the text-to-token model and let the tokenizer's ASR head read its tokens back.

Cost of the default: about 2 minutes on two cores.
Trap: interleaving asks for spans, so spans are measured by length class, not only whole sentences; and patches ask for
word ends, so those are measured against the recordings' word times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.evals.measures import Measure, Promise, at_most
from speechquilt.evals.wer import wer
from speechquilt.nn.llama import LlamaConfig
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_utterances, text_tokenizer_of
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token import network
from speechquilt.text_to_token.boundaries import Spoken, place_units
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import AlignedTokens, UnitEnd, Utterance

BOUNDARY_UTTERANCES = 64  # enough for some hundred words, seconds on one core
SPAN_CLASSES = {"1_3": (1, 3), "4_9": (4, 9), "10_plus": (10, 15)}  # words, spec 1 section 4

MEASURES = (
    Measure(
        key="text_to_token.wer", kind="rate", meaning="word error rate of its tokens read back by the ASR head, held-out sentences",
        promise=Promise(name="Text-to-token: word error rate of held-out sentences", bound=at_most(0.10)),
    ),
    Measure(
        key="text_to_token.wer_spans_1_10", kind="rate", meaning="the same on spans of 1-10 words",
        promise=Promise(name="Text-to-token: word error rate of spans of 1-10 words", bound=at_most(0.10)),
    ),
    Measure(key="text_to_token.wer_spans_1_3", kind="rate", meaning="the same on spans of 1-3 words"),
    Measure(key="text_to_token.wer_spans_4_9", kind="rate", meaning="the same on spans of 4-9 words"),
    Measure(key="text_to_token.wer_spans_10_plus", kind="rate", meaning="the same on spans of 10 words and more"),
    Measure(key="text_to_token.rejected", kind="share", meaning="share of texts whose tokens were rejected"),
    Measure(key="text_to_token.n", kind="count", meaning="held-out sentences behind text_to_token.wer"),
    Measure(key="text_to_token.boundary_ms", kind="amount", unit="ms", meaning="median distance of a held-out word's end from its true time"),
    Measure(key="text_to_token.boundary_p90_ms", kind="amount", unit="ms", meaning="90th percentile of the same"),
    Measure(key="text_to_token.boundary_within_token", kind="share", meaning="share of word ends at most one token from the true time"),
    Measure(key="text_to_token.boundary_grid_ms", kind="amount", unit="ms", meaning="the median with the true tokens of each word: the grid's part"),
    Measure(key="text_to_token.boundary_n", kind="count", meaning="words behind the boundary figures"),
    Measure(key="text_to_token.steps", kind="count", meaning="training steps of the text-to-token model"),
    Measure(key="text_to_token.parameters", kind="count", meaning="parameters of the text-to-token model"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextToTokenRecipe:
    """How a text-to-token model is trained."""

    llama: LlamaConfig
    """Sizes of the transformer."""
    data: TextToTokenDataConfig
    """The size of a batch, and how pieces of the recordings are drawn."""
    train: TrainConfig
    """The run: its steps, learning rate, devices and checkpoints."""
    engine: EngineConfig
    """How speech tokens are sampled with the trained model."""


def train_text_to_token(
    recipe: TextToTokenRecipe,
    tokenizer: SpeechTokenizer,
    train: Sequence[Utterance],
    held_out: Sequence[Utterance],
    folder: Path,
    *,
    text_tokenizer: TextTokenizer | None = None,
) -> dict[str, Any]:
    """Train, save to `folder` as a Hugging Face Llama, return flat results (`text_to_token.*`).

    Utterances without word times are left out where there are others: the model is cued word by word, or, when no
    utterance has word times, by whole texts. `text_tokenizer`: what it reads with; None: the speech tokenizer's own.
    """
    text_tokenizer = text_tokenizer or text_tokenizer_of(tokenizer)
    aligned = [u for u in train if u.alignment]
    if 0 < len(aligned) < len(train):
        print(f"text-to-token: {len(train) - len(aligned)} of {len(train)} utterances have no word times, left out")
    config = network.TextToTokenConfig(
        num_text=text_tokenizer.size,
        num_speech=tokenizer.vocab_size,
        llama=recipe.llama,
        cue="word" if aligned else "text",
        frame_rate=tokenizer.frame_rate,
    )
    model = config.build(recipe.train.seed)
    loader = recipe.data.build(encode_utterances(tokenizer, aligned or train), text_tokenizer, model.vocab)
    Trainer(recipe.train, model, NextTokenObjective(model.vocab), loader, folder, name="text-to-token").train()
    network.save(folder, model.eval().to("cpu"), text_tokenizer, tokenizer.fingerprint)
    engine = recipe.engine.build(model, text_tokenizer)
    return {
        "text_to_token.steps": recipe.train.steps,
        "text_to_token.parameters": sum(p.numel() for p in model.parameters()),
        **measure_text_to_token(engine, tokenizer, [u.text for u in held_out]),
        **measure_boundaries(model, text_tokenizer, tokenizer, held_out),
    }


def measure_text_to_token(
    engine: TextToTokenEngine, tokenizer: SpeechTokenizer, held_out: Sequence[str]
) -> dict[str, Any]:
    """Word error rates of generated tokens: held-out sentences, and spans of running held-out text by length.

    A rejected text counts as silence, so every one of its words is an error. A tokenizer without ASR heads cannot read tokens
    back: then only the rejected share is known.
    """
    reader = tokenizer if isinstance(tokenizer, SupervisedTokenizer) and tokenizer.text_tokenizer else None
    rng = np.random.default_rng(0)
    words = " ".join(map(spoken_form, held_out)).split()
    classes = {"wer": list(held_out)}
    for name, (low, high) in {**SPAN_CLASSES, "1_10": (1, 10)}.items():
        if len(words) > high:
            classes[f"wer_spans_{name}"] = [_span(words, low, high, rng) for _ in held_out]
    results: dict[str, Any] = {"text_to_token.n": len(held_out)}
    for name, texts in classes.items():
        spans = engine.generate(texts, range(len(texts)))
        if reader is None:
            continue
        heard = reader.read_back([span.ids_T[: 0 if span.reject else None] for span in spans])
        results[f"text_to_token.{name}"] = wer(zip(texts, heard)).rate
    results["text_to_token.rejected"] = sum(engine.stats.rejects.values()) / engine.stats.texts
    return results


def measure_boundaries(
    model: network.TextToTokenLM, texts: TextTokenizer, tokenizer: SpeechTokenizer, held_out: Sequence[Utterance]
) -> dict[str, Any]:
    """How far the word ends that the model finds lie from the recordings' word times; {} when either has no word times.

    `boundary_grid_ms` is what the 80 ms grid alone costs: the error of the tokens' own word ends, for the words that have
    a token.
    """
    timed = [u for u in held_out if u.alignment][:BOUNDARY_UTTERANCES]
    if model.config.cue != "word" or not timed:
        return {}
    token_ms, found_ms, grid_ms = 1000 / tokenizer.frame_rate, [], []
    spoken, ends_ms = [], []
    for utterance, tokens in zip(timed, encode_utterances(tokenizer, timed)):
        words = [(form, 1000 * w.end_s) for w in utterance.alignment if (form := spoken_form(w.text))]
        if words and len(tokens.ids_T) >= len(words):
            spoken.append(Spoken(words=tuple(form for form, _ in words), ids_T=tokens.ids_T))
            ends_ms.append(np.array([end for _, end in words]))
            grid_ms += _grid_errors(tokens, utterance, token_ms)
    for true_ms, unit_end_T in zip(ends_ms, place_units(model, texts, spoken)):
        found_ms += np.abs((np.flatnonzero(unit_end_T == UnitEnd.WORD) + 1) * token_ms - true_ms).tolist()
    if not (found_ms and grid_ms):
        return {}
    return {
        "text_to_token.boundary_ms": float(np.median(found_ms)),
        "text_to_token.boundary_p90_ms": float(np.quantile(found_ms, 0.9)),
        "text_to_token.boundary_within_token": float(np.mean(np.array(found_ms) <= token_ms)),
        "text_to_token.boundary_grid_ms": float(np.median(grid_ms)),
        "text_to_token.boundary_n": len(found_ms),
    }


def _grid_errors(tokens: AlignedTokens, utterance: Utterance, token_ms: float) -> list[float]:
    """Distance of each word's end from the end of its last token, for the words that have one."""
    last = {int(word): t for t, word in enumerate(tokens.word_T) if word >= 0}
    return [abs((t + 1) * token_ms - 1000 * utterance.alignment[word].end_s) for word, t in last.items()]


def _span(words: Sequence[str], low: int, high: int, rng: np.random.Generator) -> str:
    length = int(rng.integers(low, high + 1))
    start = int(rng.integers(0, len(words) - length + 1))
    return " ".join(words[start : start + length])
