"""What a language model writes after a prompt, text and speech in turns: the one decode loop of the models.

A prompt is laid out without its EOS. Tokens of the open span follow it, a marker opens another span, EOS ends it.
Trap: a row's random numbers belong to (seed, its number) and are drawn for its own new tokens only, so neither the other
rows of a batch nor the length of a prompt change what is drawn.

All rows advance together from position 0: a short one already answers while a long one still reads its prompt, so no row
needs padding on the left.

Axis letters: B rows, N rows that get a token now, T tokens, V vocabulary, K kinds of open span (`KINDS`).
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from speechquilt.nn.batching import longest_first
from speechquilt.protocols import LanguageModel, Patcher
from speechquilt.types import Document, Modality, Segment
from speechquilt.vocab import Vocab

Answer = Literal["any", "text", "speech"]
Ended = Literal["eos", "marker", "limit", "row"]
MODALITIES: tuple[Modality, ...] = ("text", "speech")
KINDS: tuple[Modality | None, ...] = (None, *MODALITIES)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a prompt is continued."""

    answer: Answer = "any"
    """What may come. "text" or "speech": that alone, from the first token on, with its marker where the prompt ends in the
    other. "any": the model goes on in what the prompt ends in and changes when it wants to."""
    max_tokens: int = 100
    """Most tokens of a continuation, markers between its spans included. Speech at 12.5 Hz: 100 are 8 seconds."""
    temperature: float = 0.0
    """0 always takes the likeliest token, which in speech tends to run in circles; 1 draws as the model predicts; between
    them it varies less. The demo of GLM-4-Voice has 0.2 with top_p 0.8."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability, above 0 and up to 1 (1: among all)."""
    seed: int = 0
    """Of the draws, 0 or more: the same seed and prompt give the same continuation."""
    one_span: bool = False
    """Whether a continuation ends where its first span does."""

    def __post_init__(self) -> None:
        if self.answer not in ("any", *MODALITIES):
            raise ValueError(f"answer={self.answer!r} must be any, text or speech")
        if self.max_tokens < 1 or not self.temperature >= 0:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be at least 1 and temperature={self.temperature} not negative"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 draws among all tokens")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")


class Token(NamedTuple):
    """One new token as a LOCAL id of its modality."""

    id: int
    modality: Modality


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One continuation.

    `segments`: its spans with LOCAL ids, empty ones left out; the first goes on in the prompt's last when both have one modality.
    `ended`: by "eos", by a "marker" (`one_span` alone), at the "limit" of `max_tokens`, or where the "row" was full.
    `num_tokens`: as `max_tokens` counts them. `global_steps`: units (patches, or single tokens) that were complete and
    run through the global transformer, or the only one, after the prompt; the last token is chosen and not read, so not counted.
    """

    segments: tuple[Segment, ...]
    ended: Ended
    num_tokens: int
    global_steps: int

    def ids(self, modality: Modality) -> np.ndarray:
        """All of its tokens of one modality, int32 [T]."""
        return np.concatenate([np.zeros(0, np.int32), *(s.ids_T for s in self.segments if s.modality == modality)])


class SpeechPieces(Protocol):
    """What cuts speech into the pieces that a model reads, and joins them again."""

    def segment(self, segment: Segment) -> Segment: ...

    def decode(self, piece_P: Sequence[int] | np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class GenerationEngine:
    """A model with all it takes to continue prompts. Batching never changes a result beyond float rounding."""

    model: LanguageModel
    vocab: Vocab
    patcher: Patcher | None
    """The one to use at test time; None for a token-level model."""
    pieces: SpeechPieces | None = None
    """What makes pieces of speech, for a model that reads pieces; prompts and results are the tokenizer's own ids."""
    row_tokens: int = 0
    """Tokens that the model's rows had in training: it knows no later place. 0: not known, and no limit."""
    row_units: int = 0
    """The same in units."""
    max_rows: int = 32
    """Most prompts that are continued at once."""
    device: torch.device = torch.device("cpu")
    """Where the model is."""

    def generate(
        self, prompts: Sequence[tuple[Segment, ...]], config: GenerationConfig, numbers: Sequence[int] | None = None
    ) -> list[Generated]:
        """One continuation per prompt, in order. `numbers`: what each row draws by, beside the seed; its place by default.

        Raises ValueError for a patcher that needs word ends, a prompt that fills a row, speech of a model without, and logits
        that are not numbers.
        """
        self._check(config)
        starts = [self._start(prompt, config.answer) for prompt in prompts]
        draws = range(len(starts)) if numbers is None else numbers
        found: dict[int, Generated] = {}
        for rows in longest_first([len(start_T) for start_T in starts], rows=self.max_rows):
            decoding = _Decoding(self, config, [starts[i] for i in rows], [draws[i] for i in rows])
            while not decoding.finished:
                decoding.step()
            found |= {i: decoding.generated(b) for b, i in enumerate(rows)}
        return [found[i] for i in range(len(starts))]

    def stream(
        self, prompt: tuple[Segment, ...], config: GenerationConfig, number: int = 0
    ) -> Generator[Token, None, Generated]:
        """Each token as soon as it is made, then (as the value of `yield from`) all of it, as `generate` gives it.

        Raises as `generate`, with the first token.
        """
        self._check(config)
        decoding = _Decoding(self, config, [self._start(prompt, config.answer)], [number])
        while not decoding.finished:
            yield from decoding.step()[0]
        return decoding.generated(0)

    def _check(self, config: GenerationConfig) -> None:
        if self.patcher is not None and not self.patcher.causal:
            raise ValueError(
                f"{type(self.patcher).__name__} needs word ends, which a token being generated does not have yet; "
                "generate with a static patcher or an entropy patcher"
            )
        if config.answer == "speech" and not self.vocab.num_speech:
            raise ValueError(
                "answer='speech': this model was trained on text alone and has no speech tokens; ask for text"
            )

    def _start(self, prompt: Sequence[Segment], answer: Answer) -> np.ndarray:
        """Model ids that stand before the continuation. Raises ValueError when they leave no room in a row."""
        pieced = prompt if self.pieces is None else [self.pieces.segment(segment) for segment in prompt]
        start_T = self.vocab.lay_out(Document(id="", segments=joined(pieced), source="")).ids_T[:-1]  # without EOS
        if answer != "any" and answer != open_span(self.vocab, start_T):
            start_T = np.append(start_T, self.vocab.marker(answer))
        if self.row_tokens and len(start_T) >= self.row_tokens:
            raise ValueError(
                f"the prompt has {len(start_T)} tokens, the model was trained on rows of {self.row_tokens}: there is no room "
                "for an answer; give a shorter text or recording"
            )
        return start_T


@dataclass(kw_only=True)
class _Row:
    """One row on its way. `now`: the id to be read next; `open`: the modality of its open span; `spans`: new tokens; `num_ids`:
    new ids of the model, `num_tokens`: what they count as."""

    start_T: np.ndarray
    draw: torch.Generator
    patch_state: Any
    now: int
    open: Modality | None
    spans: list[tuple[Modality, list[int]]] = field(default_factory=list)
    num_ids: int = 0
    num_tokens: int = 0
    units: int = 0
    unit_is_open: bool = False
    global_steps: int = 0
    ended: Ended | None = None


class _Decoding:
    """The rows of one batch while they are continued."""

    def __init__(
        self, engine: GenerationEngine, config: GenerationConfig, starts: Sequence[np.ndarray], numbers: Sequence[int]
    ) -> None:
        self.engine, self.config, self.place = engine, config, 0
        self.rows = [self._row(start_T, number) for start_T, number in zip(starts, numbers, strict=True)]
        longest = max(map(len, starts)) + config.max_tokens
        self.state = engine.model.init_state(len(starts), min(longest, engine.row_tokens or longest))
        self.allowed_KV = allowed(engine.vocab, config).to(engine.device)

    @property
    def finished(self) -> bool:
        return all(row.ended for row in self.rows)

    def step(self) -> list[list[Token]]:
        """One more id of every row is read -> the tokens that each got: none while it reads its prompt, after its end, and
        for a marker; several for a piece of speech."""
        logits_BV = self._read()
        self.place += 1
        made: list[list[Token]] = [[] for _ in self.rows]
        waiting: list[int] = []
        for b, row in enumerate(self.rows):
            if self.place < len(row.start_T):
                row.now = int(row.start_T[self.place])
            elif not row.ended and not self._is_full(row):
                waiting.append(b)
        if waiting:
            kinds = [KINDS.index(self.rows[b].open) for b in waiting]
            logits_NV = logits_BV[waiting].float().masked_fill(~self.allowed_KV[kinds], -torch.inf).cpu()
            for b, i in zip(waiting, choose(logits_NV, self.config, [self.rows[b].draw for b in waiting])):
                made[b] = self._add(self.rows[b], i)
        for row in self.rows:
            if row.ended:
                row.now = self.engine.vocab.eos
        return made

    def generated(self, b: int) -> Generated:
        """What row `b` has become."""
        row = self.rows[b]
        assert row.ended is not None
        return Generated(
            segments=tuple(Segment(modality=m, ids_T=np.array(ids, dtype=np.int32)) for m, ids in row.spans if ids),
            ended=row.ended,
            num_tokens=row.num_tokens,
            global_steps=row.global_steps,
        )

    def _row(self, start_T: np.ndarray, number: int) -> _Row:
        patcher, opened = self.engine.patcher, open_span(self.engine.vocab, start_T)
        seed = np.random.SeedSequence((self.config.seed, number)).generate_state(1, np.uint64)[0]
        return _Row(
            start_T=start_T,
            draw=torch.Generator().manual_seed(int(seed >> 1)),
            patch_state=None if patcher is None else patcher.init_state(),
            now=int(start_T[0]),
            open=opened,
            spans=[(opened, [])] if opened else [],
        )

    def _read(self) -> torch.Tensor:
        """Give every row's next id to the model -> `logits_BV`. Rows that have ended read EOS, which nobody asks about."""
        pairs = [(True, True) if row.ended else self._patch(row) for row in self.rows]
        opens_B, closes_B = (torch.tensor(x, device=self.engine.device) for x in zip(*pairs))
        ids_B = torch.tensor([row.now for row in self.rows], device=self.engine.device)
        with evaluating(self.engine.model):
            logits_BV, self.state = self.engine.model.step(ids_B, opens_B, closes_B, self.state)
        return logits_BV

    def _patch(self, row: _Row) -> tuple[bool, bool]:
        """Whether the row's next id opens and closes a unit, which is counted."""
        opens, closes, patcher = True, True, self.engine.patcher
        if patcher is not None:
            is_speech = bool(self.engine.vocab.is_speech(row.now))
            opens, closes, row.patch_state = patcher.step(row.now, is_speech, row.patch_state)
        row.units += opens
        if self.place >= len(row.start_T):
            row.global_steps += (opens and row.unit_is_open) + closes
        row.unit_is_open = not closes
        return opens, closes

    def _is_full(self, row: _Row) -> bool:
        """Whether the next token would open a unit too many; the row then ends. Raises ValueError when its prompt did it."""
        limit = self.engine.row_units
        if not limit or row.units < limit or (row.units == limit and row.unit_is_open):
            return False
        if not row.num_ids:
            raise ValueError(
                f"the prompt has {row.units} units (patches of speech, and single tokens), the model was trained on rows of "
                f"{limit}: there is no room for an answer; give a shorter text or recording"
            )
        row.ended = "row"
        return True

    def _add(self, row: _Row, i: int) -> list[Token]:
        """Take the chosen id `i` -> the tokens that it stands for."""
        vocab = self.engine.vocab
        if i == vocab.eos:
            row.ended = "eos"
            return []
        opened = next((m for m in MODALITIES if i == vocab.marker(m)), None)
        if opened and self.config.one_span and row.open:
            row.ended = "marker"
            return []
        new: list[Token] = []
        if opened:
            row.open = opened
            row.spans.append((opened, []))
        else:
            new = self._tokens(i)[: self.config.max_tokens - row.num_tokens]
            row.spans[-1][1].extend(token.id for token in new)
        row.now, row.num_ids, row.num_tokens = i, row.num_ids + 1, row.num_tokens + max(1, len(new))
        if row.num_tokens == self.config.max_tokens:
            row.ended = "limit"
        elif len(row.start_T) + row.num_ids == self.engine.row_tokens:
            row.ended = "row"
        return new

    def _tokens(self, i: int) -> list[Token]:
        modality: Modality = "speech" if self.engine.vocab.is_speech(i) else "text"
        local_T = self.engine.vocab.to_local(modality, np.array([i]))
        if modality == "speech" and self.engine.pieces is not None:
            local_T = self.engine.pieces.decode(local_T)
        return [Token(int(k), modality) for k in local_T]


def joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one modality become one segment, hence one span."""
    found: list[Segment] = []
    for segment in segments:
        if found and found[-1].modality == segment.modality:
            before = found.pop()
            ends = None
            if before.unit_end_T is not None and segment.unit_end_T is not None:
                ends = np.concatenate([before.unit_end_T, segment.unit_end_T])
            ids_T = np.concatenate([before.ids_T, segment.ids_T])
            segment = Segment(modality=segment.modality, ids_T=ids_T, unit_end_T=ends)
        found.append(segment)
    return tuple(found)


def open_span(vocab: Vocab, ids_T: np.ndarray) -> Modality | None:
    """The modality that a laid-out beginning ends in; None: no span is open yet."""
    for i in reversed(ids_T.tolist()):
        for modality in MODALITIES:
            if i == vocab.marker(modality):
                return modality
    return None if vocab.opening_marker else "text"


def allowed(vocab: Vocab, config: GenerationConfig) -> torch.Tensor:
    """Bool `[K, V]`: which ids may come in a span of each kind: its own, EOS, and markers of what else may come.

    Never padding, BOS, a word end, or an id that the rounding of the vocabulary added.
    """
    ids_V = torch.arange(vocab.size)
    may_come = [m for m in MODALITIES if config.answer in ("any", m) and (m == "text" or vocab.num_speech)]
    allowed_KV = torch.zeros(len(KINDS), vocab.size, dtype=torch.bool)
    for kind, allowed_V in zip(KINDS, allowed_KV):
        if kind is not None:
            allowed_V |= vocab.is_speech(ids_V) if kind == "speech" else vocab.is_text(ids_V)
        markers = MODALITIES if kind and config.one_span else [m for m in may_come if m != kind]
        allowed_V[[vocab.eos, *(vocab.marker(m) for m in markers)]] = True
    return allowed_KV


def choose(logits_NV: torch.Tensor, config: GenerationConfig, draws: Sequence[torch.Generator]) -> list[int]:
    """The next id of each row, drawn by its own generator. Raises ValueError on logits that are not numbers."""
    if bool((logits_NV.isnan() | logits_NV.isposinf()).any()):
        raise ValueError("the model's logits are not finite; its training went wrong, use an earlier checkpoint")
    if not config.temperature:
        return logits_NV.argmax(-1).tolist()
    below_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    probs_NV = (below_NV.double() / config.temperature).softmax(-1).float()  # in double: 1e-40 is a temperature too
    if config.top_p < 1:
        probs_NV = likeliest(probs_NV, config.top_p)
    return [int(torch.multinomial(probs_V, 1, generator=draw)) for probs_V, draw in zip(probs_NV, draws, strict=True)]


def likeliest(probs_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probabilities of the fewest ids that together have at least `top_p`, and 0 for all others."""
    sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    before_NV = sorted_NV.double().cumsum(-1) - sorted_NV
    return torch.zeros_like(probs_NV).scatter(-1, order_NV, sorted_NV.masked_fill(before_NV >= top_p, 0))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
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
