"""Real text through the whole command: a tiny study to its tables, and the rules for its texts, sentences and spans."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import cli
from speechquilt import config as configs
from speechquilt.data.interleaving import synthetic
from speechquilt.data.interleaving.speakable import unspeakable_words
from speechquilt.data.interleaving.synthetic import InterleaveConfig, split_words
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.studies import real_text
from speechquilt.studies.installed_texts import (
    InstalledTextsConfig,
    collect,
    paragraphs_of,
    repeated_share,
    without_repeats,
)
from speechquilt.studies.real_text import RealTextConfig, accepted, sentences
from speechquilt.types import SpokenSpan, TextDocument
from tests.contracts.tiny_tokenizer import TEXT

SETTINGS = [
    "--corpus.sources", "topics", "--corpus.mib_per_source=0.02", "--corpus.held_out_every=3",
    "--sentences.train=12", "--sentences.held_out=3", "--sentences.max_words=8", "--workers=1",
    "--tokenizer.train.steps=3", "--tokenizer.train.warmup_steps=1", "--tokenizer.train.num_threads=1",
    "--tokenizer.batch_seconds=6", "--tokenizer.model.width=32", "--tokenizer.model.ffn_width=64",
    "--tokenizer.model.text_vocab_size=300", "--tokenizer.model.codebook_size=16", "--tokenizer.model.vq_warmup_updates=1",
    "--text_to_token.train.steps=2", "--text_to_token.train.warmup_steps=1", "--text_to_token.train.num_threads=1",
    "--text_to_token.llama.width=16", "--text_to_token.llama.num_layers=1", "--text_to_token.llama.ffn_width=16",
    "--text_to_token.llama.num_heads=2", "--text_to_token.llama.num_kv_heads=2", "--text_to_token.data.rows=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "run"
    assert cli.main(["study", "real_text", f"--run-dir={folder}", *SETTINGS]) == 0
    return folder


def test_a_tiny_study_ends_with_its_figures(run):
    found = json.loads((run / "results.json").read_text())
    stats = found["interleaved.stats"]
    assert found["speech.sentences"] == 12
    assert found["interleaved.documents"] >= found["corpus.topics.held_out_documents"] >= 1
    assert stats["words"] >= found["corpus.topics.held_out_words"] > 0
    assert stats["spans"] > sum(stats["rejects"].values())  # some spans became speech, so noise was measured
    synthetic, floor = stats["noise_rates"]["all"], found["reader.noise_rates"]["all"]
    assert (synthetic["spans"], synthetic["words"]) == (floor["spans"], floor["words"])
    assert synthetic["spans"] == stats["spans"] - sum(stats["rejects"].values())
    assert synthetic["wer"] > 0.5  # three steps of training
    assert ShardFolder(run / "interleaved" / "shards").info.made_by["languages"] == ["en"]
    page = (run / "real_text.md").read_text()
    for reason, number in [*stats["unspeakable"].items(), *stats["rejects"].items()]:
        assert re.search(rf"\| {re.escape(reason)} \| {number} \|", page)
    assert f"{floor['wer']:.1%} [{floor['low']:.1%}" in page
    assert (run / "interleaved" / real_text.PAGE).is_file()


def test_a_finished_study_is_not_done_again(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.parent != run}
    assert cli.main(["study", "real_text", f"--run-dir={run}", *SETTINGS]) == 0
    assert capsys.readouterr().out.count("complete, skipped") == 5
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.parent != run} == before
    assert cli.main(["study", "real_text", f"--run-dir={run}", *SETTINGS, "--ratio=0.2"]) == 2
    assert "was made with other settings" in capsys.readouterr().err


def test_words_of_other_scripts_stay_text_unless_their_language_is_named(run, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README").write_text("the quick fox 東京 went home " * 20)
    unspeakable = {}
    for languages in ("en", "en,zh"):
        out = tmp_path / languages
        command = ["interleave", str(tmp_path / "text"), str(out), "--text-to-token", str(run / "text_to_token")]
        assert cli.main([*command, "--languages", *languages.split(","), "--workers", "1"]) == 0
        unspeakable[languages] = json.loads((out / "stats.json").read_text())["unspeakable"]
    assert unspeakable == {"en": {"script": 40}, "en,zh": {}}


def test_an_unknown_language_is_named(run, tmp_path, capsys):
    command = ["interleave", str(run / "corpus"), str(tmp_path / "out"), "--text-to-token", str(run / "text_to_token")]
    assert cli.main([*command, "--languages", "en", "xx"]) == 2
    assert "language='xx' has no known script" in capsys.readouterr().err


def test_the_same_installation_gives_the_same_texts_and_held_out_ones_are_others():
    config = InstalledTextsConfig(sources=("licences", "topics"), mib_per_source=0.1)
    found = collect(config)
    assert collect(config) == found
    for source, texts in found.items():
        ids = [document.id for document in (*texts.train, *texts.held_out)]
        assert len(set(ids)) == len(ids) <= texts.found
        assert all(id.startswith(f"{source}/") for id in ids)
        assert sum(len(d.text.encode()) for d in (*texts.train, *texts.held_out)) <= 0.1 * 2**20
        assert len(texts.held_out) == len(ids) // config.held_out_every


def test_our_own_readme_is_not_among_the_texts_of_others():
    texts = collect(InstalledTextsConfig(sources=("packages",), mib_per_source=100))["packages"]
    names = {document.id for document in (*texts.train, *texts.held_out)}
    assert "packages/pytest" in names
    assert "packages/speechquilt" not in names


paragraph = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3).map(" ".join)
documents = st.lists(st.lists(paragraph, max_size=4).map("\n\n".join), max_size=8).map(
    lambda texts: [TextDocument(id=str(i), text=text) for i, text in enumerate(texts)]
)


@settings(max_examples=100, deadline=None)
@given(documents=documents)
def test_kept_texts_are_mostly_new_and_left_out_ones_mostly_seen(documents):
    kept = list(without_repeats(documents))
    assert list(without_repeats(kept)) == kept
    for document in documents:
        before = [other for other in kept if int(other.id) < int(document.id)]
        if paragraphs_of(document.text):
            assert (document in kept) == (repeated_share(before, [document]) <= 0.5)
        else:
            assert document not in kept


def test_a_licence_under_another_name_is_a_repeat():
    body = "Permission is hereby granted, free of charge,\n\n to any person obtaining a copy of this software."
    theirs = TextDocument(id="a", text=f"Copyright A\n\n{body}")
    wrapped = TextDocument(id="b", text=f"Copyright B\n\n{body.upper().replace(' ', '  ')}")
    other = TextDocument(id="c", text="Another text.")
    assert [d.id for d in without_repeats([theirs, wrapped, other])] == ["a", "c"]


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["the ", "fox ", "end. ", "f(x_y) ", "http://a.b/c ", "so:\n", "new\n\n"]), max_size=60
    ),
    low=st.integers(1, 4),
    extra=st.integers(0, 6),
)
def test_sentences_are_runs_of_words_that_can_be_spoken(words, low, extra):
    text = "".join(words)
    plain = " ".join(text.split())
    at = 0
    for sentence in sentences(text, low, low + extra):
        assert low <= len(sentence.split()) <= low + extra
        assert not re.search(r"[.:] ", sentence)
        assert "new the" not in sentence  # never over the end of a paragraph
        assert "_" not in sentence
        assert "http" not in sentence
        at = plain.index(sentence, at) + len(sentence)  # in order, none twice


def test_no_word_that_can_be_spoken_is_lost_when_single_words_are_enough():
    text = "The first one ends here. Call f(x_y) now, and then go on for so long that it is cut in parts.\n\nA new one"
    words = split_words(text)
    spoken = [w.strip() for w, reason in zip(words, unspeakable_words(words, ("en",))) if not reason]
    assert " ".join(sentences(text, 1, 6)).split() == spoken
    assert "f(x_y)" not in spoken


@settings(max_examples=100, deadline=None)
@given(num_words=st.integers(20, 90), seed=st.integers(0, 10**6), data=st.data())
def test_spans_that_became_speech_are_found_again(num_words, seed, data):
    text = " ".join(np.random.default_rng(seed).choice(["the", "cat", "sat", "on", "mat"], num_words))
    plan = synthetic.plan(f"d{seed}", text, 0, InterleaveConfig(seed=seed, poisson_mean=3))
    kept = data.draw(st.lists(st.booleans(), min_size=len(plan.spans), max_size=len(plan.spans)))
    spoken = [_span(len(TEXT.encode(span)), "" if keep else "loop") for span, keep in zip(plan.spoken_spans, kept)]
    document = synthetic.assemble(plan, spoken, TEXT.encode_run)
    assert accepted(plan, document, TEXT.encode_run) == kept
    other = synthetic.plan(f"d{seed}", "anna " * num_words, 0, InterleaveConfig(seed=seed, poisson_mean=3))
    with pytest.raises(ValueError, match="is not made of the plan"):
        accepted(other, document, TEXT.encode_run)


def _span(num_text: int, reject: str) -> SpokenSpan:
    ids_T = np.arange(2 * num_text, dtype=np.int32) % 24
    return SpokenSpan(ids_T=ids_T, unit_end_T=np.zeros(len(ids_T), dtype=np.uint8), reject=reject)


def test_settings_survive_json_and_mistakes_are_named():
    assert configs.from_dict(RealTextConfig, configs.to_dict(RealTextConfig())) == RealTextConfig()
    for section, key, value, message in [
        ("corpus", "sources", ["novels"], "'novels' must be one of licences"),
        ("corpus", "held_out_every", 1, "held_out_every=1 must be at least 2"),
        ("corpus", "mib_per_source", 0, "mib_per_source=0"),
        ("sentences", "min_words", 30, "min_words=30 must be 1 to max_words=25"),
        ("sentences", "held_out", 0, "held_out=0 at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            configs.from_dict(RealTextConfig, {section: {key: value}})
