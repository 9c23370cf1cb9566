"""What an evaluation may ask of a language model: log-likelihoods of continuations, and generated answers.

This is the only evaluation code that sees model ids.
Trap: a continuation in the modality of the prompt's end is the same span, not a new one: no marker between them, and
the patch grid runs on across the join (spec latent-speech-text 9), so no system is told where the ending starts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from speechquilt.evals.measures import Measure
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
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        self.model, self.vocab, self.patcher = model, vocab, patcher
        self.max_rows, self.device = max_rows, torch.device(device)

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
        with _evaluating(self.model):
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
        prompts in the call change nothing. Raises ValueError for a patcher that needs word ends.
        """
        if self.patcher is not None and not self.patcher.causal:
            raise ValueError(
                f"{_describe(self.patcher)} needs word ends, which a token being generated does not have yet; "
                "generate with a static patcher or an entropy patcher"
            )
        if max_tokens < 1 or temperature < 0:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1 and temperature={temperature} not negative")
        starts = []
        for prompt in prompts:
            ids_T = self._lay_out(prompt).ids_T[:-1]  # without EOS
            starts.append(ids_T if self._goes_on(prompt, modality) else np.append(ids_T, self.vocab.marker(modality)))
        answers: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * len(starts)
        with _evaluating(self.model):
            for rows in longest_first([len(x) for x in starts], rows=self.max_rows):
                draws = [torch.Generator().manual_seed(_row_seed(seed, i)) for i in rows] if temperature else []
                new = self._decode([starts[i] for i in rows], modality, max_tokens, temperature, draws)
                for i, ids in zip(rows, new):
                    span = self.vocab.read_back(np.array([self.vocab.marker(modality), *ids]))
                    answers[i] = span[0].ids_T
        return answers

    def _goes_on(self, prompt: tuple[Segment, ...], modality: Modality) -> bool:
        """Whether an answer in `modality` needs no marker behind this prompt."""
        if not prompt:
            return modality == "text" and not self.vocab.opening_marker
        return prompt[-1].modality == modality

    def _lay_out(self, segments: Sequence[Segment]) -> LaidOut:
        return self.vocab.lay_out(Document(id="", segments=_joined(segments), source=""))

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

    def _decode(
        self,
        starts: Sequence[np.ndarray],
        modality: Modality,
        max_tokens: int,
        temperature: float,
        draws: Sequence[torch.Generator],
    ) -> list[list[int]]:
        """Model ids of each row's answer. All rows advance together from position 0: a short row already answers while
        a long one still reads its prompt, so no row needs padding on the left."""
        num_rows, longest = len(starts), max(len(x) for x in starts)
        state = self.model.init_state(num_rows, longest + max_tokens)
        patch_states = [None if self.patcher is None else self.patcher.init_state() for _ in starts]
        allowed_V = self._allowed(modality)
        answers: list[list[int]] = [[] for _ in starts]
        done = [False] * num_rows
        now = [int(x[0]) for x in starts]
        for t in range(longest + max_tokens):
            opens_B, closes_B = [True] * num_rows, [True] * num_rows
            if self.patcher is not None:
                for b, i in enumerate(now):
                    is_speech = bool(self.vocab.is_speech(np.int64(i)))
                    opens_B[b], closes_B[b], patch_states[b] = self.patcher.step(i, is_speech, patch_states[b])
            logits_BV, state = self.model.step(
                torch.tensor(now, device=self.device),
                torch.tensor(opens_B, device=self.device),
                torch.tensor(closes_B, device=self.device),
                state,
            )
            chosen = _choose(logits_BV.float().masked_fill(~allowed_V, -torch.inf).cpu(), temperature, draws)
            for b, start in enumerate(starts):
                if t + 1 < len(start):
                    now[b] = int(start[t + 1])
                    continue
                if not done[b] and self._in_modality(chosen[b], modality):
                    answers[b].append(chosen[b])
                    now[b] = chosen[b]
                    done[b] = len(answers[b]) == max_tokens
                else:
                    done[b], now[b] = True, self.vocab.eos
            if all(done):
                break
        return answers

    def _in_modality(self, i: int, modality: Modality) -> bool:
        return bool(self.vocab.is_speech(np.int64(i)) if modality == "speech" else self.vocab.is_text(np.int64(i)))

    def _allowed(self, modality: Modality) -> torch.Tensor:
        """Mask over the vocabulary: the modality's own ids and what ends an answer (both markers, EOS)."""
        ids_V = torch.arange(self.vocab.size)
        allowed_V = self.vocab.is_speech(ids_V) if modality == "speech" else self.vocab.is_text(ids_V)
        allowed_V = torch.as_tensor(allowed_V).clone()
        allowed_V[[self.vocab.marker("text"), self.vocab.marker("speech"), self.vocab.eos]] = True
        return allowed_V.to(self.device)


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


def _joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one modality become one segment, hence one span."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].modality == segment.modality:
            before = joined.pop()
            ends = None
            if before.unit_end_T is not None and segment.unit_end_T is not None:
                ends = np.concatenate([before.unit_end_T, segment.unit_end_T])
            ids_T = np.concatenate([before.ids_T, segment.ids_T])
            segment = Segment(modality=segment.modality, ids_T=ids_T, unit_end_T=ends)
        joined.append(segment)
    return tuple(joined)


def _choose(logits_BV: torch.Tensor, temperature: float, draws: Sequence[torch.Generator]) -> list[int]:
    if not temperature:
        return logits_BV.argmax(-1).tolist()
    probs_BV = (logits_BV / temperature).softmax(-1)
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probs_BV, draws)]


def _row_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)


def _describe(patcher: Patcher | None) -> str:
    """The patcher and what it was built with, where it says so."""
    if patcher is None:
        return "none"
    config = patcher if dataclasses.is_dataclass(patcher) else getattr(patcher, "config", None)
    return type(patcher).__name__ if config is None else repr(config)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout inside; a module's training mode comes back afterwards."""
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()
