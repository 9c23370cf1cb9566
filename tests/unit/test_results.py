"""results.json: known keys with fitting values go in and come back, everything else is refused with a remedy."""

import json

import pytest

from speechquilt.evals.intervals import accuracy, paired_difference
from speechquilt.evals.measures import Measure, Promise, at_chance, at_least, at_most, at_most_amount
from speechquilt.evals.results import Schema, read_results, task_results, transfer_results, write_results
from speechquilt.recipes.toy import report_data
from speechquilt.recipes.toy.schema import SCHEMA


def test_round_trip_is_flat_sorted_and_leaves_no_partial_file(tmp_path):
    data = {"tokenizer.wer": 0.02, "lm.lst.units": 12, "run.device": "cpu", "tokenizer.streaming_equals_offline": True}
    path = write_results(tmp_path / "results.json", data, SCHEMA)
    assert read_results(path, SCHEMA) == data
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
        assert SCHEMA.measure(key).meaning


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
        write_results(tmp_path / "r.json", {key: 1}, SCHEMA)
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
        write_results(tmp_path / "r.json", {key: value}, SCHEMA)


def test_task_and_transfer_results_are_all_in_the_schema():
    measured = vars(accuracy([True, False], ["a", "b"]))
    result = {"accuracy": measured, "accuracy_sum": measured, "chance": 0.5, "version": 1, "items": [], "name": "x"}
    lines = task_results("lm.lst.story.topic.SS", result)
    SCHEMA.check(lines)
    assert lines["lm.lst.story.topic.SS.accuracy"] == lines["lm.lst.story.topic.SS.accuracy_sum"] == 0.5
    assert len(lines) == 8
    difference = paired_difference([True, True], [False, True], ["a", "b"])
    lines = transfer_results("facts.transfer.text.ST", difference, 1.0, 0.5)
    SCHEMA.check(lines)
    assert lines["facts.transfer.text.ST.difference"] == 0.5


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="evals stage"):
        read_results(tmp_path / "r.json", SCHEMA)
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_results(tmp_path / "r.json", SCHEMA)


def test_markdown_has_every_key():
    table = SCHEMA.markdown()
    assert all(f"`{measure.key}`" in table for measure in SCHEMA.measures)
    assert "| `tokenizer.lookahead_s` | a number not below 0, in s |" in table


def test_what_is_promised_is_needed_and_held_against_the_results():
    keys = SCHEMA.promised_keys()
    assert len(keys) == len(set(keys)) == 16
    assert set(keys) <= set(report_data.needed_keys())
    flat = {key: True if key.endswith("offline") else 0.5 for key in keys}
    for key in keys:
        if key.endswith((".accuracy", ".difference")):
            prefix = key.rpartition(".")[0]
            flat |= {f"{prefix}.low": 0.4, f"{prefix}.high": 0.6, f"{prefix}.chance": 0.4, f"{prefix}.n": 8}
    verdicts = {v.name: v for v in SCHEMA.verdicts(flat)}
    wer = verdicts["Tokenizer: word error rate of held-out sentences"]
    assert (wer.target, wer.value, wer.met) == ("≤ 5 %", "50.0 %", False)
    assert verdicts["Tokenizer: codebook in use"].met
    endings = verdicts["Story endings S→S above chance, curriculum LST"]
    assert (endings.value, endings.met) == ("50.0 % [40, 60], n=8", False)  # the interval begins at chance, not above
    written = verdicts["Interleaving helps to answer spoken questions, facts only ever written, S→T"]
    assert (written.target, written.met) == ("interval above 0", True)


def test_a_measure_may_promise_several_things_and_what_was_not_measured_is_a_miss():
    promises = tuple(
        Promise(name="noise of <who>", bound=at_most(limit), where={"who": (who,)})
        for who, limit in {"a": 0.1, "b": 0.2}.items()
    )
    control = Promise(name="control", bound=at_chance())
    change = Promise(name="change", bound=at_most_amount(0.1, "nats"))
    schema = Schema(
        (
            Measure(key="noise.<who>.wer", kind="rate", meaning="x", promise=promises),
            Measure(key="control.accuracy", kind="share", meaning="x", promise=control),
            Measure(key="loss.change", kind="change", unit="nats", meaning="x", promise=change),
            Measure(key="<family>.<end>", kind="change", meaning="ends of intervals, and chance"),
        )
    )
    assert schema.promised_keys() == ["noise.a.wer", "noise.b.wer", "control.accuracy", "loss.change"]
    flat = {
        "noise.a.wer": 0.15,
        "control.accuracy": 0.4,
        "control.chance": 0.5,
        "control.low": 0.3,
        "control.high": 0.49,
    }
    flat |= {"loss.change": -0.05, "loss.low": -0.1, "loss.high": 0.02}
    schema.check(flat)
    found = {v.name: (v.target, v.value, v.met) for v in schema.verdicts(flat)}
    assert found == {
        "noise of a": ("≤ 10 %", "15.0 %", False),
        "noise of b": ("≤ 20 %", "not measured", False),
        "control": ("interval holds chance", "40.0 % [30, 49]", False),  # below chance is not at chance
        "change": ("≤ 0.1 nats", "-0.050 nats [-0.100, 0.020]", True),
    }
    assert schema.verdicts(flat | {"control.high": 0.51})[2].met


def test_wrong_declarations_are_refused():
    line = Measure(key="a.<run>.b", kind="share", meaning="x")
    with pytest.raises(ValueError, match=r"a\.<run>\.b are declared twice"):
        Schema((line, line))
    with pytest.raises(ValueError, match="kind='percent' must be one of share"):
        Measure(key="a", kind="percent", meaning="x")
    with pytest.raises(ValueError, match=r"its promise must say for which values of \['run'\]"):
        Measure(key="a.<run>.b", kind="share", meaning="x", promise=Promise(name="p", bound=at_least(0.1)))
    promise = Promise(name="p", bound=at_least(0.1), where={"runn": ("a",)})
    with pytest.raises(ValueError, match="must name wildcards of the key"):
        Measure(key="a.<run>.b", kind="share", meaning="x", promise=promise)


@pytest.mark.parametrize(
    ("kind", "unit", "value", "text"),
    [
        ("rate", "", 0.0391, "3.9 %"),
        ("count", "", 12345, "12,345"),
        ("count", "", 2_912_345, "2.91 M"),
        ("amount", "s", 1654.4, "1654 s"),
        ("amount", "FLOP", 1.12e13, "11.2 TFLOP"),
        ("amount", "", 2.239, "2.239"),
        ("flag", "", True, "yes"),
        ("text", "", "cpu", "cpu"),
    ],
)
def test_values_are_shown_with_their_units(kind, unit, value, text):
    assert Measure(key="a", kind=kind, unit=unit, meaning="x").shown(value) == text
