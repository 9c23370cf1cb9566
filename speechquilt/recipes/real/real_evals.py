"""What the real story measures at its end: who is understood, what the text-to-token model says, and what is left of the text.

Trap: the sentences that are measured on were never trained on, by nobody, and neither were the texts; but the reader that
reads tokens back is the tokenizer's own, so its mistakes are in every rate.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechquilt.data.feed.splits import place
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.data.sources.text_files import read_texts
from speechquilt.evals.measures import Measure, Promise, at_most
from speechquilt.evals.scorer import Scorer
from speechquilt.evals.wer import wer
from speechquilt.model.warm_start import Ends, plain_from_hugging_face
from speechquilt.recipes.real import real_texts
from speechquilt.recipes.real.sizes import shrunk
from speechquilt.stages.encode import encode_utterances, load_text_tokenizer
from speechquilt.stages.lm_recipe import LMRecipe
from speechquilt.stages.spoken_corpus import HELD_OUT, UNSEEN_VOICE
from speechquilt.stages.train_lm import load_scorer
from speechquilt.stages.train_text_to_token import measure_text_to_token
from speechquilt.stages.training_documents import text_segment
from speechquilt.text_to_token import network
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import TextDocument, Utterance

MAX_WORDS = 100  # of a text that is scored

GROUPS = {HELD_OUT: "held-out sentences, seen voices", UNSEEN_VOICE: "a voice left out of training"}
LIMITS = {HELD_OUT: 0.10, UNSEEN_VOICE: 0.20}

MEASURES = (
    *(
        Measure(
            key=f"heard.{group}.wer", kind="rate", meaning=f"word error rate of the tokens read back: {what}",
            promise=Promise(name=f"Tokens read back: word error rate, {what}", bound=at_most(LIMITS[group])),
        )
        for group, what in GROUPS.items()
    ),
    Measure(key="lm.base.text_loss", kind="amount", unit="nats", meaning="loss per token of held-out text of the base, before any training of ours"),
    Measure(key="lm.<run>.text_loss", kind="amount", unit="nats", meaning="loss per token of held-out text"),
    Measure(key="lm.<run>.text_loss_above_base", kind="difference", meaning="the same minus the base's, in nats"),
    Measure(key="lm.<run>.speech_loss", kind="amount", unit="nats", meaning="loss per speech token of held-out sentences"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RealEvalsConfig:
    """On how much is measured."""

    sentences: int = 200
    """Held-out sentences of each group of voices that are read back, and said by the text-to-token model."""
    texts: int = 90
    """Held-out texts whose loss is measured, over all kinds."""

    def shrunk(self, scale: float) -> "RealEvalsConfig":
        return replace(self, sentences=shrunk(self.sentences, scale, 8), texts=shrunk(self.texts, scale, 6))


def evaluate(
    settings: RealEvalsConfig, engine: EngineConfig, runs: dict[str, LMRecipe], run_dir: Path
) -> dict[str, Any]:
    """All measures of a story whose other stages are complete; `runs`: the language models by name."""
    tokenizer = SupervisedTokenizer.load(run_dir / "tokenizer")
    spoken = {group: _some(run_dir / "corpus" / group, settings.sentences) for group in GROUPS}
    return {
        **heard(tokenizer, spoken),
        **_said(engine, tokenizer, run_dir / "text_to_token", spoken[HELD_OUT]),
        **_losses(settings, tokenizer, spoken[HELD_OUT], runs, run_dir),
    }


def heard(tokenizer: SupervisedTokenizer, groups: dict[str, list[Utterance]]) -> dict[str, Any]:
    """Word error rates of what is read back of the tokens, by group."""
    found = {}
    for group, utterances in groups.items():
        texts = tokenizer.read_back([tokens.ids_T for tokens in encode_utterances(tokenizer, utterances)])
        found[f"heard.{group}.wer"] = wer((u.text, text) for u, text in zip(utterances, texts)).rate
    return found


def _said(
    engine: EngineConfig, tokenizer: SupervisedTokenizer, speaker: Path, held_out: list[Utterance]
) -> dict[str, Any]:
    loaded = network.load(speaker)
    return measure_text_to_token(engine.build(loaded.model, loaded.tokenizer), tokenizer, [u.text for u in held_out])


def _losses(
    settings: RealEvalsConfig,
    tokenizer: SupervisedTokenizer,
    held_out: list[Utterance],
    runs: dict[str, LMRecipe],
    run_dir: Path,
) -> dict[str, Any]:
    """Of held-out text and speech, and how far the text lies above that of the base before any training."""
    documents = [d for d in read_texts(str(run_dir / "texts" / real_texts.MEASURED)) if isinstance(d, TextDocument)]
    chosen = sorted(documents, key=lambda document: place(document.id))[: settings.texts]
    speech = [tokens.segment() for tokens in encode_utterances(tokenizer, held_out)]
    found: dict[str, Any] = {}
    for name, recipe in runs.items():
        texts = load_text_tokenizer(Path(recipe.warm_start))
        segments = [text_segment(texts, " ".join(d.text.split()[:MAX_WORDS])) for d in chosen]
        scorer, run = load_scorer(run_dir / "lm" / name)
        if "lm.base.text_loss" not in found:
            ends = Ends(bos=recipe.bos_token, eos=recipe.eos_token)
            base = plain_from_hugging_face(Path(recipe.warm_start), run.vocab, recipe.train.seed, ends)
            found["lm.base.text_loss"] = Scorer(base.eval(), run.vocab, None).mean_loss(segments)
        loss = scorer.mean_loss(segments)
        found[f"lm.{name}.text_loss"] = loss
        found[f"lm.{name}.text_loss_above_base"] = loss - found["lm.base.text_loss"]
        found[f"lm.{name}.speech_loss"] = scorer.mean_loss(speech)
    return found


def _some(folder: Path, number: int) -> list[Utterance]:
    """The first recordings of a part of the corpus, whose sentences are in random order."""
    read = (item for item in read_utterances(folder) if isinstance(item, Utterance))
    return [utterance for _, utterance in zip(range(number), read)]
