"""A broken row of metadata.jsonl is a reject with its reason for both readers of such a folder, and stops neither."""

import json
from pathlib import Path

import numpy as np
import pytest

from speechquilt import audio
from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_corpora import FolderCorpus
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.data.sources.speech_rows import list_audio
from speechquilt.data.sources.word_times import words_of
from speechquilt.types import Reject, Utterance, Waveform

GOOD = {"file_name": "b.wav", "text": "the cat", "words": [["the", 0.0, 0.1], ["cat", 0.1, 0.2]]}
BROKEN = [
    "{not json",
    "[1, 2]",
    json.dumps({"text": "no file"}),
    json.dumps({**GOOD, "words": "nonsense"}),
    json.dumps({**GOOD, "words": [["the", 0.0]]}),
    json.dumps({**GOOD, "words": [["the", "soon", "later"]]}),
]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_row_stops_nobody(line: str, tmp_path: Path) -> None:
    samples_S = np.full(1600, 0.1, np.float32)
    for name in "abc":
        audio.save(tmp_path / f"{name}.wav", Waveform(samples_S=samples_S, sample_rate=16000))
    first, last = (json.dumps({**GOOD, "file_name": name}) for name in ("a.wav", "c.wav"))
    (tmp_path / "metadata.jsonl").write_text(f"{first}\n\n{line}\n{last}\n")
    first, broken, last = read_utterances(tmp_path)
    assert isinstance(broken, Reject)
    assert broken.reason
    for utterance in (first, last):
        assert isinstance(utterance, Utterance)
        assert [(w.text, w.start_s, w.end_s) for w in utterance.alignment] == [tuple(w) for w in GOOD["words"]]
    items = list(list_audio(tmp_path))
    assert len(items) == len(FolderCorpus(tmp_path)) == 3
    if "reject" not in items[1]:
        with pytest.raises(BrokenAudio, match="words are not"):
            words_of(items[1])
