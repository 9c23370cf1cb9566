"""Where the words of given speech tokens end, as the text-to-token model hears it: an aligner of text and tokens.

The model writes a WORD_END after each word, so synthetic spans carry word ends. Here the speech tokens are given, and
the model only says where a unit ends and whether a silence comes next. Compared with known word times, these ends
show the boundary error of synthetic spans.
Trap: every cue gets at least one token, as in generation, so speech of fewer tokens than its text has cues cannot be
aligned. A token is 80 ms at 12.5 Hz: ends lie on that grid, and a word without a token of its own takes one from its
neighbour.

The structure is chosen by its probability together with that of the tokens: a WORD_END that comes too early makes the
tokens after it unlikely under the next cue. One greedy pass cannot take it back; so the best `beam` answers are kept,
one for each place in the text (docs/decisions/0016-text-to-token.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speechquilt.nn.attention import KVState
from speechquilt.nn.batching import longest_first
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token.answer import CUE, EOS, KINDS, SPEECH, WORD_END, Position, unit_ends
from speechquilt.text_to_token.examples import prompt_ids
from speechquilt.text_to_token.network import TextToTokenLM

ITEMS = 32  # texts that are placed together
BEAM = 2  # answers kept per text; more find the same ends (decision 16)


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


def unit_ends_of(model: TextToTokenLM, tokenizer: TextTokenizer, text: str, ids_T: np.ndarray) -> np.ndarray:
    """`unit_end_T` uint8 `UnitEnd` codes of speech tokens whose text is known; a WORD end for each word of its spoken form.

    Raises ValueError when the text has nothing to say, or more words than there are tokens.
    """
    spoken = Spoken(words=tuple(spoken_form(text).split()), ids_T=ids_T)
    return place_units(model, tokenizer, [spoken])[0]


@torch.inference_mode()
def place_units(
    model: TextToTokenLM, tokenizer: TextTokenizer, items: Sequence[Spoken], beam: int = BEAM
) -> list[np.ndarray]:
    """`unit_ends_of` in batches -> `unit_end_T` of each. Raises ValueError for a model that is cued by whole texts."""
    if model.config.cue != "word":
        raise ValueError(
            f'cue="{model.config.cue}": this model never saw where words end; train it on recordings with word times'
        )
    model.eval()
    ends: dict[int, np.ndarray] = {}
    for chunk in longest_first([len(item.ids_T) for item in items], rows=ITEMS):
        answers = _Search(model, tokenizer, [items[i] for i in chunk], beam).run()
        ends |= {i: unit_ends(a, model.vocab)[model.vocab.is_speech(a)] for i, a in zip(chunk, answers)}
    return [ends[i] for i in range(len(items))]


@dataclass(frozen=True, kw_only=True)
class _Path:
    """An answer up to some speech token, or to its EOS. `ids`, `asked`: the part that `parent`'s row has not fed yet.

    `asked`: per id, the kinds that were legal there and the cue's id that stood for CUE.
    """

    item: int
    parent: int
    position: Position
    score: float
    done: tuple[int, ...]
    ids: tuple[int, ...] = ()
    asked: tuple[tuple[list[int], int], ...] = ()


class _Search:
    """Beam search over the structure of some texts at once; all have read the same number of speech tokens."""

    def __init__(self, model: TextToTokenLM, tokenizer: TextTokenizer, items: Sequence[Spoken], beam: int) -> None:
        self.model, self.vocab, self.beam = model, model.vocab, beam
        self.device = model.lm_head.weight.device
        self.cues = [[tokenizer.encode_inside(word) for word in item.words] for item in items]
        self.speech = [self.vocab.to_model("speech", item.ids_T).tolist() for item in items]

    def run(self) -> list[np.ndarray]:
        """-> the most likely answer of each item as model ids."""
        prompts = [prompt_ids(self.vocab, [i for cue in cues for i in cue]).tolist() for cues in self.cues]
        state = self.model.init_state(len(prompts), 0)
        x_BTD, state = self._feed(prompts, list(range(len(prompts))), state)
        last_BD = x_BTD[torch.arange(len(prompts)), [len(p) - 1 for p in prompts]]
        paths = [
            _Path(item=i, parent=i, position=Position(cues), score=0.0, done=()) for i, cues in enumerate(self.cues)
        ]
        answers: dict[int, np.ndarray] = {}
        said = 0
        while paths:
            longer = [after for row, path in enumerate(paths) for after in self._continued(path, row, said)]
            x_BTD, state = self._feed([p.ids for p in longer], [p.parent for p in longer], state)
            longer = self._scored(longer, last_BD, x_BTD)
            kept = self._best(longer)
            answers |= {longer[b].item: np.array(longer[b].done) for b in kept if longer[b].position.finished}
            kept = [b for b in kept if not longer[b].position.finished]
            last_BD = x_BTD[kept, [len(longer[b].ids) - 1 for b in kept]]
            state = _rows(state, kept, 0)
            paths = [longer[b] for b in kept]
            said += 1
        return [answers[i] for i in range(len(self.cues))]

    def _continued(self, path: _Path, row: int, said: int) -> Iterator[_Path]:
        """Every legal way from here through the next speech token, or through EOS when none is left."""
        speech = self.speech[path.item]
        left = len(speech) - said
        open_ = [replace(path, parent=row, ids=(), asked=())]
        while open_:
            at = open_.pop()
            legal, cue = at.position.legal(), (*at.position.next_cue, self.vocab.pad)[0]
            for kind in legal:
                if (kind == SPEECH and left <= at.position.num_unbegun) or (kind == EOS and left):
                    continue  # a cue would stay without a token, or a token without a place
                id_ = {WORD_END: self.vocab.word_end, EOS: self.vocab.eos, CUE: cue}.get(
                    kind, speech[said] if left else -1
                )
                after = replace(
                    at, position=at.position.moved(kind), ids=(*at.ids, id_), asked=(*at.asked, (legal, cue))
                )
                if kind in (SPEECH, EOS):
                    yield after
                else:
                    open_.append(after)

    def _feed(self, ids: Sequence[Sequence[int]], rows: list[int], state: KVState) -> tuple[Tensor, KVState]:
        """Append `ids[b]` to a copy of row `rows[b]` -> hidden `x_BTD` of the new ids, and the state of the copies."""
        num_new = max(map(len, ids))
        ids_BT = torch.zeros(len(ids), num_new, dtype=torch.long)
        for b, new in enumerate(ids):
            ids_BT[b, : len(new)] = torch.tensor(new)
        num_B = torch.tensor([len(new) for new in ids], device=self.device)
        x_BTD = self.model.model.embed_tokens(ids_BT.to(self.device))
        return self.model.model.extend(x_BTD, num_B, _rows(state, rows, num_new))

    def _scored(self, paths: Sequence[_Path], last_BD: Tensor, x_BTD: Tensor) -> list[_Path]:
        """Add the log-probability of the new ids: that of the engine, which chooses among the legal ids only."""
        places = [(b, t) for b, path in enumerate(paths) for t in range(len(path.ids))]
        b_N, t_N = torch.tensor(places, device=self.device).T
        before_BTD = torch.cat([last_BD[[path.parent for path in paths]][:, None], x_BTD[:, :-1]], dim=1)
        log_prob_N = self._log_prob(
            before_BTD[b_N, t_N],
            [paths[b].ids[t] for b, t in places],
            [paths[b].asked[t] for b, t in places],
        )
        sum_B = torch.zeros(len(paths), device=self.device).index_add_(0, b_N, log_prob_N).tolist()
        return [replace(p, score=p.score + s, done=(*p.done, *p.ids)) for p, s in zip(paths, sum_B)]

    def _log_prob(self, x_ND: Tensor, ids: list[int], asked: list[tuple[list[int], int]]) -> Tensor:
        vocab, head_VD = self.vocab, self.model.lm_head.weight
        ids_N, cue_N = torch.tensor([ids, [cue for _, cue in asked]], device=self.device)
        legal_NK = torch.tensor([[kind in legal for kind in KINDS] for legal, _ in asked], device=self.device)
        speech_NC = (x_ND @ head_VD[vocab.speech_start : vocab.speech_start + vocab.num_speech].T).float()
        ends_N2 = (x_ND @ head_VD[[vocab.word_end, vocab.eos]].T).float()
        cue_score_N = (x_ND * head_VD[cue_N]).sum(1).float()
        score_NK = torch.cat([ends_N2, cue_score_N[:, None], speech_NC.logsumexp(1, keepdim=True)], dim=1)
        total_N = score_NK.masked_fill(~legal_NK, -torch.inf).logsumexp(1)
        return (x_ND * head_VD[ids_N]).sum(1).float() - total_N

    def _best(self, paths: Sequence[_Path]) -> list[int]:
        """Of each item the best answer per place in the text, and of those the best `beam`."""
        kept: dict[int, dict[tuple[int, int], int]] = {}
        for b in sorted(range(len(paths)), key=lambda b: -paths[b].score):
            position = paths[b].position
            mine = kept.setdefault(paths[b].item, {})
            if len(mine) < self.beam:
                mine.setdefault((position.place, position.num_unbegun), b)
        return [b for mine in kept.values() for b in mine.values()]


def _rows(state: KVState, rows: list[int], room: int) -> KVState:
    """Copies of some rows, no longer than they are used, with `room` more places."""
    used = int(state.length_B[rows].max()) if rows else 0

    def pick(cache_LBSHK: Tensor) -> Tensor:
        return F.pad(cache_LBSHK[:, rows, :used], (0, 0, 0, 0, 0, room))

    return KVState(k_LBSHK=pick(state.k_LBSHK), v_LBSHK=pick(state.v_LBSHK), length_B=state.length_B[rows])
