"""results.json: known keys with fitting values go in and come back, everything else is refused with a remedy."""

import json

import pytest

from speechquilt.evals import results
from speechquilt.evals.intervals import accuracy, paired_difference
from speechquilt.evals.results import SCHEMA, field, read_results, task_results, transfer_results, write_results


def test_round_trip_is_flat_sorted_and_leaves_no_partial_file(tmp_path):
    data = {"tokenizer.wer": 0.02, "lm.lst.units": 12, "run.device": "cpu", "tokenizer.streaming_equals_offline": True}
    path = write_results(tmp_path / "results.json", data)
    assert read_results(path) == data
    assert list(json.loads(path.read_text())) == sorted(data)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_every_promised_key_is_in_the_schema():
    for key in [
        "tokenizer.wer",
        "tokenizer.codebook_used",
        "tokenizer.streaming_equals_offline",
        "text_to_token.wer",
        "text_to_token.wer_spans_1_3",
        "text_to_token.wer_spans_4_9",
        "text_to_token.wer_spans_10_plus",
        "lm.lst-curriculum.story.topic.SS.accuracy",
        "lm.plain.story.topic.TT.low",
        "lm.plain.fact.text_only.ST.accuracy_sum",
        "lm.plain.qa.text_only.SS.accuracy_first",
        "lm.lst.speech_loss",
        "lm.lst.units",
        "lm.lst.tokens",
        "lm.lst.flops",
        "lm.lst.seconds",
        "lm.lst.patch_size",
        "facts.transfer.text.ST.difference",
        "stage.tokenizer.seconds",
    ]:
        assert field(key).meaning


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("tokenizer.wr", "tokenizer.wer"),
        ("lm.lst.story.topic.SS.acuracy", "lm.lst.story.topic.SS.accuracy"),
        ("lm.lst.story.topic.XX.accuracy", "lm.lst.story.topic.<pair>.accuracy"),
        ("lm.a.b.units", "lm.a.units"),
        ("lm..units", "did you mean"),
        ("", "known keys"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path, key, hint):
    with pytest.raises(ValueError, match="unknown result key") as error:
        write_results(tmp_path / "r.json", {key: 1})
    assert hint in str(error.value)
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.wer", float("nan")),
        ("tokenizer.wer", True),
        ("tokenizer.wer", None),
        ("tokenizer.codebook_used", 1.2),
        ("lm.lst.units", 2.5),
        ("lm.lst.units", -1),
        ("tokenizer.streaming_equals_offline", 1),
        ("run.device", 3),
        ("facts.transfer.text.ST.low", -1.5),
    ],
)
def test_values_must_fit(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"result {key}"):
        write_results(tmp_path / "r.json", {key: value})


def test_task_and_transfer_results_are_all_in_the_schema():
    measured = vars(accuracy([True, False], ["a", "b"]))
    result = {"accuracy": measured, "accuracy_sum": measured, "chance": 0.5, "version": 1, "items": [], "name": "x"}
    lines = task_results("lm.lst.story.topic.SS", result)
    results.check(lines)
    assert lines["lm.lst.story.topic.SS.accuracy"] == lines["lm.lst.story.topic.SS.accuracy_sum"] == 0.5
    assert len(lines) == 8
    difference = paired_difference([True, True], [False, True], ["a", "b"])
    lines = transfer_results("facts.transfer.text.ST", difference, 1.0, 0.5)
    results.check(lines)
    assert lines["facts.transfer.text.ST.difference"] == 0.5


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="evals stage"):
        read_results(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_results(tmp_path / "r.json")


def test_markdown_has_every_key():
    table = results.schema_markdown()
    assert all(f"`{key}`" in table for key in SCHEMA)
