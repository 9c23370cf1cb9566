"""Kokoro-82M as one folder: its ONNX graph, which comes in parts, its voices and its alphabet of phonemes.

Trap: a voice is no vector but a table. Row n is the style of a text of n + 1 phonemes.
"""

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from speechquilt.files import write_json
from speechquilt.nn.hugging_face import read_json

NUM_PARTS = 4
SAMPLE_RATE = 24000


def join_kokoro(source: Path, out: Path) -> None:
    """`source` with part-1.bin to part-4.bin, model.sha256, vocab.json and voices.npz -> model.onnx, config.json and
    voices.safetensors (each voice `[longest text, style]`) in the folder `out`.

    Raises ValueError when the parts are not those of the model, or a voice is no table.
    """
    digest = hashlib.sha256()
    with (out / "model.onnx").open("wb") as model:
        for number in range(1, NUM_PARTS + 1):
            part = (source / f"part-{number}.bin").read_bytes()
            digest.update(part)
            model.write(part)
    expected = (source / "model.sha256").read_text().strip()
    if digest.hexdigest() != expected:
        raise ValueError(
            f"the parts in {source} give SHA-256 {digest.hexdigest()}, not {expected}; pin releases of one model"
        )
    with np.load(source / "voices.npz", allow_pickle=False) as archive:
        voices = {name: np.ascontiguousarray(archive[name].squeeze(), np.float32) for name in archive.files}
    if wrong := [name for name, table in voices.items() if table.ndim != 2]:
        raise ValueError(f"voices.npz: {', '.join(wrong)} is no table of styles; pin another release")
    save_file(voices, out / "voices.safetensors")
    phonemes = read_json(source / "vocab.json")["vocab"]
    write_json(out / "config.json", {"model_type": "kokoro", "sample_rate": SAMPLE_RATE, "phonemes": phonemes})
