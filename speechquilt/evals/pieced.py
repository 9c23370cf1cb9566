"""A scorer for models that read speech as BPE pieces: requests and answers stay in the speech tokenizer's own ids.

Tasks cannot tell it from a scorer of base tokens.
Trap: the likelihood is that of one segmentation, a lower bound of the likelihood of the ids. Prompt and continuation
are cut into pieces separately, so that all endings follow the same prompt and none is helped by a piece across the
join.
"""

from collections.abc import Sequence
from typing import Any

import torch

from speechquilt.data.feed.speech_bpe import SpeechBPE
from speechquilt.evals.scorer import LogLikelihood, Scorer
from speechquilt.protocols import LanguageModel, Patcher
from speechquilt.types import Segment
from speechquilt.vocab import Vocab


class PiecedScorer(Scorer):
    """A `Scorer` whose model has the pieces of `bpe` for speech; `vocab.num_speech` is their number."""

    def __init__(
        self,
        model: LanguageModel,
        vocab: Vocab,
        patcher: Patcher | None,
        bpe: SpeechBPE,
        max_rows: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, vocab, patcher, max_rows, device, pieces=bpe)
        if vocab.num_speech != bpe.num_pieces:
            raise ValueError(
                f"the vocabulary has {vocab.num_speech} speech ids, the BPE {bpe.num_pieces} pieces; "
                "take both from the same run folder"
            )
        self.bpe = bpe

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "speech_pieces": self.bpe.num_pieces,
            "speech_bpe": self.bpe.fingerprint,
            "join": "same modality continues the span; prompt and continuation are pieced separately",
        }

    def log_likelihoods(self, requests: Sequence[tuple[tuple[Segment, ...], Segment]]) -> list[LogLikelihood]:
        """As `Scorer.log_likelihoods`, with `num_tokens` in base ids: means compare with those of other models."""
        pieced = [(tuple(map(self.bpe.segment, prompt)), self.bpe.segment(ending)) for prompt, ending in requests]
        scores = super().log_likelihoods(pieced)
        return [LogLikelihood(score.sum, len(ending.ids_T)) for score, (_, ending) in zip(scores, requests)]
