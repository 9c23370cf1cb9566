"""The small door for Python: load what was trained, and one call each to tokenize, to interleave, to score, to generate, to speak."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt import audio
from speechquilt.data.interleaving import synthetic
from speechquilt.data.interleaving.synthetic import InterleaveConfig
from speechquilt.decoder import speech_decoder
from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.evals.scorer import Request, Scorer
from speechquilt.model.generation import GenerationConfig, GenerationEngine
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_all
from speechquilt.stages.generate_lm import spelled, within_rows
from speechquilt.stages.train_lm import load_scorer
from speechquilt.stages.training_documents import speak_spans, text_segment
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import network
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.tokenizer import loading
from speechquilt.types import Document, Segment, Waveform

Part = str | np.ndarray
"""Text, or the ids of speech tokens."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A trained language model, ready to be asked."""

    scorer: Scorer
    engine: GenerationEngine
    text_tokenizer: TextTokenizer


def load_tokenizer(folder: str | Path) -> SpeechTokenizer:
    """A speech tokenizer: a run of ours, a GLM-4-Voice tokenizer, or HuBERT units. Raises FileNotFoundError or ValueError."""
    return loading.load(folder)


def load_text_to_token(folder: str | Path) -> TextToTokenEngine:
    """A text-to-token model, ready to speak. Raises FileNotFoundError or ValueError naming the file that is wrong."""
    loaded = network.load(Path(folder))
    return EngineConfig().build(loaded.model, loaded.tokenizer)


def load_lm(folder: str | Path) -> LanguageModel:
    """A language model from its run folder, plain or latent. Raises FileNotFoundError or ValueError."""
    scorer, run = load_scorer(Path(folder))
    return LanguageModel(
        scorer=scorer,
        engine=within_rows(scorer.engine, run),
        text_tokenizer=TextTokenizer.load(Path(folder) / "text_tokenizer.json"),
    )


def load_decoder(folder: str | Path) -> SpeechDecoder:
    """A speech decoder, which makes sound of speech tokens. Raises FileNotFoundError or ValueError."""
    return speech_decoder.load(Path(folder))


def tokenize(tokenizer: SpeechTokenizer, sound: str | Path | Waveform) -> np.ndarray:
    """A file of any rate, or a waveform -> speech tokens, int32 [T]. Raises ValueError or OSError on broken audio."""
    wave = sound if isinstance(sound, Waveform) else audio.load(sound)
    return encode_all(tokenizer, [audio.resample(audio.check(wave), tokenizer.sample_rate)])[0]


def interleave(speaker: TextToTokenEngine, text: str, *, ratio: float = 0.3, seed: int = 0) -> Document:
    """Text -> a document in which the share `ratio` of its words are speech tokens; another `seed`, other words."""
    plan = synthetic.plan("text", text, 0, InterleaveConfig(ratio=ratio, seed=seed))
    (spans,) = speak_spans([plan], speaker)
    return synthetic.assemble(plan, spans, speaker.tokenizer.encode_run)


def score(lm: LanguageModel, prompt: Part, endings: Sequence[Part]) -> list[float]:
    """Mean log-probability per token of each ending after the prompt, in nats."""
    context = (_segment(lm, prompt),)
    found = lm.scorer.log_likelihoods([Request(context, _segment(lm, ending, inside=True)) for ending in endings])
    return [float(likelihood.mean) for likelihood in found]


def generate(lm: LanguageModel, prompt: Part | Sequence[Part], **settings: Any) -> list[Part]:
    """What the model writes after the prompt, in order: text, and arrays of speech tokens. `settings`: fields of
    `GenerationConfig`, such as answer="speech", max_tokens=50, temperature=0.8, seed=1.

    Raises ValueError on a setting that makes no sense and on a prompt that is empty or longer than the model's rows.
    """
    parts = [prompt] if isinstance(prompt, str | np.ndarray) else list(prompt)
    if not parts or not all(len(part) for part in parts):
        raise ValueError("the prompt is empty, or a part of it; give text or ids of speech tokens to go on from")
    context = tuple(_segment(lm, part, inside=i > 0) for i, part in enumerate(parts))
    (found,) = lm.engine.generate([context], GenerationConfig(**settings))
    texts = spelled(context, found, lm.text_tokenizer)
    return [segment.ids_T if text is None else text for segment, text in zip(found.segments, texts, strict=True)]


def speak(decoder: SpeechDecoder, ids: np.ndarray, *, seed: int = 0) -> Waveform:
    """Speech tokens -> sound. Raises ValueError on ids that are not of the decoder's codebook."""
    return decoder.speak([ids], seeds=[seed])[0]


def _segment(lm: LanguageModel, part: Part, inside: bool = False) -> Segment:
    if isinstance(part, str):
        return text_segment(lm.text_tokenizer, part, inside=inside)
    return Segment(modality="speech", ids_T=np.asarray(part, dtype=np.int32))
