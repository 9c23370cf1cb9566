"""The same answers through an engine of others: `protocols.TextToToken` over prompts and completions, vLLM behind it.

It takes the place of `generate.py` where vLLM serves the saved folder, which is a plain Hugging Face Llama.
Trap: the cues are forced, so one answer is many completions: one id where a cue and a silence compete, then the
speech up to its WORD_END, and so on, each continuing the prompt before it. Without prefix caching every one reads its
prompt again.

`CompletionEngine` knows nothing of vLLM: it needs a function `complete(prompts, calls) -> ids`. What is legal where
comes from `answer.Position`, requests and refusals from `generate.py`, so that greedy answers are those of our
engine. `vllm_complete` is that function over `vllm.LLM`; it uses nothing but public sampling parameters. It has not
been run (docs/how-to/text-to-token.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.span_length import USUAL_RATE
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token.answer import AFTER_CUE, CUE, OPEN, SPEECH, Position, kind_of
from speechquilt.text_to_token.examples import prompt_ids
from speechquilt.text_to_token.generate import EngineConfig, Request, no_speech, read_answer, request_of
from speechquilt.text_to_token.network import Cue, describe
from speechquilt.types import SpokenSpan
from speechquilt.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one completion may be."""

    allowed: Sequence[int]
    """Ids that it may hold."""
    stop: int | None
    """The id that ends it and belongs to it; None when no id does."""
    min_tokens: int
    """Fewest ids."""
    max_tokens: int
    """Most ids."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """Probability of the most likely ids that are sampled from."""
    seed: int
    """Of its random numbers."""


Complete = Callable[[Sequence[list[int]], Sequence[Call]], list[list[int]]]
"""(prompts of model ids, one call each) -> the ids that follow each, `stop` included."""


@dataclass(kw_only=True)
class _Answer:
    """One request on its way: the ids said so far, and where they stand."""

    request: Request
    prompt: list[int]
    position: Position
    ids: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.position.finished or len(self.ids) >= self.request.cap


class CompletionEngine:
    """`generate(texts, seeds)` by completions; config as of our engine, of which `max_rows`, `poll_every` and
    `cache_tokens` are the other engine's business."""

    def __init__(
        self,
        complete: Complete,
        vocab: Vocab,
        tokenizer: TextTokenizer,
        cue: Cue,
        config: EngineConfig | None = None,
        frame_rate: float = USUAL_RATE,
    ) -> None:
        self.complete, self.vocab, self.tokenizer, self.cue = complete, vocab, tokenizer, cue
        self.frame_rate = frame_rate
        self.config = (config or EngineConfig()).for_frame_rate(frame_rate)
        speech = range(vocab.speech_start, vocab.speech_start + vocab.num_speech)
        self._speech, self._stretch = [*speech], [vocab.word_end, *speech]

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> list[SpokenSpan]:
        """As `TextToTokenEngine.generate`: one span per text, in order; refused texts carry their reason."""
        if len(texts) != len(seeds):
            raise ValueError(f"{len(texts)} texts and {len(seeds)} seeds; give one seed per text")
        spans: dict[int, SpokenSpan] = {}
        waiting: list[Request] = []
        for index, (text, seed) in enumerate(zip(texts, seeds)):
            request, reject = request_of(text, seed, index, self.tokenizer, self.cue, self.config)
            if request is None:
                spans[index] = no_speech(reject)
            else:
                waiting.append(request)
        while waiting:
            again = []
            for request, answer in zip(waiting, self._answers(waiting)):
                span = read_answer(np.array(answer), self.vocab, len(request.text_ids), self.config)
                if span.reject and request.attempt < self.config.max_retries:
                    request.attempt += 1
                    again.append(request)
                else:
                    spans[request.index] = span
            waiting = again
        return [spans[i] for i in range(len(texts))]

    def _answers(self, requests: Sequence[Request]) -> list[list[int]]:
        """All answers in rounds: what is forced is said at once, then one completion for each that is not finished."""
        answers = [
            _Answer(request=r, prompt=prompt_ids(self.vocab, r.text_ids).tolist(), position=Position(r.cues))
            for r in requests
        ]
        while True:
            for answer in answers:
                self._say_forced(answer)
            open_ = [answer for answer in answers if not answer.finished]
            if not open_:
                return [answer.ids[: answer.request.cap] for answer in answers]
            completions = self.complete([a.prompt + a.ids for a in open_], [self._call(a) for a in open_])
            for answer, ids in zip(open_, completions, strict=True):
                if not ids:
                    raise RuntimeError("a completion came back empty; is the engine's longest sequence too short?")
                self._say(answer, ids)

    def _say_forced(self, answer: _Answer) -> None:
        while not answer.finished and len(legal := answer.position.legal()) == 1 and legal[0] != SPEECH:
            self._say(answer, [answer.position.next_cue[0] if legal[0] == CUE else self.vocab.eos])

    def _say(self, answer: _Answer, ids: Sequence[int]) -> None:
        for id_ in ids:
            answer.position.move(kind_of(id_, self.vocab))
            answer.ids.append(id_)

    def _call(self, answer: _Answer) -> Call:
        place, left = answer.position.place, answer.request.cap - len(answer.ids)
        legal = answer.position.legal()
        choosing = place == OPEN  # a cue, or EOS, or the first token of a silence
        other = [answer.position.next_cue[0]] if CUE in legal else [self.vocab.eos]
        return Call(
            allowed=[*other, *self._speech] if choosing else self._stretch,
            stop=None if choosing else self.vocab.word_end,
            min_tokens=1 if place == AFTER_CUE else 0,  # ids before the WORD_END
            max_tokens=1 if choosing else left,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            seed=_seed(answer),
        )


def _seed(answer: _Answer) -> int:
    """Another one for each completion of each attempt, and the same whoever else is in the call."""
    entropy = [answer.request.seed % 2**64, answer.request.attempt, len(answer.ids)]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def vllm_complete(folder: Path, **options: Any) -> Complete:
    """`vllm.LLM` over a saved model folder; `options` go to `vllm.LLM`. Raises ImportError naming the extra."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ImportError("vLLM is not installed; pip install speechquilt[vllm]") from error
    llm = LLM(model=str(folder), skip_tokenizer_init=True, **{"enable_prefix_caching": True, **options})

    def params(call: Call) -> Any:
        return SamplingParams(
            temperature=call.temperature,
            top_p=call.top_p,
            seed=call.seed,
            min_tokens=call.min_tokens,
            max_tokens=call.max_tokens,
            allowed_token_ids=list(call.allowed),
            stop_token_ids=[] if call.stop is None else [call.stop],
            detokenize=False,
        )

    def complete(prompts: Sequence[list[int]], calls: Sequence[Call]) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], [params(call) for call in calls], use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return complete


def load_vllm(folder: Path, config: EngineConfig | None = None, **options: Any) -> CompletionEngine:
    """A saved model folder behind vLLM; `options` go to `vllm.LLM` (`tensor_parallel_size`, `dtype`, ...)."""
    ours = describe(folder)
    complete = vllm_complete(folder, **options)
    return CompletionEngine(
        complete, ours.config.vocab, ours.tokenizer, ours.config.cue, config, ours.config.frame_rate
    )
