"""The plan of the real story: one knob for its length, what it needs before it begins, which texts it keeps, what it promises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from speechquilt.commands.grammar import parse
from speechquilt.config import from_dict, to_dict
from speechquilt.recipes.real import real_texts
from speechquilt.recipes.real.given import Needed, check
from speechquilt.recipes.real.promises import SCHEMA
from speechquilt.recipes.real.real_story import RealConfig, carried_out, story
from speechquilt.recipes.real.real_texts import RealTextsConfig, write_texts
from speechquilt.recipes.real.sizes import shrunk
from speechquilt.text import spoken_form
from speechquilt.types import TextDocument


def amounts(config: RealConfig) -> dict[str, int]:
    """Everything that costs time."""
    trainings = {
        "first": config.tokenizer.first,
        "tokenizer": config.tokenizer.train,
        "reader": config.reader.train,
        "text_to_token": config.text_to_token.train,
        "plain": config.plain.train,
        "latent": config.latent.train,
    }
    return {
        **{name: train.steps for name, train in trainings.items() if train},
        **{f"{name} warm-up": train.warmup_steps for name, train in trainings.items() if train},
        "sentences": config.corpus.sentences,
        "held out": config.corpus.held_out,
        "voice": config.voice.sentences,
        "spoken": config.spoken,
        "words": config.texts.words,
        "codes": config.tokenizer.model.codebook_size,
        **to_dict(config.evals),
    }


def test_the_whole_story_is_what_its_settings_say() -> None:
    config = RealConfig()
    assert amounts(carried_out(config)) == amounts(config)


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_scale_shrinks_all_work_alike(scale: float) -> None:
    config = RealConfig(scale=scale)
    whole, part = amounts(config), amounts(carried_out(config))
    for name in whole:
        assert part[name] < whole[name], name
        assert part[name] >= int(scale * whole[name]), name
    for run in ("plain", "latent", "text_to_token"):
        assert getattr(carried_out(config), run).train.warmup_steps <= getattr(carried_out(config), run).train.steps
    assert carried_out(config).text_to_token.llama == config.text_to_token.llama


def test_a_longer_story_has_no_larger_codebook() -> None:
    twice = amounts(carried_out(RealConfig(scale=2.0)))
    assert twice["codes"] == amounts(RealConfig())["codes"]
    assert twice["tokenizer"] == 2 * amounts(RealConfig())["tokenizer"]


def test_the_smallest_number_is_never_more_than_what_was_asked_for() -> None:
    assert (shrunk(1000, 0.001, 20), shrunk(10, 0.5, 20), shrunk(10, 1.0, 20)) == (20, 10, 10)


def test_both_language_models_and_the_tokenizer_start_where_the_settings_say() -> None:
    full = carried_out(RealConfig(whisper="my/whisper", language="de", base="my/base"))
    assert (full.tokenizer.start, full.tokenizer.language) == ("my/whisper", "de")
    assert {full.plain.warm_start, full.latent.warm_start} == {"my/base"}


def test_settings_of_a_run_folder_bring_the_story_back() -> None:
    config = parse(RealConfig, ["--scale=0.05", "--plain.train.steps=70"])
    assert from_dict(RealConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_scale_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="scale=0"):
        RealConfig(scale=0)


def test_everything_that_is_missing_is_named_before_any_work(tmp_path: Path) -> None:
    config = RealConfig(
        run_dir=str(tmp_path / "run"),
        whisper=str(tmp_path / "w"),
        base=str(tmp_path / "b"),
        texts=RealTextsConfig(folder=str(tmp_path / "t")),
    )
    with pytest.raises(FileNotFoundError) as error:
        story(config)
    for what in ("Whisper", "the text model", "make weights", "make texts", "--whisper", "--base"):
        assert what in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_natural_voice_that_cannot_speak_is_named_before_any_work(tmp_path: Path) -> None:
    for name in (
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "wordnet/data.noun",
        "bible/verses",
        "fortunes",
        "model.onnx",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    here = str(tmp_path)
    natural = replace(RealConfig().natural, folder=here)
    config = RealConfig(
        run_dir=f"{here}/run", whisper=here, base=here, texts=RealTextsConfig(folder=here), natural=natural
    )
    with pytest.raises(FileNotFoundError, match=r"voices\.safetensors"):
        story(config)
    assert not (tmp_path / "run").exists()


def test_what_is_there_is_not_complained_about(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    check([Needed("one", tmp_path / "here", "make one")])
    with pytest.raises(FileNotFoundError, match="two") as error:
        check([Needed("one", tmp_path / "here", "make one"), Needed("two", tmp_path / "gone", "make two")])
    assert "make one" not in str(error.value)


# --- the texts


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    documents = [
        TextDocument(id=f"d/{i}", text=f"Document {i} says this. And number {i} ends here.") for i in range(80)
    ]
    monkeypatch.setattr(real_texts, "_READERS", {"wordnet": lambda folder: iter(documents)})
    monkeypatch.setattr(real_texts, "KINDS", ("wordnet",))
    return tmp_path / "texts"


def read(folder: Path) -> dict[str, set[str]]:
    return {
        part: {json.loads(line)["id"] for line in (folder / part / "wordnet.jsonl").read_text().splitlines()}
        for part in (real_texts.TRAIN, real_texts.MEASURED)
    }


def test_texts_are_read_or_measured_never_both(written: Path) -> None:
    found = write_texts(RealTextsConfig(words=10_000), set(), written)
    parts = read(written)
    assert not parts["train"] & parts["held_out"]
    assert len(parts["train"] | parts["held_out"]) == 80
    assert 1 <= len(parts["held_out"]) <= 20
    assert found["texts.wordnet.documents"] == len(parts["train"])
    assert {d.id for d in real_texts.measured_texts(written, "wordnet")} == parts["held_out"]


def test_a_text_with_a_sentence_that_is_measured_is_left_out_of_both(written: Path) -> None:
    found = write_texts(RealTextsConfig(words=10_000), {spoken_form("number 7 ends here")}, written)
    parts = read(written)
    assert "d/7" not in parts["train"] | parts["held_out"]
    assert "d/77" in parts["train"] | parts["held_out"]  # "number 77" is another number
    assert found["texts.wordnet.left_out"] == 1


def test_fewer_words_are_a_part_of_more(written: Path) -> None:
    few = write_texts(RealTextsConfig(words=100), set(), written)
    first = read(written)["train"]
    write_texts(RealTextsConfig(words=200), set(), written)
    assert first < read(written)["train"]
    assert 100 <= few["texts.wordnet.words"] < 110


# --- the promises


def test_promises_are_those_of_the_issue() -> None:
    targets = {key: bound.text for measure in SCHEMA.measures for key, _, bound in measure.promised()}
    assert targets["heard.held_out.tokens.wer"] == "≤ 10 %"
    assert targets["heard.unseen_voice.tokens.wer"] == "≤ 20 %"
    assert targets["heard.human.tokens.wer"] == "≤ 25 %"
    assert targets["tokenizer.streaming_equals_offline"] == "yes"
    for length in ("1_3", "4_9", "10_plus", "sentence"):
        assert targets[f"text_to_token.spans.{length}.generated.wer"] == "≤ 15 %"
    for text in real_texts.KINDS:
        assert targets[f"noise.{text}.generated.wer"] == "≤ 25 %"
    for run in ("plain", "latent"):
        assert targets[f"lm.{run}.text.change"] == "≤ 0.1 nats"
        assert targets[f"lm.{run}.continuation.speech.pmi.accuracy"] == "interval above chance"
        assert targets[f"lm.{run}.continuation.other_speech.pmi.accuracy"] == "interval holds chance"
    assert "tokenizer.wer" not in targets  # what a hundred words allow


def test_what_was_not_measured_is_a_miss() -> None:
    assert not any(verdict.met for verdict in SCHEMA.verdicts({}))


def test_a_changed_number_is_another_story() -> None:
    config = RealConfig()
    assert carried_out(config) != carried_out(replace(config, scale=0.9))
