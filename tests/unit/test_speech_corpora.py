"""Every reader gives what was written: text, length, samples, word times; what is broken says so. Lazily read == in memory."""

import io
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.data.feed.utterances import AHEAD_PER_THREAD, UtteranceLoader
from speechquilt.data.sources.speech_corpora import (
    CutCorpus,
    DatasetCorpus,
    Entry,
    FolderCorpus,
    Mix,
    SpeechCorpus,
    UtteranceList,
    from_int16,
    to_int16,
)
from speechquilt.text import TextTokenizer
from speechquilt.types import AudioBatch, Reject, Utterance, Waveform

TEXTS = ["the cat sat", "a dog", "the mat", "on the cat", "dog and cat", "mat"]
TEXT = TextTokenizer.train(TEXTS * 3, 300)


def noise(seconds: float, seed: int, rate: int = 16000) -> Waveform:
    samples_S = np.random.default_rng(seed).uniform(-0.9, 0.9, round(seconds * rate)).astype(np.float32)
    return Waveform(samples_S=samples_S, sample_rate=rate)


def waves() -> list[Waveform]:
    return [noise(1.0 + 0.13 * i, i, rate=(16000, 8000)[i % 2]) for i in range(len(TEXTS))]


def write_folder(folder: Path) -> FolderCorpus:
    """Audio files and a table of them."""
    rows = []
    for i, wave in enumerate(waves()):
        audio.save(folder / f"{i}.flac", wave)
        rows.append(json.dumps({"file_name": f"{i}.flac", "text": TEXTS[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return FolderCorpus(folder)


def write_dataset(folder: Path) -> DatasetCorpus:
    """Half of the audio as bytes in the rows, half as paths."""
    datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    cells = []
    for i, wave in enumerate(waves()):
        audio.save(folder / f"{i}.flac", wave)
        path = folder / f"{i}.flac"
        cells.append({"bytes": path.read_bytes(), "path": None} if i % 2 else {"bytes": None, "path": str(path)})
    table = datasets.Dataset.from_dict({"sound": cells, "said": TEXTS}).cast_column("sound", datasets.Audio())
    return DatasetCorpus(table, text_column="said", audio_column="sound")


def write_cuts(folder: Path) -> CutCorpus:
    """Each cut is a part of a stereo recording; the other channel is silent."""
    lhotse = pytest.importorskip("lhotse", reason="the extra `corpora` is not installed")
    import soundfile

    cuts = []
    for i, wave in enumerate(waves()):
        pad_S = np.zeros(wave.sample_rate // 2, np.float32)
        samples_S = np.concatenate([pad_S, wave.samples_S, pad_S])
        soundfile.write(folder / f"{i}.flac", np.stack([samples_S, 0 * samples_S], 1), wave.sample_rate)
        recording = lhotse.Recording.from_file(folder / f"{i}.flac")
        said = lhotse.SupervisionSegment(f"s{i}", recording.id, 0.5, wave.duration_s, channel=[0, 1], text=TEXTS[i])
        cut = lhotse.MultiCut(f"c{i}", 0.0, recording.duration, [0, 1], supervisions=[said], recording=recording)
        cuts.append(cut.truncate(offset=0.5, duration=wave.duration_s))
    lhotse.CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl.gz")
    return CutCorpus.load(folder / "cuts.jsonl.gz")


WRITERS = {"folder": write_folder, "dataset": write_dataset, "cuts": write_cuts}


def batches(loader: UtteranceLoader, n: int) -> list[AudioBatch]:
    return [loader.next_batch() for _ in range(n)]


def same(a: AudioBatch, b: AudioBatch) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("wav_BS", "num_samples_B", "text_BL"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_reader_gives_what_was_written(kind: str, tmp_path: Path) -> None:
    corpus: SpeechCorpus = WRITERS[kind](tmp_path)
    assert isinstance(corpus, SpeechCorpus)
    assert len(corpus) == len(TEXTS)
    for i, (text, wave) in enumerate(zip(TEXTS, waves())):
        entry, heard = corpus.entry(i), corpus[i]
        assert isinstance(entry, Entry)
        assert entry.text == heard.text == text
        assert entry.id == heard.id
        assert entry.duration_s == pytest.approx(wave.duration_s, abs=1e-4)
        assert heard.audio.sample_rate == wave.sample_rate
        assert np.abs(heard.audio.samples_S - wave.samples_S).max() < 1e-3  # 16-bit files


@pytest.mark.parametrize("kind", WRITERS)
def test_batches_of_files_are_those_of_memory(kind: str, tmp_path: Path) -> None:
    corpus = WRITERS[kind](tmp_path)
    in_memory = [corpus[i] for i in range(len(corpus))]
    lazy = UtteranceLoader(corpus, TEXT, batch_seconds=4, seed=2, gain_db=3)
    for a, b in zip(batches(lazy, 9), batches(UtteranceLoader(in_memory, TEXT, batch_seconds=4, seed=2, gain_db=3), 9)):
        assert same(a, b)


@given(st.lists(st.integers(-32767, 32767), max_size=30))
def test_int16_and_back_changes_nothing(values: list[int]) -> None:
    samples_S = np.array(values, np.int16)
    assert np.array_equal(to_int16(from_int16(samples_S)), samples_S)


def test_a_folder_says_what_is_broken_before_and_after_decoding(tmp_path: Path) -> None:
    write_folder(tmp_path)
    rows = [{"file_name": "0.flac", "text": "the cat sat"}, {"file_name": "1.flac", "text": " "}]
    rows += [{"file_name": "gone.flac", "text": "a dog"}, {"text": "no file"}]
    rows += [{"file_name": "lies.flac", "text": "the mat", "duration": 1.0}]  # believed, and found out later
    (tmp_path / "lies.flac").write_bytes(b"not audio")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = FolderCorpus(tmp_path)
    found = [corpus.entry(i) for i in range(5)]
    assert [isinstance(x, Reject) for x in found] == [False, True, True, True, False]
    assert [x.reason for x in found if isinstance(x, Reject) and "transcript" in x.reason] == ["no transcript"]
    with pytest.raises(ValueError, match="cannot be read as audio"):
        corpus[4]
    with pytest.raises(FileNotFoundError, match="not a folder"):
        FolderCorpus(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no audio"):
        FolderCorpus(tmp_path / "empty")


def test_a_dataset_says_what_is_wrong(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    wav = audio.to_wav_bytes(noise(1.0, 0))
    cells = [{"bytes": wav, "path": None}, {"bytes": b"junk", "path": None}, {"bytes": None, "path": None}]
    columns = {"audio": [*cells, cells[0]], "text": ["cat", "dog", "mat", None], "seconds": [1.0, 0.0, 0.0, 1.0]}
    table = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    corpus = DatasetCorpus(table)
    reasons = [getattr(corpus.entry(i), "reason", "") for i in range(4)]
    assert reasons[0] == ""
    assert "cannot be read as audio" in reasons[1]
    assert "neither bytes nor a path" in reasons[2]
    assert reasons[3] == "no transcript"
    with pytest.raises(ValueError, match="cannot be read as audio"):
        corpus[1]
    with pytest.raises(ValueError, match="text_column='words' is not a column"):
        DatasetCorpus(table, text_column="words")
    with pytest.raises(ValueError, match="choose a split"):
        DatasetCorpus(datasets.DatasetDict({"train": table}))


def test_a_dataset_is_loaded_from_disk_with_or_without_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    cell = {"bytes": audio.to_wav_bytes(noise(1.0, 0)), "path": None}
    table = datasets.Dataset.from_dict({"audio": [cell], "text": ["cat"]}).cast_column("audio", datasets.Audio())
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": table}).save_to_disk(tmp_path / "many")
    for corpus in (DatasetCorpus.load(str(tmp_path / "one")), DatasetCorpus.load(str(tmp_path / "many"), split="dev")):
        assert corpus[0].text == "cat"
        assert corpus[0].duration_s == pytest.approx(1.0)


def test_a_given_duration_spares_the_header() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    cell = {"bytes": b"junk", "path": None}
    table = datasets.Dataset.from_dict({"audio": [cell], "text": ["cat"], "seconds": [2.5]})
    corpus = DatasetCorpus(table.cast_column("audio", datasets.Audio(decode=False)), duration_column="seconds")
    entry = corpus.entry(0)
    assert isinstance(entry, Entry)
    assert entry.duration_s == 2.5


def test_word_times_of_cuts_count_from_the_cut(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="the extra `corpora` is not installed")
    from lhotse.supervision import AlignmentItem

    audio.save(tmp_path / "x.wav", noise(3.0, 0))
    recording = lhotse.Recording.from_file(tmp_path / "x.wav")
    times = {"word": [AlignmentItem("the", 1.0, 0.2), AlignmentItem("", 1.2, 0.1), AlignmentItem("cat", 1.3, 0.4, 0.5)]}
    first = lhotse.SupervisionSegment("b", "x", 1.0, 1.0, text="the cat", alignment=times)
    second = lhotse.SupervisionSegment("a", "x", 2.0, 0.5, text="sat")
    whole = lhotse.MonoCut("x", 0.0, 3.0, 0, supervisions=[second, first], recording=recording)
    part = whole.truncate(offset=0.75, duration=1.25)  # without the second supervision
    padded = part.pad(duration=2.0, direction="left")
    corpus = CutCorpus([whole, part, padded, whole.drop_supervisions(), whole.truncate(offset=0.0, duration=1.5)])
    assert corpus[0].text == "the cat sat"
    assert corpus[0].alignment == ()  # "sat" has no times, and half an alignment is none
    for index, pad_s in ((1, 0.0), (2, 0.75)):
        assert [(w.text, round(w.start_s, 6), round(w.end_s, 6)) for w in corpus[index].alignment] == [
            ("the", 0.25 + pad_s, 0.45 + pad_s),
            ("cat", 0.55 + pad_s, 0.95 + pad_s),
        ]
    assert [w.score for w in corpus[1].alignment] == [1.0, 0.5]
    assert corpus.entry(3) == Reject(id="x", reason="no transcript")
    cut_short = corpus.entry(4)
    assert isinstance(cut_short, Reject)
    assert "reaches out of its cut" in cut_short.reason
    (tmp_path / "x.wav").write_bytes(b"junk")
    with pytest.raises(ValueError, match="lhotse cannot read"):
        corpus[0]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lhotse", None)
    with pytest.raises(ImportError, match=r"speechquilt\[corpora\]"):
        CutCorpus([])


class CountingCorpus:
    """One-second clips of constant value; `broken` ones cannot be decoded. Counts what was decoded and not yet used."""

    def __init__(self, n: int, value: float = 0.5, broken: frozenset[int] = frozenset(), seconds: float = 1.0) -> None:
        self.n, self.value, self.broken, self.seconds = n, value, broken, seconds
        self.decoded = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.n

    def entry(self, index: int) -> Entry:
        return Entry(id=f"c{index}", text=TEXTS[index % len(TEXTS)], duration_s=1.0)

    def __getitem__(self, index: int, /) -> Utterance:
        with self._lock:
            self.decoded += 1
        if index in self.broken:
            raise OSError("disk on fire")
        samples_S = np.full(int(16000 * self.seconds), self.value, np.float32)
        samples_S[0] = (index + 1) / 1000
        waveform = Waveform(samples_S=samples_S, sample_rate=16000)
        return Utterance(id=f"c{index}", text=TEXTS[index % len(TEXTS)], audio=waveform)


def numbers(batch: AudioBatch) -> list[int]:
    return [round(float(x) * 1000) - 1 for x in batch.wav_BS[:, 0]]


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 25), min_size=2, max_size=3),
    ratio=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    seed=st.integers(0, 5),
)
def test_a_mix_keeps_its_ratio_and_shows_everything(sizes: list[int], ratio: list[int], seed: int) -> None:
    ratio = ratio[: len(sizes)]
    corpora = [CountingCorpus(n, value=(s + 1) / 10) for s, n in enumerate(sizes)]
    loader = UtteranceLoader(Mix(corpora=corpora, ratio=ratio), TEXT, batch_seconds=3, seed=seed)
    ratio = [r // math.gcd(*ratio) for r in ratio]  # 2 : 2 is 1 : 1, no recording twice for it
    rounds = max(-(-n // r) for n, r in zip(sizes, ratio))
    shown: list[dict[int, int]] = [{} for _ in sizes]
    for epoch in (1, 2, 3):
        seen = [0] * len(sizes)
        while sum(seen) < rounds * sum(ratio):
            batch = loader.next_batch()
            for row, number in enumerate(numbers(batch)):
                source = round(float(batch.wav_BS[row, 1]) * 10) - 1
                seen[source] += 1
                shown[source][number] = shown[source].get(number, 0) + 1
        assert seen == [rounds * r for r in ratio]
        for n, r, counts in zip(sizes, ratio, shown):
            assert sorted(counts) == list(range(n))
            assert max(counts.values()) - min(counts.values()) <= 1  # nothing twice before all were shown
            assert sum(counts.values()) == epoch * rounds * r


def test_a_mix_refuses_what_it_cannot_keep() -> None:
    for ratio in ((1,), (1, 0), (1, 2.5)):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            Mix(corpora=(CountingCorpus(2), CountingCorpus(2)), ratio=ratio)
    with pytest.raises(ValueError, match="number 1 of the mix is empty"):
        Mix(corpora=(CountingCorpus(2), UtteranceList([])), ratio=(1, 1))


@settings(max_examples=12, deadline=None)
@given(stop=st.integers(0, 30), before=st.integers(0, 3), after=st.integers(0, 3), rank=st.integers(0, 1))
def test_threads_change_nothing_and_resume_exactly(stop: int, before: int, after: int, rank: int) -> None:
    """13 batches an epoch, two ranks: the stop lies before, at and past epoch edges."""

    def make(threads: int) -> UtteranceLoader:
        mix = Mix(corpora=(CountingCorpus(9, 0.1), CountingCorpus(21, 0.2)), ratio=(1, 2))
        return UtteranceLoader(
            mix, TEXT, batch_seconds=3.5, seed=4, gain_db=3, rank=rank, world_size=2, threads=threads
        )

    straight, killed, resumed = make(0), make(before), make(after)
    for _ in range(stop):
        assert same(straight.next_batch(), killed.next_batch())
    resumed.next_batch()  # it may have been used before
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    for _ in range(20):
        assert same(straight.next_batch(), resumed.next_batch())
    assert straight.state_dict() == resumed.state_dict()
    for loader in (killed, resumed):
        loader.close()


def test_what_waits_in_memory_is_bounded() -> None:
    corpus = CountingCorpus(400)
    loader = UtteranceLoader(corpus, TEXT, batch_seconds=4, threads=2)
    assert corpus.decoded == 0
    for given_out in range(1, 9):
        loader.next_batch()
        assert corpus.decoded <= 4 * (given_out + AHEAD_PER_THREAD * 2)
    loader.close()
    assert corpus.decoded >= 4 * 8


def test_broken_recordings_are_left_out_and_counted() -> None:
    broken = frozenset({3, 17})
    kept = UtteranceLoader(CountingCorpus(40, broken=broken), TEXT, batch_seconds=3, threads=2)
    plain = UtteranceLoader(CountingCorpus(40), TEXT, batch_seconds=3)
    for _ in range(14):
        assert numbers(kept.next_batch()) == [i for i in numbers(plain.next_batch()) if i not in broken]
    assert [r.id for r in kept.rejects] == ["c3", "c17"]
    assert kept.reject_summary() == "2 x disk on fire"
    kept.close()


def test_a_batch_of_broken_recordings_gives_way_to_the_next() -> None:
    loader = UtteranceLoader(CountingCorpus(40, broken=frozenset({5})), TEXT, batch_seconds=1)
    seen = [numbers(loader.next_batch()) for _ in range(40)]
    assert all(len(rows) == 1 for rows in seen)
    assert {rows[0] for rows in seen} == set(range(40)) - {5}


def test_too_many_broken_recordings_end_the_run() -> None:
    loader = UtteranceLoader(CountingCorpus(40, broken=frozenset(range(10))), TEXT, batch_seconds=3, threads=1)
    with pytest.raises(ValueError, match="disk on fire; mend the corpus"):
        batches(loader, 14)
    loader.close()


def test_a_recording_longer_than_promised_does_not_burst_its_batch() -> None:
    loader = UtteranceLoader(CountingCorpus(40, seconds=2.5), TEXT, batch_seconds=3)
    with pytest.raises(ValueError, match=r"2\.5 s long, but its header or manifest says 1\.0 s"):
        loader.next_batch()


def test_targets_take_the_form_and_length_that_the_model_wants() -> None:
    loader = UtteranceLoader(CountingCorpus(1), TEXT, batch_seconds=3, target_form=lambda text: " " + text.upper())
    ids = loader.next_batch().text_BL[0].tolist()
    assert ids == TEXT.encode(" THE CAT SAT")
    with pytest.raises(ValueError, match="more than max_ids=1 ids"):
        UtteranceLoader(CountingCorpus(1), TEXT, batch_seconds=3, max_ids=1)


def test_scripts_without_spaces_may_be_long() -> None:
    chinese = Utterance(id="z", text="今天天气很好我们去公园", audio=noise(8.0, 0))
    tokenizer = TextTokenizer.train([chinese.text] * 3, 300)
    assert len(UtteranceLoader([chinese], tokenizer, batch_seconds=9)) == 1


def test_bytes_of_any_container_are_read() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    import soundfile

    cells = []
    for kind in ("WAV", "FLAC", "OGG"):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(1.0, 0).samples_S, 16000, format=kind)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"audio": cells, "text": ["cat"] * 3})
    corpus = DatasetCorpus(table.cast_column("audio", datasets.Audio(decode=False)))
    assert [round(corpus[i].duration_s, 3) for i in range(3)] == [1.0, 1.0, 1.0]
