"""Teach what stands above a finished codebook to read tokens from anywhere: whole recordings, and runs of their words.

Only the reader learns; the tokens stay as they are, and so do the tokenizer's fingerprint and every shard.
Trap: a reader that has heard recordings from their start alone knows where in a recording a token was made. It reads the same
tokens without the first fifth of a second as other words altogether, and interleaved data is made of such pieces
(docs/decisions/0021-codebook.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from speechquilt.evals.measures import Measure
from speechquilt.stages.train_tokenizer import whisper_form
from speechquilt.text_to_token.examples import draw_span, whole_example
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed
from speechquilt.train.objectives.reading import ReadingBatch, reading_objective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import IGNORE, AlignedTokens

MEASURES = (Measure(key="reader.steps", kind="count", meaning="steps in which the reader learned to read pieces"),)
READER = ("encoder.layer_norm", "encoder.embed_positions2", "decoder.")  # and the layers above the codebook


@dataclass(frozen=True, kw_only=True)
class ReaderRecipe:
    """How the reader learns to read pieces of recordings."""

    train: TrainConfig
    """The run: its steps, learning rate and checkpoints."""
    rows: int = 32
    """Recordings or pieces of them in a batch, over all ranks."""
    whole: float = 0.3
    """Share of whole recordings among them, silence at their edges included, 0 to 1; the others are runs of words."""
    max_words: int = 15
    """Most words in a run; every length up to it is as likely, as far as the recording has so many."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.max_words < 1:
            raise ValueError(f"rows={self.rows} and max_words={self.max_words} must be at least 1")
        if not 0.0 <= self.whole <= 1.0:
            raise ValueError(f"whole={self.whole} must lie in 0..1, it is a share")


class PieceLoader:
    """A `protocols.Loader` of `ReadingBatch`: batch n is a pure function of (seed, n), a row of it of nothing else.

    Raises ValueError when no recording has text and speech.
    """

    def __init__(
        self,
        recipe: ReaderRecipe,
        model: SupervisedTokenizer,
        recordings: Sequence[AlignedTokens],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert model.text_tokenizer is not None
        if not any(whole_example(recording, model.text_tokenizer) for recording in recordings):
            raise ValueError(
                f"none of {len(recordings)} recordings has text and speech tokens; tokenize transcribed audio"
            )
        self.recipe, self.recordings, self._texts = recipe, recordings, model.text_tokenizer
        self._max_ids = model.config.max_text_ids
        self._rank, self._world_size = rank, world_size
        self._number = 0

    def next_batch(self) -> ReadingBatch:
        rng = np.random.default_rng([self.recipe.train.seed, self._number])
        self._number += 1
        pieces = [self._draw(rng) for _ in range(self.recipe.rows)][self._rank :: self._world_size]
        tokens, texts = zip(*pieces)
        return ReadingBatch(
            ids_BT=pad_sequence(list(tokens), batch_first=True),
            num_tokens_B=torch.tensor([len(ids_T) for ids_T in tokens]),
            text_BL=pad_sequence(list(texts), batch_first=True, padding_value=IGNORE),
        )

    def state_dict(self) -> dict:
        return {"number": self._number}

    def load_state_dict(self, state: dict) -> None:
        self._number = state["number"]

    def _draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Speech ids and text ids of a piece; another one is drawn for a recording without text, or with too much."""
        while True:
            recording = self.recordings[int(rng.integers(len(self.recordings)))]
            whole = rng.random() < self.recipe.whole
            piece = (
                whole_example(recording, self._texts)
                if whole
                else draw_span(recording, self._texts, rng, self.recipe.max_words)
            )
            if piece is None:
                continue
            text_ids = self._texts.encode(whisper_form(piece.text))
            if len(text_ids) <= self._max_ids:
                return torch.from_numpy(piece.ids_T), torch.tensor(text_ids)


def train_reader(
    recipe: ReaderRecipe, tokenizer: Path, recordings: Sequence[AlignedTokens], folder: Path
) -> dict[str, Any]:
    """Train the reader of `tokenizer` on its tokens; `folder` becomes a tokenizer of the same fingerprint.

    Goes on from where it stopped. Raises ValueError for a tokenizer that reads by CTC, and as `PieceLoader`.
    """
    model = SupervisedTokenizer.load(tokenizer)
    if model.config.read_back_head != "attention" or model.text_tokenizer is None:
        raise ValueError(f"{tokenizer} reads by CTC or not at all; a reader is trained for read_back_head='attention'")
    above = tuple(f"encoder.layers.{i}." for i in range(model.config.layers_below, len(model.encoder.layers)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith((*READER, *above))
    loader = PieceLoader(recipe, model, recordings, distributed.rank(), distributed.world_size())
    Trainer(recipe.train, model, reading_objective, loader, folder, name="reader").train()
    if distributed.rank() == 0:
        model.eval().to("cpu").save(folder)
    return {"reader.steps": recipe.train.steps}
