"""What the real story measures and promises: its producers, in the order of the tables.

Trap: a stage that the toy shares promises there what a hundred words allow. Its numbers are shown here without that promise;
what is promised of open vocabulary stands with the measures of this recipe.
"""

from dataclasses import replace

from speechquilt.evals.measures import Measure
from speechquilt.evals.results import Schema
from speechquilt.recipes.real import real_evals, real_texts
from speechquilt.stages import (
    run_facts,
    train_lm,
    train_reader,
    train_text_to_token,
    train_tokenizer,
    training_documents,
)

SCALE = Measure(key="run.scale", kind="amount", meaning="share of the whole story's work that was done")
CORPUS = (
    Measure(key="corpus.minutes", kind="amount", unit="min", meaning="time that the corpus took"),
    Measure(key="corpus.rejects", kind="count", meaning="sentences that the voices could not speak"),
    Measure(key="corpus.<set>.recordings", kind="count", meaning="recordings"),
    Measure(key="corpus.<set>.hours", kind="amount", unit="h", meaning="hours of speech"),
)
INTERLEAVED = (
    Measure(key="interleaved.noise.<kind>.wer", kind="rate", meaning="word error rate of the spoken spans that were read back, by what is written"),
    Measure(key="interleaved.noise.<kind>.low", kind="rate", meaning="lower end of its 95 % interval"),
    Measure(key="interleaved.noise.<kind>.high", kind="rate", meaning="upper end of the same interval"),
    Measure(key="interleaved.noise.<kind>.spans", kind="count", meaning="spans read back"),
    Measure(key="interleaved.noise.<kind>.words", kind="count", meaning="their words"),
)  # fmt: skip
KEPT = ("tokenizer.streaming_equals_offline",)  # promises of the shared stages that hold for any vocabulary


def _of_any_vocabulary(measures: tuple[Measure, ...]) -> tuple[Measure, ...]:
    return tuple(m if m.key in KEPT else replace(m, promise=None) for m in measures)


SCHEMA = Schema(
    (
        *run_facts.MEASURES,
        SCALE,
        *CORPUS,
        *_of_any_vocabulary(train_tokenizer.MEASURES),
        *train_reader.MEASURES,
        *_of_any_vocabulary(train_text_to_token.MEASURES),
        *real_texts.MEASURES,
        *INTERLEAVED,
        *training_documents.MEASURES,
        *train_lm.MEASURES,
        *real_evals.MEASURES,
    )
)
