"""`speechquilt inspect`: the numbers of a folder small enough to count by hand, and a page that lets nothing through."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.cli import main
from speechquilt.data.shards import parquet
from speechquilt.data.shards.documents import ShardFolder, ShardWriter
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.shards.spoken import SpokenWriter
from speechquilt.reports.charts import BARS, binned, histogram
from speechquilt.reports.shard_statistics import Lengths
from speechquilt.reports.spoken_runs import span_texts, units_of
from speechquilt.stages.training_documents import text_fingerprint
from speechquilt.types import AlignedTokens, Document, Segment, UnitEnd
from tests.contracts.tiny_tokenizer import TEXT, build
from tests.unit.test_report import EVIL, Checker

torch.set_num_threads(1)
N, W, S, P = UnitEnd.NONE, UnitEnd.WORD, UnitEnd.SILENCE, UnitEnd.PIECE
INFO = ShardInfo(
    num_text=TEXT.size, num_speech=24, text_fingerprint="t", speech_fingerprint="s", made_by={"stage": "x"}
)


def text(*words: str) -> Segment:
    return Segment(modality="text", ids_T=np.asarray(TEXT.encode(" ".join(words)), dtype=np.int32))


def speech(*ends: int) -> Segment:
    return Segment(modality="speech", ids_T=np.arange(len(ends), dtype=np.int32), unit_end_T=np.array(ends, np.uint8))


def write(folder, documents, info=INFO, rejected=(), **options):
    with ShardWriter(folder, info, max_reject_ratio=1.0, **options) as writer:
        for document, original in documents:
            writer.write(document, original)
        for id, reason in rejected:
            writer.reject(id, reason)
    return folder


def mixed(id: str, *segments: Segment, source: str = "interleaved") -> Document:
    return Document(id=id, source=source, segments=segments)


@pytest.fixture
def small(tmp_path):
    """Two interleaved documents, one of speech alone without word ends. Spoken: 'cat sat' and 'where'."""
    documents = [
        (mixed("a", text("the"), speech(S, N, W, N, P, W), text("on", "the", "mat")), "the cat sat on the mat"),
        (mixed("b", speech(N, W, N, S), text("does", "anna", "live")), "where does anna live"),
        (Document(id="c", source="speech", segments=(Segment(modality="speech", ids_T=np.arange(9)),)), "heard"),
    ]
    return write(tmp_path / "s", documents, rejected=[("x", "no words"), ("y", "no words")], documents_per_shard=2)


def test_the_numbers_are_those_counted_by_hand(small, capsys):
    assert main(["inspect", str(small), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    num_text = sum(len(TEXT.encode(t)) for t in ("the", "on the mat", "does anna live"))
    assert found["documents"] == 3
    assert found["tokens"] == {"text": num_text, "speech": 19}
    assert found["rejects"] == {"no words": 2}
    assert found["ratio"] == 3 / 10  # of "the cat sat on the mat" and "where does anna live"
    assert found["sources"]["interleaved"]["words"] == 10
    assert found["sources"]["speech"] == {
        "documents": 1, "text_tokens": 0, "speech_tokens": 9, "words": 0, "spoken_words": 0, "ratio": None,
    }  # fmt: skip
    assert (found["speech_words"], found["speech_tokens_per_word"]) == (3, 10 / 3)
    assert found["units"] == {"words": 3, "silences": 2, "pieces": 1}
    assert found["tokens_per_unit"] == 10 / 5
    assert (found["speech_seconds"], found["words_per_second"]) == (None, None)
    assert found["lengths"]["speech_run_words"] == {"n": 2, "mean": 1.5, "p5": 1, "p50": 1, "p95": 2, "most": 2}
    assert found["lengths"]["speech_run_tokens"] == {"n": 3, "mean": 19 / 3, "p5": 4, "p50": 6, "p95": 9, "most": 9}
    assert found["lengths"]["speech_unit_tokens"] == {"n": 5, "mean": 2, "p5": 1, "p50": 2, "p95": 3, "most": 3}
    assert found["noise"] == {}


def test_pairs_are_not_in_the_ratio(tmp_path, capsys):
    """They have every word twice, once in each modality."""
    pair = mixed("p", replace(speech(W, W), loss=False), text("cat", "sat"), source="asr")
    documents = [(mixed("a", text("the"), speech(W)), "the cat"), (pair, "cat sat")]
    main(["inspect", str(write(tmp_path / "s", documents)), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["ratio"], found["sources"]["asr"]["ratio"]) == (0.5, None)


def test_the_printed_form_says_the_same_and_shows_samples(small, capsys):
    assert main(["inspect", str(small), "--samples", "2"]) == 0
    out = capsys.readouterr().out
    for line in ("3 documents", "no words: 2", "30.0% of the words", "tokens per word 3.33", "3 words and 2 silences"):
        assert line in out
    assert "\na (interleaved)\n  the cat sat on the mat\n" in out
    assert "<speech> 0| 1 2| 3 4| 5|" in out
    assert "\nc (speech)" in out
    assert "\nb (" not in out


def test_what_the_stage_counted_is_shown(small, capsys):
    counts = {"spans": 4, "words": 40, "errors": 3, "words_squared": 402, "words_errors": 30, "errors_squared": 5}
    stats = {"words": 10, "spoken_words": 3, "ratio": 0.3, "rejects": {"no end": 2}, "unspeakable": {"URL": 7}}
    (small / "stats.json").write_text(json.dumps({**stats, "noise": {"prose": counts}, "noise_rates": {}}))
    main(["inspect", str(small), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["stage"] == stats
    assert found["noise"]["prose"]["wer"] == 3 / 40 == found["noise"]["all"]["wer"]
    main(["inspect", str(small)])
    out = capsys.readouterr().out
    for part in ("no end: 2", "URL: 7", "WER 7.5%", "4 spans, 40 words", "0.3000"):
        assert part in out


def test_spoken_texts_are_shown_whole(tmp_path, capsys):
    words = ("cat", "a", "sat")  # the second has no token
    item = AlignedTokens(id="d", text="cat a sat", words=words, ids_T=np.arange(5), word_T=np.array([-1, 0, 0, 2, 2]))
    with SpokenWriter(tmp_path / "s", INFO) as writer:
        writer.write(item, "cat a sat")
    main(["inspect", str(tmp_path / "s"), "--page", str(tmp_path / "p.html")])
    assert "parallel: 1 documents, 0 text and 5 speech tokens" in capsys.readouterr().out
    assert page_words(tmp_path / "p.html") == ["cat", "sat"]


def test_documents_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """No shard is read whole, and at no time is more than one group of documents in memory."""
    monkeypatch.setattr(parquet, "_ROWS", 4)
    documents = [(mixed(f"d{i}", text("the"), speech(N, W)), "the cat") for i in range(30)]
    folder = ShardFolder(write(tmp_path / "s", documents, documents_per_shard=10))
    monkeypatch.setattr(pq, "read_table", lambda path: pytest.fail(f"{path} was read whole"))
    groups = []
    real = pq.ParquetFile.iter_batches

    def counted(self, rows):
        for batch in real(self, rows):
            groups.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    read = []
    for n, (document, _) in enumerate(folder.with_texts(), start=1):
        read.append(document.id)
        assert sum(groups) <= n + 3
    assert read == [f"d{i}" for i in range(30)]
    assert max(groups) == 4


def test_a_damaged_shard_is_named(tmp_path, capsys):
    folder = write(tmp_path / "s", [(mixed("a", text("the")), "the")])
    shard = folder / "shard-00000.parquet"
    shard.write_bytes(b"x" * shard.stat().st_size)
    assert main(["inspect", str(folder)]) == 2
    assert re.search(r"shard-00000\.parquet is truncated or damaged .* run the stage", capsys.readouterr().err)


def test_an_empty_folder(tmp_path, capsys):
    assert main(["inspect", str(write(tmp_path / "s", [])), "--page", str(tmp_path / "p.html")]) == 0
    assert "0 documents" in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=60))
def test_quantiles_are_those_of_the_whole_list(values):
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    found = lengths.summary()
    expected = {f"p{q}": int(np.percentile(values, q, method="inverted_cdf")) for q in (5, 50, 95)}
    assert {key: found[key] for key in expected} == expected
    assert (found["n"], found["most"]) == (len(values), max(values))
    assert found["mean"] == pytest.approx(np.mean(values))


def test_long_lengths_take_little_room_and_keep_three_figures():
    lengths = Lengths()
    for value in range(0, 200_000, 3):
        lengths.add(value)
    assert len(lengths.counts) < 3000
    assert lengths.summary()["p50"] == pytest.approx(100_000, rel=0.01)


# The page


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    model = build()
    model.save(folder)
    return folder, model


def info_of(model) -> ShardInfo:
    return ShardInfo(
        num_text=TEXT.size,
        num_speech=model.vocab_size,
        text_fingerprint=text_fingerprint(TEXT),
        speech_fingerprint=model.fingerprint,
        made_by={EVIL: EVIL},
    )


def page_of(folder, tmp_path, *options):
    path = tmp_path / "page.html"
    assert main(["inspect", str(folder), "--page", str(path), *map(str, options)]) == 0
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return html, checker


def page_words(path) -> list[str]:
    samples = path.read_text(encoding="utf-8").split('<article class="sample">', 1)[1]
    return re.findall(r'<span class="name">(.*?)</span>', samples)


def test_every_text_is_escaped(tmp_path, tokenizer):
    folder, model = tokenizer
    evil = EVIL.replace("é", "\"onclick='z'")  # a single word that would leave its attribute, too
    words = evil.split()
    documents = [
        (mixed(EVIL, text(words[0]), speech(*[W] * len(words[1:])), source=EVIL), evil),
        (mixed("b", speech(*[W] * len(words)), source="speech"), evil),
    ]
    shards = write(tmp_path / "s", documents, info_of(model), rejected=[("x", EVIL)])
    noise = {"spans": 1, "words": 1, "errors": 1, "words_squared": 1, "words_errors": 1, "errors_squared": 1}
    (shards / "stats.json").write_text(
        json.dumps({"rejects": {EVIL: 1}, "unspeakable": {EVIL: 1}, "noise": {EVIL: noise}})
    )
    html, checker = page_of(shards, tmp_path, "--tokenizer", folder)
    assert "script" not in checker.tags
    assert not any(name.startswith("on") for name, _ in checker.attrs)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert checker.text.count("<script>alert('x')") >= 9
    assert all(value.startswith("#") for name, value in checker.attrs if name in ("src", "href"))


def test_the_tokenizer_gives_words_seconds_and_what_is_heard(tmp_path, tokenizer, capsys):
    folder, model = tokenizer
    documents = [
        (mixed("a", text("the"), speech(S, N, W, N, P, W), text("on the mat")), "the cat\n sat on the mat"),
        (mixed("b", speech(N, W, N, S), text("does anna live")), "where does anna live"),
        (mixed("p", replace(speech(N, W, N, S), loss=False), text("anna"), source="asr"), "anna"),
        (mixed("n", text("the"), speech(W, W, W), text("cat")), "the 42 cat"),
    ]
    shards = write(tmp_path / "s", documents, info_of(model))
    html, checker = page_of(shards, tmp_path, "--tokenizer", folder)
    assert page_words(tmp_path / "page.html") == ["cat", "sat", "where", "anna"]
    assert (
        "<b>42</b>" in html
    )  # not the three words that it would be: the boxes stay without names, the text stands below
    assert ">on the mat<" in html
    heard = model.read_back([np.arange(6)])[0]
    assert f"heard: {heard}" in checker.text
    assert '<details class="original"><summary>' in html
    capsys.readouterr()
    main(["inspect", str(shards), "--tokenizer", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["speech_seconds"] == 17 / model.frame_rate
    assert found["words_per_second"] == pytest.approx(model.frame_rate * 7 / 17)


def test_a_run_is_named_by_what_was_said(tmp_path, tokenizer):
    pytest.importorskip("wetext", reason="needs the extra `speaking`")
    folder, model = tokenizer
    shards = write(tmp_path / "s", [(mixed("n", text("the"), speech(W, W), text("cat")), "the 42 cat")], info_of(model))
    html, _ = page_of(shards, tmp_path, "--tokenizer", folder)
    assert page_words(tmp_path / "page.html") == ["forty", "two"]
    assert "<b>42</b>" in html  # what is written stands below


def test_without_a_tokenizer_text_is_counted_and_speech_is_ids(small, tmp_path):
    html, _ = page_of(small, tmp_path)
    assert "heard:" not in html
    assert '<details class="original" open>' in html
    assert f"{len(TEXT.encode('on the mat'))} text tokens" in html
    assert '<span class="ids">1 2</span>' in html
    assert "the cat sat on the mat" in html


def test_another_tokenizer_is_refused(small, tokenizer, capsys):
    assert main(["inspect", str(small), "--tokenizer", str(tokenizer[0])]) == 2
    assert re.search(r"--tokenizer .* was made with the speech tokenizer 's'", capsys.readouterr().err)


words = st.sampled_from(["the", "cat", "sat", "a", "mat.", "東京", "x(y)", "[the]"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=4), min_size=2, max_size=5), st.booleans())
def test_the_words_of_every_spoken_run_are_found_in_the_text(runs, speech_first):
    """Whatever repeats; without the numbers of words at least the parts in turn are the words of the original."""
    modalities = ["speech" if (k % 2 == 0) == speech_first else "text" for k in range(len(runs))]
    spelled = [" ".join(r) if m == "text" else "" for m, r in zip(modalities, runs)]
    original = "\n".join(" ".join(r) for r in runs)
    marked = [speech(*[W] * len(r)) if m == "speech" else text(*r) for m, r in zip(modalities, runs)]
    found = span_texts(mixed("d", *marked), original, spelled)
    assert [f.split() for f in found] == [r if m == "speech" else [] for m, r in zip(modalities, runs)]
    unmarked = [replace(segment, unit_end_T=None) for segment in marked]
    found = span_texts(mixed("d", *unmarked), original, spelled)
    assert " ".join(a or b for a, b in zip(spelled, found)).split() == [w for r in runs for w in r]


def test_runs_that_are_not_in_the_text_tell_nothing():
    document = mixed("d", text("the"), speech(W), text("mat"))
    for original in ("a cat mat", "the cat", "the mat", "the cat mat.", ""):
        assert span_texts(document, original, ["the", "", "mat"]) == ["", "", ""]
    two = mixed("d", text("the"), speech(W), speech(W), text("mat"))
    assert span_texts(two, "the cat sat mat", ["the", "", "", "mat"]) == [""] * 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([N, W, S, P]), max_size=30))
def test_units_hold_every_token_once_in_order(ends):
    segment = speech(*ends)
    units = units_of(segment, ["w"] * ends.count(W))
    assert [i for unit in units for i in unit.ids_T] == list(range(len(ends)))
    assert [unit.kind for unit in units if unit.kind != "unknown"] == [
        {W: "word", S: "silence"}[end] for end in ends if end in (W, S)
    ]
    assert all((unit.text == "w") == (unit.kind == "word") for unit in units)


counts_of_lengths = st.dictionaries(st.integers(0, 5000), st.integers(1, 99), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(counts_of_lengths)
def test_histograms_hold_every_item(counts):
    low, step, bars, high, median = binned(counts)
    assert bars.sum() == sum(counts.values())
    assert len(bars) <= BARS
    assert low <= median <= high < low + step * len(bars)


@settings(max_examples=10, deadline=None)
@given(counts_of_lengths)
def test_every_bar_is_drawn_and_says_how_many(counts):
    svg = histogram(counts, "x", "text")
    bars = [int(n) for n in re.findall(r"<title>[^:]*: (\d+)</title>", svg)]
    assert sum(bars) == sum(counts.values())
    assert len(bars) <= BARS
    checker = Checker()
    checker.feed(svg)
    checker.close()
    assert not checker.open
