"""Tasks: pick the most likely ending, and answer a question, each with everything its score depends on.

Trap: a score is only comparable with the same name, version and settings; all three are in every result. Change how
items are laid out or matched, and the version goes up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechquilt.config import fingerprint
from speechquilt.evals.intervals import accuracy
from speechquilt.evals.scorer import Request, Scorer
from speechquilt.text import spoken_form
from speechquilt.types import Modality, Segment

NUM_TRANSCRIPTS = 20  # generated answers kept for the report


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A prompt, which may be empty, and its possible endings; `answer` indexes the right one. Items about one fact share their
    `cluster`."""

    id: str
    cluster: str
    prompt: tuple[Segment, ...]
    endings: tuple[Segment, ...]
    answer: int

    def __post_init__(self) -> None:
        if isinstance(self.answer, bool) or not isinstance(self.answer, int):
            raise ValueError(
                f"item {self.id!r}: answer={self.answer!r} must be a whole number, the index of the right ending"
            )
        if len(self.endings) < 2:
            raise ValueError(
                f"item {self.id!r}: {len(self.endings)} endings, there must be at least 2 endings to choose among"
            )
        if not 0 <= self.answer < len(self.endings):
            raise ValueError(f"item {self.id!r}: answer={self.answer} must index one of {len(self.endings)} endings")


@dataclass(frozen=True, kw_only=True)
class AnswerItem:
    """A question with every accepted answer; `choices` are all the answers one could guess among, aliases left out,
    or empty for an open question."""

    id: str
    cluster: str
    prompt: tuple[Segment, ...]
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.answers or not all(spoken_form(a) for a in self.answers):
            raise ValueError(f"item {self.id!r}: answers={self.answers} must hold at least one word each")


@dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """Right when the true ending is strictly the most likely (spec latent-speech-text 9, synthetic-interleaved 8).

    The main score is by mean log-probability per ending token; by the sum is reported beside it. A tie is wrong.
    """

    name: str
    version: int
    items: Sequence[ChoiceItem]

    def run(self, scorer: Scorer) -> dict[str, Any]:
        """-> name, version, settings, chance, `accuracy` and `accuracy_sum` (value, low, high, n, clusters), items."""
        _check_items(self.name, self.items)
        requests = [Request(item.prompt, ending) for item in self.items for ending in item.endings]
        scores = iter(scorer.log_likelihoods(requests))
        rows: list[dict[str, Any]] = []
        for item in self.items:
            endings = [next(scores) for _ in item.endings]
            rows.append(
                {
                    "id": item.id,
                    "cluster": item.cluster,
                    "correct": _is_best([e.mean for e in endings], item.answer),
                    "correct_sum": _is_best([e.sum for e in endings], item.answer),
                }
            )
        clusters = [item.cluster for item in self.items]
        content = [[_ids(i.prompt), _ids(i.endings), i.answer] for i in self.items]
        return {
            "name": self.name,
            "version": self.version,
            "settings": {
                "score": "mean log-probability per ending token; accuracy_sum by the summed log-probability",
                "unscored": "prompt, markers, EOS",
                "tie": "wrong",
                "items": fingerprint(content),
                **scorer.settings,
            },
            "chance": float(np.mean([1 / len(item.endings) for item in self.items])),
            "accuracy": vars(accuracy([r["correct"] for r in rows], clusters)),
            "accuracy_sum": vars(accuracy([r["correct_sum"] for r in rows], clusters)),
            "items": rows,
        }


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """Right when the greedy answer, as text, contains an accepted answer in whole words (spec synthetic-interleaved 8).

    `decode_text` turns text ids into text; `read_back` turns many runs of speech ids into text, with the speech
    tokenizer's own ASR head. Only the one that `modality` needs must be given. An answer that lists every choice
    contains the right one, so `accuracy_first` also demands that no other of the item's choices comes before it.
    """

    name: str
    version: int
    items: Sequence[AnswerItem]
    modality: Modality
    max_tokens: int
    decode_text: Callable[[Sequence[int]], str] | None = None
    read_back: Callable[[list[np.ndarray]], list[str]] | None = None

    def run(self, scorer: Scorer) -> dict[str, Any]:
        """-> as `ChoiceTask.run`, with `accuracy_first` instead of `accuracy_sum`, and the first transcripts."""
        _check_items(self.name, self.items)
        generated = scorer.generate([item.prompt for item in self.items], self.modality, self.max_tokens)
        heard = self._texts(generated)
        rows: list[dict[str, Any]] = [
            {
                "id": item.id,
                "cluster": item.cluster,
                "correct": first_mention(text, item.answers) is not None,
                "correct_first": _names_first(text, item),
            }
            for item, text in zip(self.items, heard)
        ]
        clusters = [item.cluster for item in self.items]
        content = [[_ids(i.prompt), i.answers, i.choices] for i in self.items]
        return {
            "name": self.name,
            "version": self.version,
            "settings": {
                "decoding": {"temperature": 0.0, "max_tokens": self.max_tokens, "modality": self.modality},
                "ends": "any marker or EOS",
                "match": "an accepted answer in whole words, both sides in spoken form; accuracy_first: before any other choice",
                "items": fingerprint(content),
                **scorer.settings,
            },
            "chance": float(np.mean([1 / len(i.choices) if i.choices else 0.0 for i in self.items])),
            "accuracy": vars(accuracy([r["correct"] for r in rows], clusters)),
            "accuracy_first": vars(accuracy([r["correct_first"] for r in rows], clusters)),
            "items": rows,
            "transcripts": [
                {"id": item.id, "answers": list(item.answers), "heard": text, "ids": ids.tolist(), **_verdict(row)}
                for item, text, ids, row in list(zip(self.items, heard, generated, rows))[:NUM_TRANSCRIPTS]
            ],
        }

    def _texts(self, generated: list[np.ndarray]) -> list[str]:
        if self.modality == "speech":
            if self.read_back is None:
                raise ValueError(f"task {self.name!r} answers in speech; give read_back to turn its tokens into text")
            return self.read_back(generated)
        if self.decode_text is None:
            raise ValueError(f"task {self.name!r} answers in text; give decode_text to turn its ids into text")
        return [self.decode_text(ids.tolist()) for ids in generated]


def first_mention(text: str, names: Sequence[str]) -> int | None:
    """Word position of the first of `names` that `text` contains in whole words, both in spoken form; None if none."""
    padded = f" {spoken_form(text)} "
    found = [padded.find(f" {spoken_form(name)} ") for name in names]
    return min((padded[:at].count(" ") for at in found if at >= 0), default=None)


def _names_first(text: str, item: AnswerItem) -> bool:
    accepted = {spoken_form(a) for a in item.answers}
    right = first_mention(text, item.answers)
    other = first_mention(text, [c for c in item.choices if spoken_form(c) not in accepted])
    return right is not None and (other is None or right < other)


def _is_best(scores: Sequence[float], answer: int) -> bool:
    return all(scores[answer] > s for i, s in enumerate(scores) if i != answer)


def _verdict(row: dict[str, Any]) -> dict[str, bool]:
    return {"correct": row["correct"], "correct_first": row["correct_first"]}


def _ids(segments: Sequence[Segment]) -> list[list[Any]]:
    return [[s.modality, s.ids_T.tolist()] for s in segments]


def _check_items(name: str, items: Sequence[ChoiceItem] | Sequence[AnswerItem]) -> None:
    if not items:
        raise ValueError(f"task {name!r} has no items; build it with at least one")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        raise ValueError(f"task {name!r}: {len(ids) - len(set(ids))} item ids are used twice; ids must be distinct")
