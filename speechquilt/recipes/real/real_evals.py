"""What the real story measures at its end: who is understood, what is said, what text is kept, and whether speech is.

Trap: a recording costs Whisper thirty seconds of sound however short it is, so its floor stands on fewer of them, and its
interval is wider.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.data.feed.splits import place
from speechquilt.data.interleaving.synthetic import InterleaveConfig
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.evals import continuations
from speechquilt.evals.measures import Value
from speechquilt.protocols import TextToSpeech
from speechquilt.recipes.real import real_texts
from speechquilt.recipes.real.sizes import shrunk
from speechquilt.stages import heard, span_noise, spoken_spans, text_loss
from speechquilt.stages.encode import encode_utterances, load_text_tokenizer
from speechquilt.stages.lm_recipe import LMRecipe
from speechquilt.stages.split_sentences import split_sentences
from speechquilt.stages.spoken_corpus import HELD_OUT, UNSEEN_VOICE
from speechquilt.stages.train_lm import load_scorer
from speechquilt.stages.whisper_reader import WhisperReader
from speechquilt.text_to_token import network
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import TextDocument, Utterance

MAX_WORDS = 100  # of a text whose loss is measured
MEASURES = (
    *heard.MEASURES,
    *spoken_spans.MEASURES,
    *span_noise.MEASURES,
    *text_loss.MEASURES,
    *continuations.MEASURES,
)


@dataclass(frozen=True, kw_only=True)
class RealEvalsConfig:
    """On how much is measured."""

    sentences: int = 150
    """Held-out sentences of each group of voices that are read back, and said by the text-to-token model."""
    floor: int = 40
    """How many of them the original Whisper hears too."""
    spans: int = 80
    """Spans of each length, and of each kind of text."""
    texts: int = 30
    """Held-out texts of each kind whose loss is measured."""
    pairs: int = 80
    """Most pairs of sentences whose written ends are told apart."""

    def shrunk(self, scale: float) -> "RealEvalsConfig":
        least = {"sentences": 8, "floor": 2, "spans": 6, "texts": 4, "pairs": 4}
        return replace(self, **{key: shrunk(getattr(self, key), scale, n) for key, n in least.items()})


@dataclass(frozen=True, kw_only=True)
class Made:
    """The finished stages of a story, and who else is heard."""

    run_dir: Path
    whisper: WhisperReader
    speaker: TextToSpeech
    """Says what the text-to-token model says, for the floor of its noise."""
    engine: EngineConfig
    rule: InterleaveConfig
    runs: Mapping[str, LMRecipe]
    """The language models by name."""
    guests: Mapping[str, Sequence[Utterance]]
    """Groups of recordings from outside the corpus, as `heard.GROUPS` calls them."""


def evaluate(settings: RealEvalsConfig, made: Made) -> dict[str, Any]:
    """All measures of a story whose other stages are complete."""
    tokenizer = SupervisedTokenizer.load(made.run_dir / "reader")
    loaded = network.load(made.run_dir / "text_to_token")
    engine = made.engine.build(loaded.model, loaded.tokenizer)
    held_out, unseen = (recordings(made.run_dir / "corpus" / group) for group in (HELD_OUT, UNSEEN_VOICE))
    groups = {HELD_OUT: held_out[: settings.sentences], UNSEEN_VOICE: unseen[: settings.sentences], **made.guests}
    tokens = encode_utterances(tokenizer, groups[HELD_OUT])
    texts = {kind: real_texts.measured_texts(made.run_dir / "texts", kind) for kind in real_texts.KINDS}
    return {
        **_heard(settings, tokenizer, groups, made.whisper),
        **spoken_spans.measure_spans(engine, tokenizer, tokens, settings.spans),
        **span_noise.measure_noise(texts, engine, made.speaker, tokenizer, made.rule, settings.spans),
        **_language_models(settings, made, tokenizer, texts, held_out),
    }


def recordings(folder: Path) -> list[Utterance]:
    """A part of the corpus that fits into memory, in the order of its sentences, which is random."""
    return [read for read in read_utterances(folder) if isinstance(read, Utterance)]


def _heard(
    settings: RealEvalsConfig,
    tokenizer: SupervisedTokenizer,
    groups: Mapping[str, Sequence[Utterance]],
    whisper: WhisperReader,
) -> dict[str, Value]:
    few = {group: utterances[: settings.floor] for group, utterances in groups.items()}
    floor = heard.heard(tokenizer, few, whisper)
    of_whisper = {key: value for key, value in floor.items() if key.split(".")[2] == heard.WHISPER}
    return {**heard.heard(tokenizer, groups), **of_whisper}


def _language_models(
    settings: RealEvalsConfig,
    made: Made,
    tokenizer: SupervisedTokenizer,
    texts: Mapping[str, Sequence[TextDocument]],
    held_out: Sequence[Utterance],
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    base_nats: dict[Path, np.ndarray] = {}
    for name, recipe in made.runs.items():
        base = Path(recipe.warm_start)
        spelling = load_text_tokenizer(base)
        chosen = [document for of_kind in texts.values() for document in _sample(of_kind, settings.texts)]
        documents = [np.array(spelling.encode(" ".join(d.text.split()[:MAX_WORDS]))) for d in chosen]
        bos = spelling.encode(recipe.bos_token)[0]
        scorer, _ = load_scorer(made.run_dir / "lm" / name)
        pairs = continuations.pairs_of(split_sentences(held_out, tokenizer, spelling), settings.pairs)
        if base not in base_nats:
            base_nats[base] = text_loss.base_nats(base, bos, documents)
        found |= text_loss.text_losses(name, scorer, documents, base_nats[base])
        found |= continuations.continuations(name, scorer, pairs)
    return found


def _sample(documents: Sequence[TextDocument], number: int) -> list[TextDocument]:
    return sorted(documents, key=lambda document: place(document.id))[:number]
