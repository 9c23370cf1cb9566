"""Does speech carry its meaning into text? The written end of a spoken sentence against the end of another sentence.

Sentences come in pairs whose ends have equally many text ids, and each end is right once and wrong once. So a model that does not
listen is right exactly half of the time, whatever ends it likes. Asked are the sentence's own speech, its own text (what could be
reached), and, as a control, another sentence's speech, which must say nothing.
Trap: another sentence's speech never comes from the same pair. The partner's would be right for the wrong end, and one prompt for
both would give one right answer in two by arithmetic, from any model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechquilt.evals.intervals import accuracy, paired_difference
from speechquilt.evals.measures import Chart, Measure, Promise, Value, above_chance, at_chance, under
from speechquilt.evals.scorer import Request, Scorer
from speechquilt.types import Segment

CHANCE = 0.5
PROMPTS = {"speech": "its own speech", "other_speech": "another sentence's speech", "text": "its own text"}
SCORES = {"mean": "mean log-probability", "pmi": "gain in log-probability over no prompt"}
RUNS = ("plain", "latent")
_WORDS = PROMPTS | SCORES
_FIELDS = (
    Measure(key="low", kind="share", meaning="lower end of its 95 % interval (Wilson, a pair of sentences counts as one)"),
    Measure(key="high", kind="share", meaning="upper end of the same interval"),
    Measure(key="n", kind="count", meaning="sentences"),
    Measure(key="clusters", kind="count", meaning="pairs of sentences"),
    Measure(key="chance", kind="share", meaning="what a model that does not listen gets"),
)  # fmt: skip
_GAIN = (
    Measure(key="low", kind="difference", meaning="lower end of its 95 % interval (paired bootstrap over pairs of sentences)"),
    Measure(key="high", kind="difference", meaning="upper end of the same interval"),
    Measure(key="n", kind="count", meaning="sentences"),
    Measure(key="clusters", kind="count", meaning="pairs of sentences"),
)  # fmt: skip
_WHAT, _GAIN_WHAT = "written ends of spoken sentences", "what listening adds"
MEASURES = (
    Measure(
        key="lm.<run>.continuation.<prompt>.<score>.accuracy", kind="share",
        meaning=f"{_WHAT}: share where the sentence's own is likelier than another's",
        promise=(
            Promise(
                name="The written end of a spoken sentence is the likelier one, <run>, <score>", bound=above_chance(),
                where={"run": RUNS, "prompt": ("speech",), "score": tuple(SCORES)}, words=_WORDS,
            ),
            Promise(
                name="The same behind another sentence's speech is guessed, <run>, <score>", bound=at_chance(),
                where={"run": RUNS, "prompt": ("other_speech",), "score": tuple(SCORES)}, words=_WORDS,
            ),
        ),
        chart=Chart(title="The written end of a sentence, two to choose from", words=_WORDS),
    ),
    *under("lm.<run>.continuation.<prompt>.<score>", _WHAT, _FIELDS),
    Measure(
        key="lm.<run>.listening.<score>.difference", kind="difference",
        meaning=f"{_GAIN_WHAT}: accuracy behind the sentence's own speech minus that behind another's",
    ),
    *under("lm.<run>.listening.<score>", _GAIN_WHAT, _GAIN),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SplitSentence:
    """A sentence cut between two words: its first part spoken and written, its second part written."""

    id: str
    spoken: Segment
    written: Segment
    ending: Segment


Pair = tuple[SplitSentence, SplitSentence]


def pairs_of(sentences: Sequence[SplitSentence], most: int, seed: int = 0) -> list[Pair]:
    """At most `most` pairs, in random order, whose two endings are different and have equally many ids.

    A sentence takes part once, and so does an ending: a second voice or a common last word would count twice. Raises ValueError
    when there are not two pairs.
    """
    rng = np.random.default_rng(seed)
    waiting: dict[int, SplitSentence] = {}
    used: set[tuple[int, ...]] = set()
    pairs: list[Pair] = []
    for sentence in (sentences[i] for i in rng.permutation(len(sentences))):
        ending = tuple(sentence.ending.ids_T.tolist())
        if not ending or ending in used:
            continue
        used.add(ending)
        partner = waiting.pop(len(ending), None)
        if partner is None:
            waiting[len(ending)] = sentence
        else:
            pairs.append((partner, sentence))
    if len(pairs) < 2:
        raise ValueError(
            f"{len(sentences)} sentences make {len(pairs)} pairs with endings of one length; at least 2 are needed, give more"
        )
    return [pairs[i] for i in rng.permutation(len(pairs))[:most]]


def continuations(run: str, scorer: Scorer, pairs: Sequence[Pair]) -> dict[str, Value]:
    """`lm.<run>.continuation.*` and `lm.<run>.listening.*`. A tie is wrong."""
    right = answers(scorer, pairs)
    clusters = [str(k) for k in range(len(pairs)) for _ in range(2)]
    found: dict[str, Value] = {}
    for (prompt, score), correct in right.items():
        measured = vars(accuracy(correct, clusters))
        prefix = f"lm.{run}.continuation.{prompt}.{score}"
        found |= {f"{prefix}.{'accuracy' if key == 'value' else key}": value for key, value in measured.items()}
        found[f"{prefix}.chance"] = CHANCE
    for score in SCORES:
        gain = vars(paired_difference(right["speech", score], right["other_speech", score], clusters))
        prefix = f"lm.{run}.listening.{score}"
        found |= {f"{prefix}.{'difference' if key == 'value' else key}": value for key, value in gain.items()}
    return found


def answers(scorer: Scorer, pairs: Sequence[Pair]) -> dict[tuple[str, str], list[bool]]:
    """(prompt, score) -> whether each sentence's own ending is the likelier one; sentences in the order of the pairs."""
    requests: dict[str, list[Request]] = {"none": [Request((), s.ending) for pair in pairs for s in pair]}
    for prompt in PROMPTS:
        requests[prompt] = [
            Request((front,), ending)
            for k, pair in enumerate(pairs)
            for i, front in enumerate(fronts(pairs, k, prompt))
            for ending in (pair[i].ending, pair[1 - i].ending)
        ]
    scored = iter(scorer.log_likelihoods([request for asked in requests.values() for request in asked]))
    means = {name: np.array([next(scored).mean for _ in asked]) for name, asked in requests.items()}
    alone_P2 = means.pop("none").reshape(-1, 2)
    prior_N2 = np.stack([alone_P2, alone_P2[:, ::-1]], axis=1).reshape(-1, 2)  # own, partner's
    right: dict[tuple[str, str], list[bool]] = {}
    for prompt, mean in means.items():
        mean_N2 = mean.reshape(-1, 2)
        for score, score_N2 in {"mean": mean_N2, "pmi": mean_N2 - prior_N2}.items():
            right[prompt, score] = (score_N2[:, 0] > score_N2[:, 1]).tolist()
    return right


def fronts(pairs: Sequence[Pair], k: int, prompt: str) -> list[Segment]:
    """What stands in front of the two endings of pair `k`; another sentence's speech is that of the next pair."""
    if prompt == "text":
        return [sentence.written for sentence in pairs[k]]
    return [sentence.spoken for sentence in pairs[(k + 1) % len(pairs) if prompt == "other_speech" else k]]
