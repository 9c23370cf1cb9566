"""Files as users have them (tests/cases/make.py): every case does what its expectation says, by the jobs' own functions."""

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from speechquilt.data.interleaving.verbalise import verbalise
from speechquilt.data.shards.documents import ShardFolder, read_documents
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.data.sources import text_files
from speechquilt.data.sources.speech_corpora import FolderCorpus
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.evals.tasks import ChoiceTask
from speechquilt.jobs import align_audio, bulk
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.tokenize_audio import tokenize_folder
from speechquilt.stages import evaluate
from speechquilt.stages.align_corpus import WORDS_FILE, aligned_corpus
from speechquilt.stages.corpus import Corpus
from speechquilt.text import spoken_form
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Reject, Utterance
from tests.cases import make
from tests.contracts import tiny_tokenizer
from tests.unit.test_speech_rows import SAMPLES, cut_set, tar
from tests.unit.test_tasks import FakeScorer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.build().save(folder)
    return folder


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The input folder of the case that the test is named after."""
    name = request.node.originalname.removeprefix("test_")
    folder = tmp_path / name
    folder.mkdir()
    make.CASES[name][1](folder)
    return folder


def test_every_case_has_its_test() -> None:
    assert set(make.CASES) <= {name.removeprefix("test_") for name in globals() if name.startswith("test_")}


class Made:
    """What `tokenize` made of an input."""

    def __init__(self, source: Path, tokenizer_dir: Path, out: Path) -> None:
        tokenize_folder(source, out, tokenizer_dir, execution=Execution(workers=1, max_reject_ratio=1.0))
        self.out = out
        self.recordings = [d.id for d in read_documents(out / "speech")]
        self.pairs = self._texts("asr")
        lines = (out / "speech" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
        self.rejects = {row["id"]: row for row in map(json.loads, lines)}
        self.reasons = ShardFolder(out / "speech").manifest["rejects"]
        assert sum(self.reasons.values()) == len(lines)
        assert all(row["detail"] for row in self.rejects.values())

    @property
    def spoken(self) -> dict[str, tuple[str, ...]]:
        """The words of recordings whose words have times."""
        folder = self.out / "parallel"
        return {s.id: s.words for s in SpokenFolder(folder).in_order()} if folder.is_dir() else {}

    @property
    def counted(self) -> dict[str, int]:
        path = self.out / bulk.STATS
        return json.loads(path.read_text()) if path.is_file() else {}

    def _texts(self, name: str) -> list[str]:
        folder = self.out / name
        if not folder.is_dir():
            return []
        shards = ShardFolder(folder)
        return [shards.text(i) for i in range(len(shards))]


def made_of(case: Path, tokenizer_dir: Path, source: Path | None = None) -> Made:
    return Made(source or case, tokenizer_dir, case.parent / f"out-{(source or case).name}")


class SilentAligner:
    """Gives the words of a text equal shares of the audio: enough to see what `align` reads and writes."""

    def __init__(self) -> None:
        self.emitter = type("Emitter", (), {"sample_rate": 16000})()

    def align_pieces(self, pieces: Any, text: str) -> tuple[Any, ...]:
        from speechquilt.types import AlignedWord

        seconds, words = sum(len(piece) for piece in pieces) / 16000, text.split()
        each = seconds / len(words)
        return tuple(AlignedWord(text=w, start_s=i * each, end_s=(i + 1) * each) for i, w in enumerate(words))


def aligned(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, ratio: float = 1.0) -> list[dict[str, Any]]:
    """The table that `align` makes of an input."""
    monkeypatch.setattr(align_audio, "load_aligner", lambda *_: SilentAligner())
    folder = out.parent / "aligner"
    folder.mkdir(exist_ok=True)
    align_audio.align_folder(source, out, folder, execution=Execution(workers=1, max_reject_ratio=ratio))
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- tables of speech


def test_apple_double(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.recordings == ["r0.wav", "r1.wav", "r2.wav"]
    assert not made.rejects


@pytest.mark.parametrize("table", ["csv", "jsonl", "txt", "tsv"])
def test_csv_bom(case: Path, tokenizer_dir: Path, table: str) -> None:
    mark = b"\xef\xbb\xbf"
    if table != "csv":
        (case / "metadata.csv").unlink()
    if table == "jsonl":
        rows = "".join(json.dumps({"file_name": f"r{i}.wav", "text": make.TEXT}) + "\n" for i in range(3))
        (case / "metadata.jsonl").write_bytes(mark + rows.encode())
    if table == "tsv":
        rows = "".join(f"r{i}.wav\t{make.TEXT}\n" for i in range(3))
        (case / "metadata.tsv").write_bytes(mark + f"path\tsentence\n{rows}".encode())
    if table == "txt":
        for i in range(3):
            (case / f"r{i}.txt").write_bytes(mark + make.TEXT.encode())
    assert made_of(case, tokenizer_dir).pairs == [make.TEXT] * 3
    assert [u.text for u in read_utterances(case) if isinstance(u, Utterance)] == [make.TEXT] * 3


def test_utf16_transcript(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.pairs == [make.TEXT] * 2
    assert made.recordings == ["marked.wav", "plain.wav", "utf8.wav"]
    assert list(made.rejects) == ["plain.wav"]
    assert "NUL" in made.rejects["plain.wav"]["reason"]
    assert "plain.txt" in made.rejects["plain.wav"]["detail"]


def test_stray_quote(case: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata\.csv.*line 7.*quote"):
        made_of(case, tokenizer_dir)
    with pytest.raises(ValueError, match=r"metadata\.csv.*line 7.*quote"):
        list(read_utterances(case))


def test_dialects(case: Path, tokenizer_dir: Path) -> None:
    for kind in ("pipe", "semicolon"):
        assert made_of(case, tokenizer_dir, case / kind).pairs == [make.TEXT] * 4
    assert made_of(case, tokenizer_dir, case / "ljspeech").pairs == [f"{make.TEXT} in eighteen forty"] * 4
    with pytest.raises(ValueError, match=r"several tables: test\.tsv, validated\.tsv; name the one"):
        made_of(case, tokenizer_dir, case / "common_voice")
    named = made_of(case, tokenizer_dir, case / "common_voice" / "validated.tsv")
    assert named.pairs == [make.TEXT] * 4
    assert named.recordings == [f"cv_{i}.mp3" for i in range(4)]


@pytest.mark.parametrize("swap", [False, True])
def test_nfc_nfd(case: Path, tokenizer_dir: Path, swap: bool) -> None:
    if swap:
        import unicodedata

        (name,) = case.glob("*.wav")
        name.rename(case / unicodedata.normalize("NFC", name.name))
        table = (case / "metadata.jsonl").read_text()
        (case / "metadata.jsonl").write_text(table.replace("\\u00e9", "e\\u0301"))
    assert made_of(case, tokenizer_dir).pairs == [make.TEXT]
    assert [u.text for u in read_utterances(case) if isinstance(u, Utterance)] == [make.TEXT]


def test_symlinked_folder(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir, case / "corpus")
    assert made.recordings == ["linked/r0.wav", "linked/r1.wav"]


def test_split_folders(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.pairs == [make.TEXT] * 6
    assert made.recordings == [f"{split}/{split}{i}.wav" for split in ("test", "train") for i in range(3)]


def test_parquet_audio(case: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.recordings == ["u0", "u1", "u2"]
    assert made.pairs == [make.TEXT] * 3
    rows = aligned(case, case.parent / "aligned", monkeypatch, 0.0)
    assert [row["id"] for row in rows] == ["u0", "u1", "u2"]
    again = made_of(case, tokenizer_dir, case.parent / "aligned")  # what `align` wrote leads back into the Parquet file
    assert set(again.spoken.values()) == {tuple(make.TEXT.split())}


def test_librispeech(case: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.pairs == [make.TEXT.upper()] * 2
    assert made.recordings == ["19/198/19-198-0000.flac", "19/198/19-198-0001.flac"]
    rows = aligned(case, case.parent / "aligned", monkeypatch, 0.0)
    assert [row["text"] for row in rows] == [make.TEXT.upper()] * 2


def test_segments(case: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the red fox", "sue likes the page", "tom goes to the sea"]
    made = made_of(case, tokenizer_dir)
    assert made.pairs == texts
    assert len(set(made.recordings)) == 3
    assert [d.num_tokens() for d in read_documents(made.out / "speech")] == [25, 25, 25]  # 2 s each
    utterances = [u for u in read_utterances(case) if isinstance(u, Utterance)]
    assert [(u.text, u.duration_s) for u in utterances] == [(text, 2.0) for text in texts]
    rows = aligned(case, case.parent / "aligned", monkeypatch, 0.0)
    assert [[w for w, _, _ in row["words"]] for row in rows] == [text.split() for text in texts]
    assert rows[1]["words"][0][1] == pytest.approx(2.0)  # times count from the start of the file
    again = made_of(case, tokenizer_dir, case.parent / "aligned")
    assert sorted(again.spoken.values()) == sorted(tuple(text.split()) for text in texts)
    kept = [{k: v for k, v in row.items() if k not in ("start", "end")} for row in make_rows(case / "metadata.jsonl")]
    make.table(case, kept)
    with pytest.raises(ValueError, match=r"all 3 of 3 items were rejected"):
        Made(case, tokenizer_dir, case.parent / "without")
    (part,) = (case.parent / "without").glob("job/parts/*/speech/rejects.jsonl")
    for row in make_rows(part):
        assert "long.wav" in row["id"]
        assert "start" in row["detail"]
        assert "long.wav" in row["detail"]


def make_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_missing_file(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    (reject,) = made.rejects.values()
    assert reject["reason"] == "missing file"
    assert "r1.wav" in reject["detail"]
    assert "metadata.jsonl line 2" in reject["detail"]
    (found,) = [r for r in read_utterances(case) if isinstance(r, Reject)]
    assert (found.reason, found.detail) == (reject["reason"], reject["detail"])


# ---------------------------------------------------------------- audio


def test_short_duration(case: Path, tokenizer_dir: Path) -> None:
    from speechquilt.data.feed.utterances import UtteranceLoader

    made = made_of(case, tokenizer_dir)
    assert made.pairs == [make.TEXT] * 4
    loader = UtteranceLoader(FolderCorpus(case), tiny_tokenizer.TEXT, batch_seconds=4, target_form=lambda t: t[:3])
    for _ in range(4):
        loader.next_batch()
    assert not loader.rejects
    rows = make_rows(case / "metadata.jsonl")
    rows[0]["duration"], rows[1]["duration"] = 1.4, 2.6  # more than half a second to either side
    make.table(case, rows)
    made = Made(case, tokenizer_dir, case.parent / "again")
    assert list(made.rejects) == ["r0.mp3", "r1.mp3"]
    assert set(made.reasons) == {"not as long as its table says"}
    loader = UtteranceLoader(FolderCorpus(case), tiny_tokenizer.TEXT, batch_seconds=8, target_form=lambda t: t[:3])
    with pytest.raises(ValueError, match="mend the duration"):
        loader.next_batch()


def test_dead_channel(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.recordings == ["both.wav", "right.wav"]
    assert made.pairs == [make.TEXT] * 2
    both, right = (d.segments[0].ids_T.tolist() for d in read_documents(made.out / "speech"))
    assert both == right
    assert made.counted["other_channel"] == 1
    assert list(made.rejects) == ["silence.wav"]
    assert "silence" in made.rejects["silence.wav"]["reason"]
    read = {u.id: u for u in read_utterances(case)}
    assert isinstance(read["silence.wav"], Reject)
    assert (read["right.wav"].audio.samples_S == read["both.wav"].audio.samples_S).all()


def test_latin1_name(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.recordings == ["a.wav", "z.wav"]
    assert list(made.reasons) == ["the file name is not UTF-8"]


def test_long_recording(case: Path, tokenizer_dir: Path) -> None:
    from speechquilt.data.feed.mixture import Mixture
    from speechquilt.data.feed.pack import PackConfig
    from speechquilt.vocab import Vocab

    made = made_of(case, tokenizer_dir)
    (document,) = read_documents(made.out / "speech")
    ids_T = document.segments[0].ids_T
    assert len(ids_T) == 7475
    vocab = Vocab(num_text=300, num_speech=24)
    config = PackConfig(rows=1, units_per_row=512, tokens_per_row=512, buffer=0)
    loader = config.build(Mixture({"speech": [document]}, {"speech": 1.0}), vocab, None, seed=0, total_batches=100)
    trained: list[int] = []
    cut = Counter[str]()
    while loader.mixture.number < 2:
        batch = loader.next_batch()
        trained += [i - vocab.speech_start for i in batch.labels_BT.flatten().tolist() if vocab.is_speech(i)]
        cut.update({key: batch.meta[key] for key in ("cut_documents", "split_documents")})
    assert trained[: len(ids_T)] == ids_T.tolist()
    assert cut["split_documents"] >= 1
    assert cut["cut_documents"] == 0


# ---------------------------------------------------------------- word times


def test_word_times(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.recordings == ["good.wav"]
    assert made.spoken == {"good.wav": tuple(make.TEXT.split())}
    assert {id.removesuffix(".wav"): row["reason"] for id, row in made.rejects.items()} == {
        "end_before_start": "a word ends before it starts",
        "milliseconds": "word times behind the end of the audio",
        "other_words": "words of another text",
    }
    assert "'sees'" in made.rejects["end_before_start.wav"]["detail"]
    assert "milliseconds" in made.rejects["milliseconds.wav"]["detail"]
    assert "'completely'" in made.rejects["other_words.wav"]["detail"]
    found = {u.id: u for u in read_utterances(case)}
    assert {id for id, u in found.items() if isinstance(u, Utterance)} == {"good.wav"}


def test_whisperx(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.spoken == {"a.wav": ("the", "red", "fox", "43", "the", "small", "house")}
    (utterance,) = read_utterances(case)
    assert isinstance(utterance, Utterance)
    assert (utterance.alignment[3].start_s, utterance.alignment[3].end_s) == (0.74, 1.0)


# ---------------------------------------------------------------- text


def test_odd_text(case: Path) -> None:
    for row in make_rows(case / "text.jsonl"):
        said = spoken_form(verbalise(row["text"]))
        assert said in ([row["say"]] if isinstance(row["say"], str) else row["say"])


def test_nothing_to_say(case: Path, tokenizer_dir: Path) -> None:
    made = made_of(case, tokenizer_dir)
    assert made.pairs == [make.TEXT]
    assert made.recordings == ["dash.wav", "dots.wav", "good.wav"]
    assert made.reasons == {"no words in the transcript": 2}
    assert "dash.txt" in made.rejects["dash.wav"]["detail"]


def test_table_gz(case: Path, tokenizer_dir: Path) -> None:
    assert made_of(case, tokenizer_dir).pairs == [make.TEXT] * 2
    assert len(FolderCorpus(case)) == 2


PEAK = """
import resource, sys
from speechquilt.data.sources import text_files
from speechquilt.data.interleaving import synthetic
corpus = text_files.open_corpus(sys.argv[1])
reader = text_files.TextReader(root=str(corpus.root))
plans = (synthetic.plan(read.found.id, read.found.text, 0, synthetic.InterleaveConfig())
         for piece in corpus.slices() for read in reader.read(piece))
print(sum(1 for _ in plans), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_huge_line(case: Path) -> None:
    (case / "small").mkdir()
    (case / "small" / "x.jsonl").write_text(json.dumps({"text": make.TEXT}) + "\n")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0  # in kB here
    found = {}
    for name in ("x.jsonl", "small/x.jsonl"):
        command = [sys.executable, "-c", PEAK, str(case / name)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = [int(n) for n in done.stdout.split()]
    (parts, large), (_, small) = found["x.jsonl"], found["small/x.jsonl"]
    assert parts == 3600 + 1  # 7.2 million words in parts of 2,000
    assert large - small < 300_000
    assert sum(1 for _ in text_files.read_texts(str(case / "x.jsonl"))) == 2


# ---------------------------------------------------------------- beside the cases


def test_cuts_are_tokenized_and_aligned(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As parts of their files where they are that; `align` refuses the others, whose place no table can name."""
    pytest.importorskip("scipy", reason="the extra `corpora` is not installed")
    cut_set(tmp_path)
    made = Made(tmp_path / "cuts.jsonl.gz", tokenizer_dir, tmp_path / "shards")
    assert made.recordings == ["whole", "part", "other", "slow", "padded"]
    assert list(made.rejects) == ["bad"]
    rows = aligned(tmp_path / "cuts.jsonl.gz", tmp_path / "aligned", monkeypatch)
    assert [row["id"] for row in rows] == ["whole", "part"]
    assert (rows[1]["start"], rows[1]["end"]) == (0.5, 1.5)
    again = Made(tmp_path / "aligned", tokenizer_dir, tmp_path / "again")
    assert again.spoken == {"whole": ("says", "whole"), "part": ("says", "part")}


def test_webdataset_is_tokenized_and_aligned(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in" / "s.tar", SAMPLES)
    made = Made(tmp_path / "in", tokenizer_dir, tmp_path / "shards")
    assert len(made.recordings) == 4
    assert made.pairs == ["the cat", "a dog"]
    assert made.reasons == {"unsafe name in an archive": 2, "a sample without audio": 1, "not UTF-8 or not JSON": 1}
    rows = aligned(tmp_path / "in", tmp_path / "aligned", monkeypatch)
    assert [row["id"] for row in rows] == ["s.tar/a/u0.flac", "s.tar/u1.wav"]
    assert len(Made(tmp_path / "aligned", tokenizer_dir, tmp_path / "again").spoken) == 2


def test_segments_of_a_story_have_their_own_words(tmp_path: Path) -> None:
    """Words are kept by id, so rows of one file must not share one."""
    make.CASES["segments"][1](tmp_path)
    found = [u for u in read_utterances(tmp_path) if isinstance(u, Utterance)]
    corpus = Corpus(sentences=found, held_out=[], spoken=found, num_parallel=0, texts=[], to_interleave=[])
    lines = []
    for u in found:
        words = [{"text": w, "start_s": 0.1 * i, "end_s": 0.1 * i + 0.1} for i, w in enumerate(u.text.split())]
        lines.append(json.dumps({"id": u.id, "words": words}))
    (tmp_path / WORDS_FILE).write_text("\n".join(lines))
    for utterance in aligned_corpus(corpus, tmp_path).sentences:
        assert [w.text for w in utterance.alignment] == utterance.text.split()


def test_align_refuses_words_that_last_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"long": 25.8, "good": 2.0}.items():
        make.wav(tmp_path / "in" / f"{name}.wav", seconds)
        (tmp_path / "in" / f"{name}.txt").write_text("hello you")
    rows = aligned(tmp_path / "in", tmp_path / "out", monkeypatch)
    assert [row["id"] for row in rows] == ["good.wav"]
    (reject,) = make_rows(tmp_path / "out" / "aligned" / "rejects.jsonl")
    assert (reject["id"], reject["reason"]) == ("long.wav", "a word of more than 5 s")
    assert "'hello' from 0 to 12.9 s" in reject["detail"]


# ---------------------------------------------------------------- items


def test_items(case: Path, tokenizer_dir: Path) -> None:
    tokenizer = SupervisedTokenizer.load(tokenizer_dir)
    assert tokenizer.text_tokenizer is not None
    tokenizers = evaluate.Tokenizers(speech=tokenizer, text=tokenizer.text_tokenizer)
    items = list(evaluate._items(case / "no_prompt.jsonl", tokenizers))
    assert items[0].prompt == ()
    assert ChoiceTask(name="t", version=1, items=items).run(FakeScorer())["chance"] == 0.5
    for name, rule in (("float_label", r"answer=0\.0 must be a whole number"), ("one_ending", "at least 2 endings")):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl:1: item 'g'.*{rule}"):
            list(evaluate._items(case / f"{name}.jsonl", tokenizers))
