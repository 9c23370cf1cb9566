"""Text -> natural speech by Kokoro-82M, a StyleTTS 2 network in ONNX, from espeak-ng's IPA; about real time on one core.

Its folder is the one that `speechquilt weights` makes: the graph, the alphabet of phonemes, and the voices.
Traps. A voice is a table of styles: the row is chosen by how many phonemes are said. Phonemes outside the alphabet are
left out, as its authors do. Those voices are Japanese; they speak English with a slight accent.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from speechquilt.nn.hugging_face import read_json
from speechquilt.tts.espeak import Clause, clauses
from speechquilt.types import Utterance, Waveform

MODEL = "model.onnx"
_EDGE = 0  # the id that stands before the first and after the last phoneme


@dataclass(frozen=True, kw_only=True)
class KokoroTTSConfig:
    """Voices and speed of Kokoro, the natural speaker."""

    folder: str = ".cache/weights/kokoro-82m"
    """Folder with model.onnx, config.json and voices.safetensors."""
    voices: tuple[str, ...] = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")
    """Voices to speak with, each once."""
    language: str = "en-us"
    """The language of the text, an espeak-ng name: it decides how words are pronounced."""
    rate: float = 1.0
    """Speed, 0.5 to 2; 1 is the voice's own. Higher: less audio for the same text."""
    num_threads: int = 1
    """Threads of the network; 0: one per core."""

    def __post_init__(self) -> None:
        if not self.voices or len(set(self.voices)) != len(self.voices):
            raise ValueError(f"voices={self.voices} must name at least one voice, each once")
        if not 0.5 <= self.rate <= 2:
            raise ValueError(f"rate={self.rate} must be 0.5..2; 1 is the voice's own speed")
        if self.num_threads < 0:
            raise ValueError(f"num_threads={self.num_threads} must be at least 0, one per core")

    def build(self) -> "KokoroTTS":
        return KokoroTTS(self)


class KokoroTTS:
    """Kokoro by onnxruntime. `speak` is a pure function of (config, text, voice)."""

    def __init__(self, config: KokoroTTSConfig) -> None:
        """Raises FileNotFoundError or ValueError on a folder without the model or without a voice of the config,
        ImportError when onnxruntime or espeak-ng is not installed."""
        self.config = config
        self.voices: Sequence[str] = config.voices
        folder = Path(config.folder)
        for name in (MODEL, "voices.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; `speechquilt weights kokoro-82m` makes such a folder"
                )
        settings = read_json(folder / "config.json")
        self._sample_rate, self._ids = settings["sample_rate"], settings["phonemes"]
        self._styles: dict[str, np.ndarray] = load_file(folder / "voices.safetensors")
        if unknown := [voice for voice in config.voices if voice not in self._styles]:
            raise ValueError(f"voices: {folder} has no {', '.join(unknown)}; it has {', '.join(sorted(self._styles))}")
        clauses("a", config.language)  # says at once what espeak-ng lacks
        self._session = _session(folder / MODEL, config.num_threads)

    def speak(self, text: str, voice: str) -> Utterance:
        """One utterance at 24 kHz without word times: the network does not give any.

        Raises ValueError on a voice outside the config and on text without words.
        """
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is not one of this speaker's: {', '.join(self.voices)}")
        styles_NS = self._styles[voice]
        breaths = list(self._breaths(clauses(text, self.config.language), len(styles_NS)))
        if not breaths:
            raise ValueError(f"text {text!r} has nothing to say; give it words of {self.config.language}")
        samples_S = np.concatenate([self._synthesize(breath, styles_NS) for breath in breaths])
        config = self.config
        digest = hashlib.sha256(f"{config.language} {config.rate}\n{text}".encode()).hexdigest()[:12]
        return Utterance(
            id=f"{voice}/{digest}",
            text=text,
            audio=Waveform(samples_S=samples_S, sample_rate=self._sample_rate),
            alignment=(),
        )

    def _breaths(self, said: Sequence[Clause], longest: int) -> Iterator[str]:
        """Phonemes of as many whole clauses as fit into what the network can say at once; a longer clause is cut."""
        breath = ""
        for clause in said:
            new = "".join(c for c in f"{clause.ipa}{clause.signs}" if c in self._ids)
            if breath and len(breath) + 1 + len(new) > longest:
                yield breath
                breath = ""
            breath = f"{breath} {new}".strip()
            while len(breath) > longest:
                yield breath[:longest]
                breath = breath[longest:]
        if breath:
            yield breath

    def _synthesize(self, breath: str, styles_NS: np.ndarray) -> np.ndarray:
        ids = [self._ids[phoneme] for phoneme in breath]
        (samples_S,) = self._session.run(
            None,
            {
                "tokens": np.array([[_EDGE, *ids, _EDGE]], np.int64),
                "style": styles_NS[[len(ids) - 1]],
                "speed": np.array([self.config.rate], np.float32),
            },
        )
        return samples_S.astype(np.float32).reshape(-1).clip(-1, 1)


def _session(path: Path, num_threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("onnxruntime is not installed; run `pip install speechquilt[kokoro]`") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
