"""The interleaving study: mixtures are the asked ones, seeds are pooled, and a small one runs to its tables and goes on after a stop."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import config as configs
from speechquilt.commands.grammar import parse
from speechquilt.data.interleaving.synthetic import InterleaveConfig, InterleaveStats
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.files import write_json
from speechquilt.recipes import defaults
from speechquilt.recipes.toy import pipeline
from speechquilt.stages import training_documents
from speechquilt.stages.stage import MARK, Story
from speechquilt.stages.train_lm import train_lm
from speechquilt.stages.training_documents import write_documents
from speechquilt.studies import interleaved_data, seeds
from speechquilt.studies.interleaved_data import Condition, InterleavingConfig, Question
from speechquilt.text import TextTokenizer
from speechquilt.types import Document, SpokenSpan, TextDocument, UnitEnd
from speechquilt.vocab import Vocab
from tests.e2e.test_story import SETTINGS

RECORDED = ("parallel", "speech", "asr", "tts")
INTERLEAVED = set(pipeline.INTERLEAVED)
weight = st.floats(0.05, 1.0)


@settings(max_examples=50, deadline=None)
@given(weights=st.fixed_dictionaries(dict.fromkeys(defaults.WEIGHTS, weight)), amount=st.floats(0.01, 1.0))
def test_interleaved_data_has_its_share_and_the_others_fill_up_in_proportion(weights, amount):
    total, interleaved = sum(weights.values()), sum(weights[s] for s in INTERLEAVED)
    for kind in ("both", "synthetic", "parallel"):
        mixed = Condition(amount=amount, interleaving=kind).weights(weights)
        assert sum(mixed.values()) == pytest.approx(1)
        assert sum(mixed.get(s, 0) for s in INTERLEAVED) == pytest.approx(amount * interleaved / total)
        others = weights.keys() - INTERLEAVED
        assert len({round(mixed[s] / weights[s], 9) for s in others}) == 1
        assert (
            INTERLEAVED & mixed.keys()
            == {"both": INTERLEAVED, "synthetic": {"interleaved"}, "parallel": {"parallel"}}[kind]
        )


def test_the_baseline_mixes_as_the_story_does():
    assert Condition().weights(defaults.WEIGHTS) == pytest.approx(defaults.WEIGHTS)
    assert Condition(amount=0).weights(defaults.WEIGHTS).keys() == defaults.WEIGHTS.keys() - INTERLEAVED


def test_a_source_left_out_is_shared_by_all_others():
    mixed = Condition(without=RECORDED).weights(defaults.WEIGHTS)
    assert mixed == pytest.approx({"text": 0.12 / 0.47, "interleaved": 0.35 / 0.47})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(amount=2), "amount=2 makes interleaved data 1.06 of all tokens"),
        (Condition(without=("tts", "txet")), "without names 'txet'"),
        (Condition(without=tuple(defaults.WEIGHTS)), "leaves no source to read"),
    ],
)
def test_an_impossible_mixture_is_refused(condition, message):
    with pytest.raises(ValueError, match=message):
        condition.weights(defaults.WEIGHTS)


def test_conditions_that_coincide_are_one_run():
    config = InterleavingConfig()
    asked = [c for question in config.questions.values() for c in question.conditions.values()]
    names = [condition.name for condition in config.conditions]
    assert (len(asked), len(names), len(set(names))) == (15, 12, 12)
    assert asked.count(Condition()) == 4
    assert configs.from_dict(InterleavingConfig, configs.to_dict(config)) == config  # every setting survives JSON


def test_a_question_is_asked_against_one_of_its_conditions():
    with pytest.raises(ValueError, match="against='2' must be one of 1"):
        Question(conditions={"1": Condition()}, against="2")


class Reader:
    """Speaks three tokens a word, as if it were a text-to-token model."""

    frame_rate = 12.5

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> list[SpokenSpan]:
        return [self._speak(text) for text in texts]

    def _speak(self, text: str) -> SpokenSpan:
        ends_T = np.array(
            [e for word in text.split() for e in (UnitEnd.NONE, UnitEnd.NONE, UnitEnd.WORD)], dtype=np.uint8
        )
        return SpokenSpan(ids_T=np.arange(len(ends_T), dtype=np.int32), unit_end_T=ends_T)


def stories_to_read() -> tuple[list[TextDocument], TextTokenizer, ShardInfo]:
    stories = MicroWorldConfig().build().documents("story", 30, seed=0)
    texts = [TextDocument(id=f"story-{i}", text=text) for i, text in enumerate(stories)]
    tokenizer = TextTokenizer.train([t.text for t in texts], 1000)
    info = training_documents.shard_info(
        Vocab(num_text=tokenizer.size, num_speech=256), tokenizer, "speech", recipe="toy"
    )
    return texts, tokenizer, info


def content(folder: ShardFolder) -> list:
    return [[(s.modality, s.ids_T.tolist()) for s in folder[i].segments] for i in range(len(folder))]


def test_shards_of_another_ratio_hold_the_same_texts_with_more_or_less_of_them_spoken(tmp_path):
    texts, tokenizer, info = stories_to_read()
    stats, reader = InterleaveStats(), Reader()
    made = training_documents.interleaved_documents(texts, reader, tokenizer, 2, InterleaveConfig(), stats)
    write_documents(tmp_path / "before", info, made)
    before = ShardFolder(tmp_path / "before")
    assert interleaved_data.interleaved_texts(before) == texts
    for ratio in (0.1, 0.3, 0.5):
        folder, config = tmp_path / str(ratio), InterleaveConfig(ratio=ratio)
        counts = interleaved_data.interleave_again(before, reader, tokenizer, 2, config, folder)
        again = ShardFolder(folder)
        assert counts["shards.interleaved.ratio"] == pytest.approx(ratio, abs=0.01)
        assert [again[i].id for i in range(len(again))] == [before[i].id for i in range(len(before))]
        assert (content(again) == content(before)) == (ratio == 0.3)  # the same ratio: the same shards
        spoken = [s for i in range(len(again)) for s in again[i].segments if s.modality == "speech"]
        assert all(s.unit_end_T is not None for s in spoken)
        assert again.info.made_by["ratio"] == ratio
        again.check(speech_fingerprint="speech", text_fingerprint=training_documents.text_fingerprint(tokenizer))


def test_a_curriculum_trains_where_only_the_text_to_token_model_has_spoken(tmp_path):
    texts, tokenizer, info = stories_to_read()
    made = training_documents.interleaved_documents(
        texts, Reader(), tokenizer, 1, InterleaveConfig(), InterleaveStats()
    )
    write_documents(tmp_path / "interleaved", info, made)
    write_documents(tmp_path / "text", info, training_documents.text_documents(texts, tokenizer))
    recipe = interleaved_data.lm_recipe(tiny(tmp_path), Condition(without=RECORDED, patcher="curriculum"), seed=0)
    folders = {source: tmp_path / source for source in recipe.weights}
    trained = train_lm(recipe, folders, tokenizer, tmp_path / "lm", "run")
    assert trained["lm.run.speech_tokens"] > 100
    assert 2 < trained["lm.run.patch_size"] < 3  # words of three tokens, then patches of two

    without_ends = [replace(s, unit_end_T=None) for s in ShardFolder(folders["interleaved"])[0].segments]
    document = Document(id="no ends", segments=tuple(without_ends), source="interleaved")
    write_documents(folders["interleaved"], info, [(document, "")])
    with pytest.raises(ValueError, match="speech without unit_end_T"):  # so the ends above were read
        train_lm(recipe, folders, tokenizer, tmp_path / "lm_2", "run")


def write_details(evals: Path, run: str, **items: list[dict]) -> None:
    (evals / run).mkdir(parents=True)
    write_json(evals / run / seeds.DETAILS, {key: {"items": of} for key, of in items.items()})


def test_seeds_are_pooled_and_gains_are_over_the_same_stories(tmp_path):
    def answers(*correct: bool) -> list[dict]:
        return [{"cluster": f"s{i // 2}", "correct": c} for i, c in enumerate(correct)]

    write_details(tmp_path, "a_seed0", task=answers(True, True, True, False))
    write_details(tmp_path, "a_seed1", task=answers(True, True, False, False))
    write_details(tmp_path, "b_seed0", task=answers(False, True, True, False))
    write_details(tmp_path, "b_seed1", task=answers(False, True, False, False))
    a, b = seeds.run_names("a", (0, 1)), seeds.run_names("b", (0, 1))
    found = seeds.pooled_accuracy(tmp_path, "task", a, b)
    assert (found["value"], found["n"], found["clusters"], found["seeds"]) == (0.625, 8, 2, [0.75, 0.5])
    assert found["gain"]["value"] == 0.25
    assert (found["gain"]["low"], found["gain"]["high"]) == (0, 0.5)  # s0 gains a half, s1 nothing
    assert seeds.accuracy_cell(found).endswith("(75 50) +25.0 [0, 50]")
    assert seeds.accuracy_cell(seeds.pooled_accuracy(tmp_path, "task", a, a)).endswith("(75 50)")


def test_losses_are_per_token_with_an_interval_over_stories(tmp_path):
    tokens = np.arange(1, 41)

    def losses(per_token: np.ndarray) -> list[dict]:
        return [{"nats": float(x * n), "tokens": int(n)} for x, n in zip(per_token, tokens)]

    spread = np.linspace(-0.5, 0.5, 40)
    write_details(tmp_path, "a_seed0", loss=losses(2 + spread))
    write_details(tmp_path, "a_seed1", loss=losses(3 + spread))
    write_details(tmp_path, "b_seed0", loss=losses(1 + spread))
    write_details(tmp_path, "b_seed1", loss=losses(3 + spread))
    found = seeds.pooled_loss(tmp_path, "loss", seeds.run_names("a", (0, 1)), seeds.run_names("b", (0, 1)))
    mean = float((spread * tokens).sum() / tokens.sum())
    assert found["value"] == pytest.approx(2.5 + mean)
    assert found["seeds"] == pytest.approx([2 + mean, 3 + mean])
    assert found["low"] < found["value"] < found["high"]
    assert [found["gain"][key] for key in ("value", "low", "high")] == pytest.approx(
        [0.5] * 3
    )  # the same for every story


def tiny(run_dir: Path) -> InterleavingConfig:
    small = ["width=32", "num_layers=1", "ffn_width=64"]
    models = [f"--{model}.{setting}" for model in ("plain.llama", "lm.model.global_") for setting in small]
    speaks = ["--text_to_token.train.steps=40", "--text_to_token.train.warmup_steps=4"]  # else every span is refused
    settings = parse(pipeline.ToyConfig, [*SETTINGS, *models, *speaks, f"--run-dir={run_dir / 'story'}"])
    alone = Condition(without=RECORDED, patcher="curriculum")
    return InterleavingConfig(
        run_dir=str(run_dir / "study"),
        story=settings,
        seeds=(0,),
        steps=6,
        num_stories=2,
        questions={
            "ratio": Question(conditions={"0.3": Condition(), "0.5": Condition(ratio=0.5)}, against="0.3"),
            "alone": Question(conditions={"all": Condition(), "synthetic": alone}, against="all"),
        },
    )


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_small_study_ends_in_its_tables_and_goes_on_where_it_was_stopped(tmp_path):
    config = tiny(tmp_path)
    page = interleaved_data.study(config)
    before, story, made = page.read_text(), times(tmp_path / "story"), times(tmp_path / "study" / "lm")
    rows = json.loads((tmp_path / "study" / "results.json").read_text())["questions"]
    assert json.loads((tmp_path / "story" / "shards" / MARK).read_text())["results"]["shards.interleaved.ratio"] > 0
    assert rows["ratio"]["0.3"] == rows["alone"]["all"]  # one run in two questions
    assert rows["ratio"]["0.5"]["story.topic.SS"]["n"] == 2
    assert len({row["speech_loss"]["value"] for of in rows.values() for row in of.values()}) == 3
    assert rows["alone"]["synthetic"]["weights"].keys() == {"text", "interleaved"}
    assert before.count("\n") == 5 * (2 + 4) + 4

    lost = tmp_path / "study" / "lm" / "baseline_seed0"
    for path in (page, lost / MARK, tmp_path / "study" / "evals" / "ratio_0_5_seed0" / MARK):
        path.unlink()
    given = replace(config, prepared=config.story.run_dir, story=replace(config.story, run_dir="nowhere"))
    assert interleaved_data.study(given).read_text() == before
    assert times(tmp_path / "story") == story
    again = times(tmp_path / "study" / "lm")
    assert {path for path in again if again[path] != made.get(path)} <= set(lost.rglob("*"))
    check_prepared(config, tmp_path)
    check_voiced(config, tmp_path)


def check_prepared(config: InterleavingConfig, run_dir: Path) -> None:
    """A finished story is taken as it is, but not for another world, and not when a stage is missing."""
    made = pipeline.prepare(pipeline.scaled(config.story), Story(run_dir / "story"))
    assert replace(config, prepared=str(run_dir / "story")).start() == made
    with pytest.raises(ValueError, match="another world"):
        replace(
            config, story=replace(config.story, world=MicroWorldConfig(seed=5)), prepared=str(run_dir / "story")
        ).start()
    with pytest.raises(FileNotFoundError, match="world is not a finished stage"):
        replace(config, prepared=str(run_dir / "study")).start()


def check_voiced(config: InterleavingConfig, run_dir: Path) -> None:
    """What was tokenised once is what a run would have made itself."""
    made = pipeline.prepare(pipeline.scaled(config.story), Story(run_dir / "story"))
    kept = interleaved_data.read_voiced(run_dir / "study" / "voiced" / interleaved_data.VOICED)
    interleaved_data.voice(config, made, run_dir)
    assert {key: s.ids_T.tolist() for key, s in kept.items()} == {
        key: s.ids_T.tolist() for key, s in interleaved_data.read_voiced(run_dir / interleaved_data.VOICED).items()
    }
