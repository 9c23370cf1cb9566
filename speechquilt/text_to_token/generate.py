"""Text -> speech tokens in bulk: continuous batching over the text-to-token model, `protocols.TextToToken`.

It fills spans of text corpora with speech (spec synthetic-interleaved, sections 4 and 5.2), so most of the tokens of a
pre-training run come from here.
Trap: a request's random numbers belong to the request (its seed, the attempt, the position), never to the batch. What a
text becomes is therefore the same alone, in any order and in any company, up to float noise at the edge of a choice.

Every word's speech is introduced by the word's own text ids, its cue (see `examples.py`). The words are known, so the
model never chooses which one comes: it says whether a silence comes first and when a unit ends, and every word is
spoken exactly once, in order. At the start of a unit the next cue competes with a silence by the logit of its first
id; inside a cue every other id is illegal.

Rows of the state are slots. A slot reads its prompt at once, samples until EOS or its cap, is emptied and takes the
next request, longest first, so that slots of one time have similar lengths and the last ones to finish are short.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from speechquilt.span_length import LEAST, MOST, at_rate, misfit
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token.answer import CUE, EOS, IN_CUE, NEXT_PLACE, OPEN, SPEECH, unit_ends
from speechquilt.text_to_token.examples import prompt_ids
from speechquilt.text_to_token.network import Cue, TextToTokenLM
from speechquilt.types import SpokenSpan
from speechquilt.vocab import Vocab

SHORT_LISTS = (
    8,
    64,
)  # candidates a CPU looks at before it sorts everything; a trained model's top 0.9 rarely needs more
ADMIT_SHARE = 32  # one slot in so many is empty before prompts are read: a few prompts cost nearly as much as many
PACK_SHARE = 8  # more than one slot in so many rides along for nothing before slots are dropped
PROGRESS_FROM = 200  # texts in a call that are worth a progress bar


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How speech tokens are sampled and which answers are refused; defaults from spec synthetic-interleaved, 4 and 5.2.

    Numbers of speech tokens are those at 12.5 Hz; `for_frame_rate` gives those of another rate. An answer that is refused
    is sampled again; what fails every time stays text.
    """

    max_rows: int = 128
    """Most texts that are spoken at once; more are faster on a GPU and take more memory."""
    temperature: float = 1.0
    """Of sampling: 0 always takes the most likely token, 1 samples as the model predicts; lower varies less."""
    top_p: float = 0.9
    """Sample among the most likely tokens that together have this probability, above 0 and up to 1 (1: among all)."""
    cap_per_token: int = 10
    """Most speech tokens and word ends of an answer per text token, and cap_extra more; a longer one is refused."""
    cap_extra: int = 10
    """Speech tokens and word ends that any answer may have beside cap_per_token."""
    min_per_token: float = LEAST
    """Fewer speech tokens per text token are refused, in texts of 3 or more text tokens."""
    max_per_token: float = MOST
    """More speech tokens per text token are refused, in texts of 3 or more text tokens."""
    max_repeat: int = 25
    """An answer that repeats itself, with a period of up to 8 tokens, for this many speech tokens is refused."""
    max_text_tokens: int = 256
    """A text of more text tokens is not spoken."""
    max_retries: int = 2
    """How often a refused answer is sampled again; 0 never."""
    poll_every: int = 2
    """Steps between two looks at which answers are done: a look makes a GPU wait, answers that are done hold their
    rows.
    """
    cache_tokens: int = 128 * 1024
    """Most tokens of key-value state held at once, over all rows: bounds memory; very long texts get fewer rows."""

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        for key, low in (
            ("max_rows", 1),
            ("poll_every", 1),
            ("max_retries", 0),
            ("cap_per_token", 1),
            ("cap_extra", 0),
        ):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")

    def for_frame_rate(self, frame_rate: float) -> "EngineConfig":
        """The same limits in seconds of sound, for speech of `frame_rate` tokens per second."""
        return replace(
            self,
            cap_per_token=math.ceil(at_rate(self.cap_per_token, frame_rate)),
            cap_extra=math.ceil(at_rate(self.cap_extra, frame_rate)),
            min_per_token=at_rate(self.min_per_token, frame_rate),
            max_per_token=at_rate(self.max_per_token, frame_rate),
            max_repeat=math.ceil(at_rate(self.max_repeat, frame_rate)),
        )

    def build(self, model: TextToTokenLM, tokenizer: TextTokenizer) -> "TextToTokenEngine":
        return TextToTokenEngine(model, tokenizer, self)


@dataclass(kw_only=True)
class EngineStats:
    """Counts over the life of an engine."""

    texts: int = 0
    """Texts that were asked for."""
    retries: int = 0
    """Attempts after the first."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Texts that were not spoken in the end, by reason."""
    speech_tokens: int = 0
    """Speech tokens of all answers."""
    seconds: float = 0.0
    """Time spent on them."""


@dataclass(kw_only=True)
class Request:
    """One text to speak: the ids of its cues, the most ids its answer may have, and which attempt this is."""

    index: int  # place in the caller's list
    seed: int
    cues: list[list[int]]
    cap: int
    attempt: int = 0

    @property
    def text_ids(self) -> list[int]:
        return [i for cue in self.cues for i in cue]

    @property
    def cue_ends(self) -> np.ndarray:
        """For each of `text_ids`, bool: the last of its cue."""
        ends = np.zeros(sum(map(len, self.cues)), dtype=bool)
        ends[np.cumsum(list(map(len, self.cues))) - 1] = True
        return ends

    def uniforms(self) -> np.ndarray:
        """One number in [0, 1) per position, from a counter-based generator keyed by (seed, attempt)."""
        return np.random.Generator(np.random.Philox(key=[self.seed % 2**64, self.attempt])).random(self.cap, np.float32)


def request_of(
    text: str, seed: int, index: int, tokenizer: TextTokenizer, cue: Cue, config: EngineConfig
) -> tuple[Request | None, str]:
    """-> the request of a text, or None and why it cannot be spoken."""
    plain = spoken_form(text)
    if not text.strip():
        return None, "empty text"
    if not any(c.isalnum() for c in plain):
        return None, "nothing speakable"
    cues = [tokenizer.encode_inside(c) for c in (plain.split() if cue == "word" else [plain])]
    num_text = sum(map(len, cues))
    if num_text > config.max_text_tokens:
        return None, f"text longer than {config.max_text_tokens} tokens"
    cap = (1 + config.cap_per_token) * num_text + config.cap_extra
    return Request(index=index, seed=seed, cues=cues, cap=cap), ""


class TextToTokenEngine:
    """`generate(texts, seeds)`; `stats` tells how many texts, retries, rejects and tokens there were."""

    def __init__(self, model: TextToTokenLM, tokenizer: TextTokenizer, config: EngineConfig | None = None) -> None:
        if tokenizer.size != model.vocab.num_text:
            raise ValueError(
                f"the text tokenizer has {tokenizer.size} ids and the model knows {model.vocab.num_text}; "
                "load both from the same model folder"
            )
        self.model, self.tokenizer = model, tokenizer
        self.frame_rate = model.config.frame_rate
        self.config = (config or EngineConfig()).for_frame_rate(self.frame_rate)
        self.stats = EngineStats()
        self.shows_progress = True  # False where the caller shows a progress line of its own

    @torch.inference_mode()
    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> list[SpokenSpan]:
        """-> one `SpokenSpan` per text, in order, cues left out and WORD_ENDs turned into `unit_end_T`.

        Never fails on a text: what cannot be spoken or went wrong `max_retries` + 1 times carries its reason in `reject`
        (and its last tokens, for whoever looks into it). Raises ValueError when texts and seeds differ in number.
        """
        if len(texts) != len(seeds):
            raise ValueError(f"{len(texts)} texts and {len(seeds)} seeds; give one seed per text")
        started = time.perf_counter()
        self.model.eval()
        spans: dict[int, SpokenSpan] = {}
        waiting = []
        for index, (text, seed) in enumerate(zip(texts, seeds)):
            request, reject = request_of(text, seed, index, self.tokenizer, self.model.config.cue, self.config)
            if request is None:
                spans[index] = no_speech(reject)
            else:
                waiting.append(request)
        waiting.sort(key=lambda r: (-r.cap, r.index))
        if waiting:
            with tqdm(
                total=len(waiting),
                desc="text to tokens",
                unit=" texts",
                disable=not self.shows_progress or len(waiting) < PROGRESS_FROM,
            ) as bar:
                self._run(deque(waiting), spans, bar)
        results = [spans[i] for i in range(len(texts))]
        self.stats.texts += len(texts)
        self.stats.rejects.update(span.reject for span in results if span.reject)
        self.stats.speech_tokens += sum(len(span.ids_T) for span in results)
        self.stats.seconds += time.perf_counter() - started
        return results

    def _run(self, waiting: deque[Request], spans: dict[int, SpokenSpan], bar: tqdm) -> None:
        longest = max(r.cap for r in waiting) + max(len(r.text_ids) for r in waiting) + 3
        num_rows = min(self.config.max_rows, len(waiting), max(1, self.config.cache_tokens // longest))
        slots = _Slots(self.model, self.config, num_rows, longest)
        while waiting or slots.busy:
            num_free = len(slots.free)
            if waiting and num_free >= min(len(waiting), 1 + num_rows // ADMIT_SHARE):
                slots.admit([waiting.popleft() for _ in slots.free[: len(waiting)]])
            elif not waiting and num_free > len(slots.requests) // PACK_SHARE:
                slots.pack()
            for _ in range(self.config.poll_every):
                slots.step()
            for request, answer in slots.collect():
                span = read_answer(answer, self.model.vocab, len(request.text_ids), self.config)
                if span.reject and request.attempt < self.config.max_retries:
                    request.attempt += 1
                    self.stats.retries += 1
                    waiting.append(request)
                else:
                    spans[request.index] = span
                    bar.update()


# The tensors of `_Slots` that have a row per request.
PER_ROW = (
    *("x_BD", "text_BL", "cue_end_BL", "uniform_BT", "answer_BT"),
    *("num_text_B", "made_B", "cued_B", "cap_B", "place_B", "active_B"),
)


class _Slots:
    """The rows of one call: tensors on the model's device, and which request sits where.

    `admit` reads prompts in one go; from then on every step chooses one id per row and reads it. A row that is done rides
    along, at the cost of its arithmetic, until `collect` empties its slot; `pack` drops empty slots when nobody waits.
    Trap: a step looks at no tensor, so that a GPU never waits between two polls. How far to read the caches the host
    knows by counting: a busy row is as long as its prompt and the steps since, or shorter when it is done.
    """

    def __init__(self, model: TextToTokenLM, config: EngineConfig, num_rows: int, max_tokens: int) -> None:
        vocab, weight = model.vocab, model.lm_head.weight
        device = weight.device
        # C: ids an answer may use, in the order of `answer.KINDS`. The row of CUE is a stand-in: its head row is that of the text id it stands for.
        speech = range(vocab.speech_start, vocab.speech_start + vocab.num_speech)
        self.model_id_C = torch.tensor([vocab.word_end, vocab.eos, vocab.pad, *speech], device=device)
        self.model, self.config = model, config
        self.vocab = vocab
        self.head_VD, self.head_CD = weight, weight[self.model_id_C]
        self.next_place_KC = torch.tensor(NEXT_PLACE, device=device)[
            :, torch.arange(len(self.model_id_C), device=device).clamp(max=SPEECH)
        ]
        self.illegal_MKC = (self.next_place_KC < 0).repeat(2, 1, 1)  # M: no word remains, some do
        self.illegal_MKC[0, :, CUE] = True
        self.illegal_MKC[1, :, EOS] = True
        self.requests: list[Request | None] = [None] * num_rows
        self.lengths = [0] * num_rows  # tokens in each row; where it is done, an upper bound
        self.state = model.init_state(num_rows, max_tokens)
        self.x_BD = torch.zeros(
            num_rows, model.config.llama.width, dtype=weight.dtype, device=device
        )  # of the id each row read last
        self.text_BL = torch.zeros(num_rows, max_tokens, dtype=torch.long, device=device)
        self.cue_end_BL = torch.zeros(num_rows, max_tokens, dtype=torch.bool, device=device)
        self.uniform_BT = torch.zeros(num_rows, max_tokens, device=device)
        self.answer_BT = torch.zeros(num_rows, max_tokens, dtype=torch.long, device=device)
        self.num_text_B, self.made_B, self.cued_B, self.cap_B, self.place_B = (
            torch.zeros(num_rows, dtype=torch.long, device=device) for _ in range(5)
        )
        self.active_B = torch.zeros(num_rows, dtype=torch.bool, device=device)

    @property
    def busy(self) -> list[int]:
        """Rows with a request."""
        return [row for row, r in enumerate(self.requests) if r is not None]

    @property
    def free(self) -> list[int]:
        return [row for row, r in enumerate(self.requests) if r is None]

    def admit(self, new: Sequence[Request]) -> None:
        """Put these requests, at most as many as there are empty slots, into slots and read their prompts."""
        rows = self.free[: len(new)]
        rows_N = torch.tensor(rows, device=self.active_B.device)
        for row, request in zip(rows, new):
            self.requests[row] = request
        self.text_BL[rows_N, : max(len(r.text_ids) for r in new)] = self._on_device(
            _padded([np.array(r.text_ids) for r in new])
        )
        self.cue_end_BL[rows_N, : max(len(r.text_ids) for r in new)] = self._on_device(
            _padded([r.cue_ends for r in new])
        )
        self.uniform_BT[rows_N, : max(r.cap for r in new)] = self._on_device(_padded([r.uniforms() for r in new]))
        self.num_text_B[rows_N] = self._on_device(np.array([len(r.text_ids) for r in new]))
        self.cap_B[rows_N] = self._on_device(np.array([r.cap for r in new]))
        self.made_B[rows_N] = 0
        self.cued_B[rows_N] = 0
        self.place_B[rows_N] = OPEN
        self.active_B[rows_N] = True
        self._read(rows, [prompt_ids(self.vocab, r.text_ids) for r in new])

    def _read(self, rows: list[int], prompts: list[np.ndarray]) -> None:
        """The rows begin again with these prompts."""
        rows_N = torch.tensor(rows, device=self.active_B.device)
        ids_NT, num_N = self._on_device(_padded(prompts)), self._on_device(np.array([len(p) for p in prompts]))
        self.state = self.state.reset(torch.zeros_like(self.active_B).index_fill(0, rows_N, True))
        ids_BT = ids_NT.new_zeros(len(self.requests), ids_NT.shape[1]).index_copy(0, rows_N, ids_NT)
        num_B = torch.zeros_like(self.made_B).index_copy(0, rows_N, num_N)
        x_BTD, self.state = self.model.model.extend(self.model.model.embed_tokens(ids_BT), num_B, self.state)
        self.x_BD[rows_N] = x_BTD[rows_N, num_N - 1]
        for row, prompt in zip(rows, prompts):
            self.lengths[row] = len(prompt)

    def step(self) -> None:
        """Every row chooses an id of its answer and reads it."""
        at_B1 = self.made_B[:, None]
        choice_B, cue_B = self._choose(self.uniform_BT.gather(1, at_B1)[:, 0])
        id_B = torch.where(choice_B == CUE, cue_B, self.model_id_C[choice_B])
        self.answer_BT.scatter_(1, at_B1, id_B[:, None])  # a row that is done writes behind its answer
        self.made_B += self.active_B
        self._move(choice_B)
        self.active_B = self.active_B & (choice_B != EOS) & (self.made_B < self.cap_B)
        self.lengths = [length + 1 for length in self.lengths]
        longest = max(self.lengths[row] for row in self.busy)
        x_BTD = self.model.model.embed_tokens(id_B[:, None])
        x_BTD, self.state = self.model.model.extend(x_BTD, self.active_B.long(), self.state, longest)
        self.x_BD = x_BTD[:, 0]

    def _choose(self, draw_B: Tensor) -> tuple[Tensor, Tensor]:
        """-> a legal choice per row, and the model id that CUE stands for there."""
        cue_B = self.text_BL.gather(1, self.cued_B[:, None])[:, 0]
        remain_B = (self.cued_B < self.num_text_B).long()
        logits_BC = self.x_BD @ self.head_CD.T
        logits_BC[:, CUE] = (self.x_BD * self.head_VD[cue_B]).sum(1)
        logits_BC = logits_BC.float().masked_fill(self.illegal_MKC[remain_B, self.place_B], -torch.inf)
        return sample(logits_BC, draw_B, self.config.temperature, self.config.top_p), cue_B

    def _move(self, choice_B: Tensor) -> None:
        """Where the answers stand after their choice."""
        is_cue_B = choice_B == CUE
        done_B = self.cue_end_BL.gather(1, self.cued_B[:, None])[:, 0]
        self.place_B = torch.where(is_cue_B & ~done_B, IN_CUE, self.next_place_KC[self.place_B, choice_B])
        self.cued_B += is_cue_B

    def collect(self) -> list[tuple[Request, np.ndarray]]:
        """Empty the slots that are done -> their requests and answers (model ids, EOS included unless capped)."""
        active = self.active_B.tolist()
        rows = [row for row in self.busy if not active[row]]
        if not rows:
            return []
        answers = self.answer_BT[rows].cpu().numpy()
        lengths = self.made_B[rows].tolist()
        done = []
        for row, answer, length in zip(rows, answers, lengths):
            request = self.requests[row]
            assert request is not None
            done.append((request, answer[:length]))
            self.requests[row] = None
        return done

    def pack(self) -> None:
        """Drop the empty rows: the last requests move into the gaps before them."""
        keep = len(self.busy)
        gaps, movers = [row for row in self.free if row < keep], [row for row in self.busy if row >= keep]
        for name in PER_ROW:
            rows = getattr(self, name)
            rows[gaps] = rows[movers]
            setattr(self, name, rows[:keep])
        self.state = self.state.moved(movers, gaps, keep)
        for row, to in zip(movers, gaps):
            self.requests[to], self.lengths[to] = self.requests[row], self.lengths[row]
        del self.requests[keep:], self.lengths[keep:]

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.active_B.device)


def sample(logits_BC: Tensor, draw_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Inverse of the cumulative distribution at `draw_B` in [0, 1), per row -> int64 [B].

    Ids are ordered by falling probability and cut to the smallest set whose mass reaches `top_p`. Each row's result
    depends on its own logits and draw alone. -inf is never chosen. `temperature` 0 takes the most likely id.
    """
    if temperature == 0:
        return logits_BC.argmax(1)
    probs_BC = (logits_BC / temperature).softmax(1)
    if (
        probs_BC.device.type != "cpu"
    ):  # asking whether a short list was enough would make a GPU wait, which sorts for nothing
        return _invert(*probs_BC.sort(dim=1, descending=True, stable=True), draw_B, top_p)
    choice_B = torch.empty(len(probs_BC), dtype=torch.long)
    left_R = torch.arange(len(probs_BC))
    for size in SHORT_LISTS:
        likely_RN, ids_RN = probs_BC[left_R].topk(min(size, probs_BC.shape[1]), dim=1)
        choice_B[left_R] = _invert(likely_RN, ids_RN, draw_B[left_R], top_p)
        left_R = left_R[likely_RN.sum(1) < top_p]
        if not len(left_R):
            return choice_B
    sorted_RC, ids_RC = probs_BC[left_R].sort(dim=1, descending=True, stable=True)
    choice_B[left_R] = _invert(sorted_RC, ids_RC, draw_B[left_R], top_p)
    return choice_B


def _invert(probs_BN: Tensor, ids_BN: Tensor, draw_B: Tensor, top_p: float) -> Tensor:
    total_BN = probs_BN.cumsum(1)
    inside_BN = (total_BN - probs_BN < top_p) & (probs_BN > 0)
    last_B1 = inside_BN.sum(1, keepdim=True) - 1
    target_B1 = draw_B[:, None] * total_BN.gather(1, last_B1)
    place_B1 = torch.minimum((total_BN <= target_B1).sum(1, keepdim=True), last_B1)
    return ids_BN.gather(1, place_B1)[:, 0]


def read_answer(answer: np.ndarray, vocab: Vocab, num_text: int, config: EngineConfig) -> SpokenSpan:
    """Model ids -> span, with the reason when it is no good: runaway, too short, too long or looping.

    `config`: with the limits of the model's frame rate.
    """
    finished = len(answer) > 0 and answer[-1] == vocab.eos
    is_speech = vocab.is_speech(answer)
    ids_T = (answer[is_speech] - vocab.speech_start).astype(np.int32)
    unit_end_T = unit_ends(answer, vocab)[is_speech]
    found = misfit(len(ids_T), num_text, config.min_per_token, config.max_per_token)
    reject = ""
    if not finished:
        reject = "length cap"
    elif found:
        reject = f"too {found} speech tokens"
    elif longest_loop(ids_T) >= config.max_repeat:
        reject = "repeats itself"
    return SpokenSpan(ids_T=ids_T, unit_end_T=unit_end_T, reject=reject)


def longest_loop(ids_T: np.ndarray, max_period: int = 8) -> int:
    """Length of the longest stretch that repeats with a period of 1 to `max_period` tokens (at least two rounds)."""
    longest = 0
    for period in range(1, min(max_period, len(ids_T) // 2) + 1):
        same = np.concatenate([[False], ids_T[period:] == ids_T[:-period], [False]])
        breaks = np.flatnonzero(~same)
        run = int(np.diff(breaks).max()) - 1
        if run >= period:
            longest = max(longest, run + period)
    return longest


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(rows), max(map(len, rows))), dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def no_speech(reject: str) -> SpokenSpan:
    return SpokenSpan(ids_T=np.zeros(0, dtype=np.int32), unit_end_T=np.zeros(0, dtype=np.uint8), reject=reject)
