"""Small recordings and tables of them, as users bring them, and what a reader made of their rows."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from speechquilt.data.sources.audio_files import read_whole
from speechquilt.data.sources.speech_rows import sound_of
from speechquilt.types import Row

RATE = 16000


def wave(seconds: float = 0.2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def write(path: Path, seconds: float = 0.2, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave(seconds, seed), RATE)
    return path


def coded(kind: str = "FLAC", seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave(seed=seed), RATE, format=kind)
    return buffer.getvalue()


def good(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "reject" not in row]


def faults(rows: list[Row]) -> dict[str, str]:
    return {row["id"]: row["reject"] for row in rows if "reject" in row}


def heard(root: Path, row: Row) -> np.ndarray:
    return read_whole(sound_of(root, row)).samples_S


def dump(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    text = json.dumps(rows) if ".json" in name and ".jsonl" not in name else "".join(json.dumps(r) + "\n" for r in rows)
    if ".csv" in name or ".tsv" in name:
        delimiter = "\t" if ".tsv" in name else ","
        text = "\r\n".join([delimiter.join(rows[0]), *(delimiter.join(map(str, r.values())) for r in rows)])
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    (folder / name).write_bytes(data)
