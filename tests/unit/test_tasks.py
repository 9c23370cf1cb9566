"""Tasks on a scorer whose every number is known: mean against sum, ties, matching, what a result carries."""

import json

import numpy as np
import pytest

from speechquilt.evals.scorer import LogLikelihood
from speechquilt.evals.tasks import AnswerItem, AnswerTask, ChoiceItem, ChoiceTask, first_mention
from speechquilt.types import Segment


def text(*ids):
    return Segment(modality="text", ids_T=np.array(ids, dtype=np.int32))


class FakeScorer:
    """A token i has log-probability -i; the answer to a prompt is the prompt's own ids."""

    settings = {"patcher": "none"}  # noqa: RUF012

    def log_likelihoods(self, requests):
        return [LogLikelihood(-float(c.ids_T.sum()), len(c.ids_T)) for _, c in requests]

    def generate(self, prompts, modality, max_tokens):
        return [p[-1].ids_T[:max_tokens] for p in prompts]


def choice(name, cluster, answer, *endings):
    return ChoiceItem(id=name, cluster=cluster, prompt=(text(1),), endings=endings, answer=answer)


def test_mean_and_sum_can_disagree():
    """Ending 0: mean -3, sum -3. Ending 1: mean -2, sum -4."""
    result = ChoiceTask(name="t", version=1, items=[choice("a", "a", 1, text(3), text(2, 2))]).run(FakeScorer())
    assert result["accuracy"]["value"] == 1.0
    assert result["accuracy_sum"]["value"] == 0.0


def test_a_tie_is_wrong_wherever_the_answer_stands():
    items = [choice(str(k), "a", k, text(2), text(2)) for k in (0, 1)]
    assert ChoiceTask(name="t", version=1, items=items).run(FakeScorer())["accuracy"]["value"] == 0.0


def test_result_carries_what_a_score_depends_on():
    items = [choice("a", "x", 0, text(1), text(2)), choice("b", "x", 3, text(5), text(4), text(3), text(2))]
    result = ChoiceTask(name="story", version=3, items=items).run(FakeScorer())
    assert (result["name"], result["version"], result["chance"]) == ("story", 3, (1 / 2 + 1 / 4) / 2)
    assert (result["accuracy"]["n"], result["accuracy"]["clusters"]) == (2, 1)
    assert result["settings"]["patcher"] == "none"
    assert [r["correct"] for r in result["items"]] == [True, True]
    other = ChoiceTask(name="story", version=3, items=items[:1]).run(FakeScorer())
    assert result["settings"]["items"] != other["settings"]["items"]
    json.dumps(result)


WORDS = ["mira", "tom", "lives", "in", "the", "red", "house", "blue"]


def answer_task(items, modality="text", max_tokens=20, **given):
    given = given or {"decode_text": lambda ids: " ".join(WORDS[i] for i in ids)}
    return AnswerTask(name="qa", version=1, items=items, modality=modality, max_tokens=max_tokens, **given)


def question(name, says, answers, choices=()):
    prompt = (text(*[WORDS.index(w) for w in says.split()]),)
    return AnswerItem(id=name, cluster=name, prompt=prompt, answers=answers, choices=choices)


def test_containment_in_whole_words_of_any_alias():
    items = [
        question("a", "mira lives in the red house", ("the Red House!",)),
        question("b", "mira lives in the house", ("green", "house")),
        question("c", "the house", ("hous",)),
        question("d", "the blue house", ("red house",)),
    ]
    result = answer_task(items).run(FakeScorer())
    assert [r["correct"] for r in result["items"]] == [True, True, False, False]
    assert result["chance"] == 0.0


def test_listing_every_choice_is_not_an_answer():
    choices = ("mira", "tom")
    items = [question("a", "tom mira", ("mira",), choices), question("b", "mira tom", ("Mira",), choices)]
    result = answer_task(items).run(FakeScorer())
    assert result["accuracy"]["value"] == 1.0
    assert [r["correct_first"] for r in result["items"]] == [False, True]
    assert result["chance"] == 0.5


def test_speech_answers_go_through_read_back_and_the_limit_is_recorded():
    items = [question(str(i), "tom lives in the house", ("house",)) for i in range(25)]

    def read_back(runs):
        return [" ".join(WORDS[i] for i in ids) for ids in runs]

    result = answer_task(items, "speech", max_tokens=4, read_back=read_back).run(FakeScorer())
    assert result["accuracy"]["value"] == 0.0  # "house" is the fifth word
    assert result["settings"]["decoding"] == {"temperature": 0.0, "max_tokens": 4, "modality": "speech"}
    assert len(result["transcripts"]) == 20
    assert result["transcripts"][0]["heard"] == "tom lives in the"
    assert result["transcripts"][0]["ids"] == [1, 2, 3, 4]
    json.dumps(result)


def test_first_mention_counts_words():
    assert first_mention("In the Red house, Tom!", ["tom", "red house"]) == 2
    assert first_mention("in the redhouse", ["red"]) is None


def test_errors_name_the_item_and_the_remedy():
    with pytest.raises(ValueError, match="answer=2 must index one of 2"):
        choice("a", "a", 2, text(1), text(2))
    with pytest.raises(ValueError, match="at least one word"):
        question("a", "tom", ("...",))
    with pytest.raises(ValueError, match="no items"):
        ChoiceTask(name="t", version=1, items=[]).run(FakeScorer())
    with pytest.raises(ValueError, match="distinct"):
        answer_task([question("a", "tom", ("tom",))] * 2).run(FakeScorer())
    with pytest.raises(ValueError, match="give read_back"):
        answer_task([question("a", "tom", ("tom",))], "speech", decode_text=str).run(FakeScorer())
    with pytest.raises(ValueError, match="give decode_text"):
        answer_task([question("a", "tom", ("tom",))], read_back=list).run(FakeScorer())
