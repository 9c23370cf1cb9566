"""What an evaluation may ask of a language model: log-likelihoods of continuations, and generated answers.

This is the only evaluation code that sees model ids.
Trap: a continuation in the modality of the prompt's end is the same span, not a new one: no marker between them, and
the patch grid runs on across the join (spec latent-speech-text 9), so no system is told where the ending starts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from speechquilt.evals.measures import Measure
from speechquilt.model.generation import GenerationConfig, GenerationEngine, SpeechPieces, evaluating, joined
from speechquilt.nn.batching import longest_first, valid_places
from speechquilt.protocols import LanguageModel, LogitsAt, Patcher, ReadsOn
from speechquilt.types import IGNORE, Batch, Document, LaidOut, Modality, Segment
from speechquilt.vocab import Vocab

BATCH_TOKENS = 2048  # of continuations, padding included: bounds the logits that are in memory at once
DRAW = 0.0  # patchers that choose at random get this instead of a draw
MEASURES = (
    Measure(key="lm.<run>.speech_loss", kind="amount", unit="nats", meaning="held-out loss per speech token"),
    Measure(key="lm.<run>.text_loss", kind="amount", unit="nats", meaning="held-out loss per text token"),
)


class Request(NamedTuple):
    """How likely is `continuation` after `prompt`?"""

    prompt: tuple[Segment, ...]
    continuation: Segment


class LogLikelihood(NamedTuple):
    """Summed natural log-probability of the continuation's own tokens (no marker, no EOS), and how many they are."""

    sum: float
    num_tokens: int

    @property
    def mean(self) -> float:
        return self.sum / self.num_tokens


class Scorer:
    """Runs a model on requests, in batches of at most `max_rows` rows of similar length.

    `patcher`: the one to use at test time, `model.patcher.eval_patcher(config)`: static for static, mixed and curriculum
    models (spec latent-speech-text 9); None for a token-level model. `device`: where the model is. Batching never changes a result beyond float rounding.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocab: Vocab,
        patcher: Patcher | None,
        max_rows: int = 32,
        device: torch.device | str = "cpu",
        pieces: SpeechPieces | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        self.model, self.vocab, self.patcher = model, vocab, patcher
        self.max_rows, self.device = max_rows, torch.device(device)
        self.engine = GenerationEngine(
            model=model, vocab=vocab, patcher=patcher, pieces=pieces, max_rows=max_rows, device=self.device
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What of the scorer can change a score, for results.json."""
        return {"patcher": _describe(self.patcher), "join": "same modality continues the span and the patch grid"}

    def log_likelihoods(self, requests: Sequence[tuple[tuple[Segment, ...], Segment]]) -> list[LogLikelihood]:
        """One result per request, in order. Raises ValueError on an empty continuation or logits that are not finite."""
        laid_out = []
        for i, (prompt, continuation) in enumerate(requests):
            if not len(continuation.ids_T):
                raise ValueError(f"request {i} has an empty continuation; there is no token to score")
            laid_out.append(self._lay_out((*prompt, continuation)))
        counts = [len(continuation.ids_T) for _, continuation in requests]
        with evaluating(self.model):
            if self.patcher is None and isinstance(self.model, ReadsOn):
                sums = self._after_prompts(self.model, laid_out, counts)
            else:
                sums = self._in_whole_rows(laid_out, counts)
        for i, value in enumerate(sums):
            if not np.isfinite(value):
                raise ValueError(f"request {i} scored {value}; the model's logits are not finite")
        return [LogLikelihood(*scored) for scored in zip(sums, counts)]

    def mean_loss(self, segments: Sequence[Segment]) -> float:
        """Nats per token over all segments, each a document of its own: the held-out loss of one modality."""
        scores = self.log_likelihoods([Request((), segment) for segment in segments])
        return -sum(s.sum for s in scores) / sum(s.num_tokens for s in scores)

    def generate(
        self,
        prompts: Sequence[tuple[Segment, ...]],
        modality: Modality,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """Answers as LOCAL ids of `modality`, at most `max_tokens` each; they end at a marker or EOS, which is dropped.

        The answer's marker is given, not generated; when the prompt ends in the same modality its span just goes on.
        `temperature` 0 is greedy; else answer i is drawn from its own generator, seeded with (seed, i), so that other
        prompts in the call change nothing. Raises as `GenerationEngine.generate`.
        """
        config = GenerationConfig(
            answer=modality, max_tokens=max_tokens, temperature=temperature, seed=seed, one_span=True
        )
        return [answer.ids(modality) for answer in self.engine.generate(prompts, config)]

    def _lay_out(self, segments: Sequence[Segment]) -> LaidOut:
        return self.vocab.lay_out(Document(id="", segments=joined(segments), source=""))

    def _in_whole_rows(self, laid_out: Sequence[LaidOut], counts: Sequence[int]) -> list[float]:
        """Summed log-probability of the last `counts[b]` tokens before EOS of every row."""
        sums = [0.0] * len(laid_out)
        for rows in self._batches([len(x.ids_T) for x in laid_out]):
            batch = self._batch([laid_out[i] for i in rows], [counts[i] for i in rows]).to(self.device)
            scored_BT = batch.labels_BT != IGNORE
            if isinstance(self.model, LogitsAt):
                logits_NV = self.model.logits_at(batch, scored_BT)
            else:
                logits_NV = self.model.forward(batch)[scored_BT]
            for i, value in zip(rows, _sums(logits_NV, batch.labels_BT[scored_BT], [counts[i] for i in rows])):
                sums[i] = value
        return sums

    def _after_prompts(self, model: ReadsOn, laid_out: Sequence[LaidOut], counts: Sequence[int]) -> list[float]:
        """As `_in_whole_rows`, where what stands before the continuations is read once for all that share it."""
        sharing: dict[bytes, list[int]] = {}
        for i, (row, count) in enumerate(zip(laid_out, counts)):
            sharing.setdefault(row.ids_T[: -1 - count].tobytes(), []).append(i)
        groups = list(sharing.values())
        prompts = [laid_out[group[0]].ids_T[: -1 - counts[group[0]]] for group in groups]
        sums = [0.0] * len(laid_out)
        for chosen in self._batches([len(prompt_T) for prompt_T in prompts]):
            asked = [(b, i) for b, g in enumerate(chosen) for i in groups[g]]
            longest = max(len(prompts[g]) for g in chosen) + max(counts[i] for _, i in asked)
            state = self._read_prompts(model, [prompts[g] for g in chosen], longest)
            for rows in self._batches([counts[i] for _, i in asked]):
                of_row = torch.tensor([asked[r][0] for r in rows], device=self.device)
                items = [asked[r][1] for r in rows]
                parts = [laid_out[i].ids_T[-2 - counts[i] : -1] for i in items]  # from the last id before it
                num = [counts[i] for i in items]
                ids_BT, num_B, read_BT = self._padded([part_T[:-1] for part_T in parts])
                logits_NV, _ = model.read_on(ids_BT, num_B, state.repeated(of_row), read_BT)
                labels_N = torch.from_numpy(np.concatenate([part_T[1:] for part_T in parts])).to(self.device)
                for i, value in zip(items, _sums(logits_NV, labels_N, num)):
                    sums[i] = value
        return sums

    def _read_prompts(self, model: ReadsOn, prompts: Sequence[np.ndarray], longest: int) -> Any:
        """The state behind each prompt but its last id, which is read with the continuation that it predicts."""
        state = model.init_state(len(prompts), longest)
        ids_BT, num_B, read_BT = self._padded([prompt_T[:-1] for prompt_T in prompts])
        return model.read_on(ids_BT, num_B, state, torch.zeros_like(read_BT))[1]

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> `ids_BT`, how many are real in each row, and which."""
        num_B = torch.tensor([len(ids_T) for ids_T in rows])
        ids_BT = torch.full((len(rows), max(1, int(num_B.max()))), self.vocab.pad)
        for b, ids_T in enumerate(rows):
            ids_BT[b, : len(ids_T)] = torch.from_numpy(ids_T)
        real_BT = valid_places(num_B, ids_BT.shape[1])
        return ids_BT.to(self.device), num_B.to(self.device), real_BT.to(self.device)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return longest_first(lengths, rows=self.max_rows, budget=BATCH_TOKENS)

    def _batch(self, laid_out: Sequence[LaidOut], counts: Sequence[int]) -> Batch:
        """Labels only on the continuation."""
        labels = [np.full(len(row.ids_T), IGNORE, dtype=np.int64) for row in laid_out]
        for row, count, labels_T in zip(laid_out, counts, labels):
            n = len(row.ids_T)
            labels_T[n - count - 2 : n - 2] = row.ids_T[n - count - 1 : n - 1]
        return one_per_row(laid_out, labels, self.vocab.pad, self.patcher).validate()


def one_per_row(
    items: Sequence[LaidOut],
    labels: Sequence[np.ndarray],
    pad: int,
    patcher: Patcher | None,
    max_tokens: int | None = None,
) -> Batch:
    """One document per row with its labels, cut at `max_tokens`, and padding as a second document."""
    longest = max(len(item.ids_T) for item in items)
    shape = (len(items), min(max_tokens or longest, longest))
    ids_BT = np.full(shape, pad, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE, dtype=np.int64)
    doc_BT = np.ones(shape, dtype=np.int64)
    opens_BT, closes_BT = np.ones(shape, dtype=bool), np.ones(shape, dtype=bool)
    for b, (item, labels_T) in enumerate(zip(items, labels)):
        n = min(len(item.ids_T), shape[1])
        ids_BT[b, :n], doc_BT[b, :n] = item.ids_T[:n], 0
        labels_BT[b, : n - 1] = labels_T[: n - 1]  # the last token of a row predicts nothing
        if patcher is not None:
            opens_T, closes_T = patcher(item, DRAW)
            opens_BT[b, :n], closes_BT[b, :n] = opens_T[:n], closes_T[:n]
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        doc_BT=torch.from_numpy(doc_BT),
        opens_BT=torch.from_numpy(opens_BT) if patcher is not None else None,
        closes_BT=torch.from_numpy(closes_BT) if patcher is not None else None,
    )


def _sums(logits_NV: torch.Tensor, labels_N: torch.Tensor, counts: Sequence[int]) -> list[float]:
    """Summed log-probability of the labels of each row, `counts[b]` of the N for row b."""
    log_probs_NV = logits_NV.float().log_softmax(-1)
    log_probs_N = log_probs_NV.gather(1, labels_N[:, None])[:, 0]
    # float64 and row by row: the sum of one row must not depend on the rows beside it
    return [float(x.double().sum()) for x in log_probs_N.cpu().split(list(counts))]


def _describe(patcher: Patcher | None) -> str:
    """The patcher and what it was built with, where it says so."""
    if patcher is None:
        return "none"
    config = patcher if dataclasses.is_dataclass(patcher) else getattr(patcher, "config", None)
    return type(patcher).__name__ if config is None else repr(config)
