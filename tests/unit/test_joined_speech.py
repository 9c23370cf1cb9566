"""Rows of joined recordings: nothing is lost or said twice, lengths are mixed, and what is heard is what the entry says."""

from itertools import chain

import numpy as np
import pytest

from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.data.sources.joined_speech import JoinedSpeech, JoinedSpeechConfig
from speechquilt.data.sources.speech_corpora import Entry, SpeechCorpus, UtteranceList
from speechquilt.text import TextTokenizer
from speechquilt.types import AlignedWord, Reject, Utterance, Waveform

RATES = (16_000, 22_050, 8_000)


def recording(number: int, *, aligned: bool = True) -> Utterance:
    """A tone of 0.5 to 2 s that says "wordN twice"."""
    rate = RATES[number % 3]
    seconds = 0.5 + (number % 7) / 4
    samples_S = (0.1 + 0.01 * number) * np.sin(np.arange(round(seconds * rate)) / 7).astype(np.float32)
    words = (
        AlignedWord(text=f"word{number}", start_s=0.1, end_s=0.2),
        AlignedWord(text="twice", start_s=0.2, end_s=0.4),
    )
    return Utterance(
        id=f"r{number}",
        text=f"word{number} twice",
        audio=Waveform(samples_S=samples_S, sample_rate=rate),
        alignment=words if aligned else (),
    )


def corpus(num: int = 40) -> UtteranceList:
    return UtteranceList(recording(i) for i in range(num))


def ids(rows: JoinedSpeech) -> list[list[str]]:
    return [rows.entry(i).id.split("+") for i in range(len(rows))]


def test_every_recording_stands_once_in_a_pass_and_other_passes_join_otherwise() -> None:
    one = JoinedSpeechConfig(row_s=6.0).build(corpus())
    assert sorted(chain.from_iterable(ids(one))) == sorted(f"r{i}" for i in range(40))
    two = JoinedSpeechConfig(row_s=6.0, passes=2).build(corpus())
    assert ids(two)[: len(one)] == ids(one)
    assert sorted(chain.from_iterable(ids(two)[len(one) :])) == sorted(f"r{i}" for i in range(40))
    assert ids(two)[len(one) :] != ids(one)
    assert ids(JoinedSpeechConfig(row_s=6.0, seed=1).build(corpus())) != ids(one)


def test_rows_have_one_to_most_recordings_and_stay_below_their_length() -> None:
    rows = JoinedSpeechConfig(most=3, row_s=4.0, passes=4).build(corpus())
    assert {len(parts) for parts in ids(rows)} == {1, 2, 3}
    assert all(rows.entry(i).duration_s <= 4.0 for i in range(len(rows)))  # type: ignore[union-attr]


def test_a_recording_that_is_longer_than_a_row_stays_alone() -> None:
    rows = JoinedSpeechConfig(row_s=0.1).build(corpus(5))
    assert sorted(ids(rows)) == [[f"r{i}"] for i in range(5)]


def test_what_is_heard_is_what_the_entry_says_and_words_move_with_their_sound() -> None:
    rows = JoinedSpeechConfig(row_s=9.0, pause_s=1.0).build(corpus())
    assert isinstance(rows, SpeechCorpus)
    for i in range(len(rows)):
        entry, heard = rows.entry(i), rows[i]
        assert isinstance(entry, Entry)
        assert (entry.id, entry.text) == (heard.id, heard.text)
        assert heard.duration_s == pytest.approx(entry.duration_s, abs=1e-3)
        assert " ".join(w.text for w in heard.alignment) == heard.text
        starts = [w.start_s for w in heard.alignment]
        assert starts == sorted(starts)
        loud = np.abs(heard.audio.samples_S) > 0.02
        for word in heard.alignment:  # a pause is silent, and no word lies in one
            assert loud[round(word.start_s * 16_000) : round(word.end_s * 16_000)].mean() > 0.5


def test_pauses_are_silent_and_of_the_length_that_was_drawn() -> None:
    loud, quiet = (JoinedSpeechConfig(row_s=9.0, pause_s=p).build(corpus()) for p in (0.0, 1.0))
    assert ids(loud)[0] == ids(quiet)[0]
    parts = {u.id: u for u in map(recording, range(40))}
    for rows in (loud, quiet):
        i = next(i for i in range(len(rows)) if len(ids(rows)[i]) > 1)
        spoken_s = sum(parts[id].duration_s for id in ids(rows)[i])
        pause_s = rows.entry(i).duration_s - spoken_s  # type: ignore[union-attr]
        assert pause_s == pytest.approx(0, abs=1e-3) if rows is loud else pause_s > 0.01


def test_without_all_word_times_a_row_has_none() -> None:
    rows = JoinedSpeechConfig(row_s=9.0).build(UtteranceList(recording(i, aligned=i > 0) for i in range(8)))
    for i in range(len(rows)):
        assert bool(rows[i].alignment) == ("r0" not in rows[i].id.split("+"))


def test_rejects_of_the_corpus_below_are_not_lost() -> None:
    empty = Utterance(id="bad", text="x", audio=Waveform(samples_S=np.zeros(0, np.float32), sample_rate=16_000))
    rows = JoinedSpeechConfig().build(UtteranceList([recording(0), empty, recording(1)]))
    entry = rows.entry(len(rows) - 1)
    assert isinstance(entry, Reject)
    assert entry.id == "bad"
    with pytest.raises(ValueError, match=entry.reason):
        rows[len(rows) - 1]


def test_the_loader_takes_rows() -> None:
    texts = TextTokenizer.train([recording(i).text for i in range(40)], 300)
    rows = JoinedSpeechConfig(row_s=4.0).build(corpus())
    loader = UtteranceLoader(rows, texts, batch_seconds=8.0, seed=3)
    assert not loader.rejects or all("too short" in r.reason for r in loader.rejects)
    batch = loader.next_batch()
    assert 1 <= batch.num_samples_B.max() / 16_000 <= 4.0


@pytest.mark.parametrize("bad", [{"most": 0}, {"passes": 0}, {"pause_s": -1.0}, {"row_s": 0.0}])
def test_bad_settings_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        JoinedSpeechConfig(**bad)
