"""What the toy story measures: its producers, in the order of the tables."""

from speechquilt.evals import scorer
from speechquilt.evals.results import Schema
from speechquilt.recipes.toy import fact_transfer, pipeline, questions
from speechquilt.stages import (
    heard_sound,
    run_facts,
    train_decoder,
    train_lm,
    train_text_to_token,
    train_tokenizer,
    training_documents,
)

SCHEMA = Schema(
    (
        *pipeline.MEASURES,
        *run_facts.MEASURES,
        *train_tokenizer.MEASURES,
        *train_text_to_token.MEASURES,
        *training_documents.MEASURES,
        *train_lm.MEASURES,
        *scorer.MEASURES,
        *questions.MEASURES,
        *fact_transfer.MEASURES,
        *train_decoder.MEASURES,
        *heard_sound.MEASURES,
    )
)
