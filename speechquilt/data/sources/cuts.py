"""lhotse cuts: what is said in each, and each as a row of recordings.

Trap: lhotse counts the times of words from the start of the recording, also where the cut begins later; those of a
supervision from the start of the cut.
"""

import copy
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.types import AlignedWord, Row, Waveform

CUT_SLACK_S = 0.05  # by which a supervision may reach out of its cut: times are rounded
OUT_OF_CUT = "a supervision reaches out of its cut; use CutSet.trim_to_supervisions"


@dataclass(frozen=True)
class Said:
    """One supervision with a text, in seconds from the start of its cut; `shift_s` makes such seconds of word times,
    which lhotse counts from the start of the recording even when the cut begins later.
    """

    text: str
    start_s: float
    end_s: float
    shift_s: float
    alignment: dict[str, Any]


def said_in(cut: Any) -> list[Said]:
    """In order of time. A mixed cut has its supervisions in its tracks, a padding track has none."""
    if hasattr(cut, "tracks"):
        tracks = [(track.cut, float(track.offset)) for track in cut.tracks]
    else:
        tracks = [(cut, 0.0)]
    found = [
        Said(
            text=supervision.text.strip(),
            start_s=supervision.start + offset_s,
            end_s=supervision.end + offset_s,
            shift_s=offset_s - getattr(part, "start", 0.0),
            alignment=supervision.alignment or {},
        )
        for part, offset_s in tracks
        for supervision in part.supervisions
        if supervision.text and supervision.text.strip()
    ]
    return sorted(found, key=lambda part: part.start_s)


def transcript(said: Sequence[Said]) -> str:
    return " ".join(part.text for part in said)


def reaches_out(cut: Any, said: Sequence[Said]) -> bool:
    """Whether a text says more than is heard."""
    return any(s.start_s < -CUT_SLACK_S or s.end_s > cut.duration + CUT_SLACK_S for s in said)


def word_times(said: Sequence[Said], kind: str) -> tuple[AlignedWord, ...]:
    """Seconds from the start of the cut; nothing rather than a part of the words."""
    words: list[AlignedWord] = []
    for part in said:
        aligned = part.alignment.get(kind)
        if not aligned:
            return ()
        for item in aligned:
            start_s = float(item.start) + part.shift_s
            score = 1.0 if item.score is None else float(item.score)
            if item.symbol.strip():
                end_s = start_s + float(item.duration)
                words.append(AlignedWord(text=item.symbol, start_s=start_s, end_s=end_s, score=score))
    return tuple(words)


def heard(cut: Any) -> Waveform:
    """The first channel of a cut. Raises ValueError when lhotse cannot read it."""
    lhotse = need("lhotse")
    try:
        samples_CS = cut.load_audio()
    except (lhotse.audio.AudioLoadingError, lhotse.audio.DurationMismatchError) as error:
        raise ValueError(f"lhotse cannot read its audio: {error}") from error
    if samples_CS is None:
        raise ValueError("the cut has no recording; build cuts from recordings, not from features alone")
    silent = not samples_CS[0].any() and samples_CS.any()
    channel = int(np.argmax(samples_CS.any(1))) if silent else 0
    samples_S = np.ascontiguousarray(samples_CS[channel], dtype=np.float32)
    return Waveform(samples_S=samples_S, sample_rate=int(cut.sampling_rate))


def is_cut(values: dict[str, Any]) -> bool:
    """Whether a JSON object is a cut of lhotse's."""
    return str(values.get("type", "")).endswith("Cut") and "id" in values


def load_cuts(path: Path | str) -> Iterable[Any]:
    """A manifest of cuts, read as it is walked through."""
    return need("lhotse").CutSet.from_file(path)


def cut_rows(path: Path) -> Iterator[Row]:
    """A manifest as rows of recordings. A cut that is a part of one file becomes just that (`path`, `start`, `end`);
    any other is carried whole, as `cut`, for `heard` of `cut_of`.
    """
    for cut in load_cuts(path):
        said = said_in(cut)
        if reaches_out(cut, said):
            yield {
                "id": cut.id,
                "reject": "a supervision reaches out of its cut",
                "detail": f"{path.name}: {OUT_OF_CUT}",
            }
            continue
        place = _place(cut)
        shift_s = place.get("start", 0.0)
        words = [[w.text, w.start_s + shift_s, w.end_s + shift_s] for w in word_times(said, "word")]
        where = f"{path.name} cut {cut.id}"
        yield {"id": cut.id, **place, "text": transcript(said), "words": words or None, "where": where}


def cut_of(row: Row) -> Any:
    """The cut that a row carries."""
    return need("lhotse").serialization.deserialize_item(copy.deepcopy(row["cut"]))  # which it takes apart


def _place(cut: Any) -> Row:
    """What of a row says where the sound is. lhotse's paths are relative to the working directory."""
    recording = getattr(cut, "recording", None)
    if type(cut).__name__ != "MonoCut" or recording is None or recording.transforms or len(recording.sources) != 1:
        return {"path": cut.id, "duration": float(cut.duration), "cut": cut.to_dict()}
    source = recording.sources[0]
    if source.type != "file" or cut.channel != source.channels[0]:
        return {"path": cut.id, "duration": float(cut.duration), "cut": cut.to_dict()}
    path = os.path.abspath(source.source)
    if cut.start == 0 and abs(cut.duration - recording.duration) < 1 / recording.sampling_rate:
        return {"path": path, "duration": float(cut.duration)}
    return {"path": path, "start": float(cut.start), "end": float(cut.end)}


def need(name: str) -> Any:
    """A package of the extra `corpora`, imported where it is used."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed; run `pip install speechquilt[corpora]`") from error
