"""Where the words of given speech tokens end, as the text-to-token model hears it: an aligner of text and tokens.

Place in the pipeline: the model writes a WORD_END after each word, so synthetic spans carry word ends. Here the speech tokens
are given and the model only says where a unit ends and whether a silence comes next. The recipe compares these ends with
known word times: that is the boundary error of the spans.
Trap: every cue gets at least one token, as in generation, so speech of fewer tokens than its text has cues cannot be aligned.
A token is 80 ms at 12.5 Hz: ends lie on that grid, and a word without a token of its own takes one from its neighbour.

The decision is greedy, token by token, and does not know the next token: WORD_END against the probability of all speech ids
together. It is the decision that generation makes, so its error is that of the generated spans.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token.answer import CUE, EOS, IN_SILENCE, SPEECH, WORD_END, Position, unit_ends
from speechquilt.text_to_token.examples import prompt_ids
from speechquilt.text_to_token.model import TextToTokenLM
from speechquilt.vocab import Vocab

MAX_ROWS = 128  # texts that are placed together


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """Words in spoken form (one cue each, none empty) and the LOCAL ids of their speech."""

    words: tuple[str, ...]
    ids_T: np.ndarray

    def __post_init__(self) -> None:
        if not self.words or not all(self.words):
            raise ValueError(f"words={self.words!r} must be at least one, none of them empty; leave silence out")
        if len(self.ids_T) < len(self.words):
            raise ValueError(
                f"{len(self.words)} words and {len(self.ids_T)} speech tokens: each word needs one; "
                "check that text and speech belong together"
            )


def align(model: TextToTokenLM, tokenizer: TextTokenizer, text: str, ids_T: np.ndarray) -> np.ndarray:
    """`unit_end_T` uint8 `UnitEnd` codes of speech tokens whose text is known; a WORD end for each word of its spoken form.

    Raises ValueError when the text has nothing to say, or more words than there are tokens.
    """
    spoken = Spoken(words=tuple(spoken_form(text).split()), ids_T=ids_T)
    return place_units(model, tokenizer, [spoken])[0]


@torch.inference_mode()
def place_units(model: TextToTokenLM, tokenizer: TextTokenizer, items: Sequence[Spoken]) -> list[np.ndarray]:
    """`align` in batches -> `unit_end_T` of each. Raises ValueError for a model that is cued by whole texts."""
    if model.config.cue != "word":
        raise ValueError(
            f'cue="{model.config.cue}": this model never saw where words end; train it on recordings with word times'
        )
    model.eval()
    order = sorted(range(len(items)), key=lambda i: -len(items[i].ids_T))
    ends: dict[int, np.ndarray] = {}
    for first in range(0, len(order), MAX_ROWS):
        chunk = order[first : first + MAX_ROWS]
        rows = [_Row(model.vocab, tokenizer, items[i]) for i in chunk]
        _place(model, rows)
        ends |= {i: row.unit_end_T for i, row in zip(chunk, rows)}
    return [ends[i] for i in range(len(items))]


class _Row:
    """One text: the ids fed so far, and the rest of the speech."""

    def __init__(self, vocab: Vocab, tokenizer: TextTokenizer, item: Spoken) -> None:
        self.vocab = vocab
        self.position = Position([tokenizer.encode(word) for word in item.words])
        self.ids = prompt_ids(vocab, [i for cue in self.position.cues for i in cue]).tolist()
        self.num_prompt = len(self.ids)
        self.speech = vocab.to_model("speech", item.ids_T).tolist()
        self.num_said = 0
        self.max_ids = len(self.ids) + self.num_prompt + 2 * len(self.speech)  # the cues, and at most an end per token

    def choices(self) -> list[int]:
        """The legal kinds that still let every cue have a token and every token a place."""
        left, cues = len(self.speech) - self.num_said, self.position.num_unbegun
        lasting_silence = self.position.place == IN_SILENCE and cues == 0 and left > 0
        fits = {SPEECH: left > cues, EOS: left == 0, WORD_END: not lasting_silence, CUE: True}
        return [kind for kind in self.position.legal() if fits[kind]]

    def advance(self, score_K: np.ndarray) -> None:
        """The best of the choices, and whatever leaves no choice after it."""
        choices = self.choices()
        self._say(max(choices, key=lambda kind: score_K[kind]))
        while not self.position.finished and len(choices := self.choices()) == 1:
            self._say(choices[0])

    def _say(self, kind: int) -> None:
        cue = self.position.next_cue
        said = {WORD_END: self.vocab.word_end, EOS: self.vocab.eos, CUE: cue[0] if cue else -1}
        if kind == SPEECH:
            self.num_said += 1
        self.ids.append(self.speech[self.num_said - 1] if kind == SPEECH else said[kind])
        self.position.move(kind)

    @property
    def unit_end_T(self) -> np.ndarray:
        answer = np.array(self.ids[self.num_prompt :])
        return unit_ends(answer, self.vocab)[self.vocab.is_speech(answer)]


def _place(model: TextToTokenLM, rows: Sequence[_Row]) -> None:
    """Feed all rows in step, each as far as its ids are known; ask the model where they are not."""
    device = model.lm_head.weight.device
    state = model.init_state(len(rows), max(row.max_ids for row in rows))
    for at in _while_unfinished(rows):
        active_B = torch.tensor([at < len(row.ids) and not row.position.finished for row in rows], device=device)
        next_B = torch.tensor([row.ids[at] if at < len(row.ids) else 0 for row in rows], device=device)
        x_BD, state = model.hidden_step(next_B, state, active_B)
        asking = [b for b, row in enumerate(rows) if at == len(row.ids) - 1 and not row.position.finished]
        if asking:
            score_NK = _scores(model, x_BD[asking], [rows[b] for b in asking])
            for b, score_K in zip(asking, score_NK.cpu().numpy()):
                rows[b].advance(score_K)


def _while_unfinished(rows: Sequence[_Row]) -> Iterator[int]:
    at = 0
    while not all(row.position.finished for row in rows):
        yield at
        at += 1


def _scores(model: TextToTokenLM, x_ND: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Logit of WORD_END, EOS, the next cue's first id, and of all speech ids together: `[N, K]`."""
    vocab, head_VD = model.vocab, model.lm_head.weight
    cues = [row.position.next_cue for row in rows]
    cue_N = torch.tensor([cue[0] if cue else vocab.pad for cue in cues], device=x_ND.device)
    speech_NC = (x_ND @ head_VD[vocab.speech_start : vocab.speech_start + vocab.num_speech].T).float()
    ends_N2 = (x_ND @ head_VD[[vocab.word_end, vocab.eos]].T).float()
    cue_score_N = (x_ND * head_VD[cue_N]).sum(1).float()
    return torch.cat([ends_N2, cue_score_N[:, None], speech_NC.logsumexp(1, keepdim=True)], dim=1)
