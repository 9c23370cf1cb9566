"""A bank of voices: several engines behind one speaker, and further voices by pitch and rate. A name says it all.

"flite:slt" is an engine's own voice, "flite:slt+p1.10r0.92" the same as a smaller person (pitch and formants 1.10 times
as high) who speaks at 0.92 of the speed; "espeak:en-us+f3" has a plus of espeak-ng's own.
Trap: pitch is resampling, which changes the speed too; the engine speaks slower or faster to make up for it, so only
engines with a speed have further voices.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from speechquilt import audio
from speechquilt.protocols import TextToSpeech
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.tts.flite import FliteTTSConfig
from speechquilt.tts.pico import PicoTTSConfig
from speechquilt.types import AlignedWord, Utterance, Waveform

ENGINES = ("espeak", "flite", "pico")
ESPEAK_WORDS_PER_MINUTE = 175  # espeak-ng's own speed, our rate of 1
_NAME = re.compile(r"(?P<engine>[a-z0-9]+):(?P<own>[^\s:]+?)(?:\+p(?P<pitch>\d\.\d\d)r(?P<rate>\d\.\d\d))?")


@dataclass(frozen=True)
class VoiceName:
    """`engine`'s voice `own`, `pitch` times as high and `rate` times as fast."""

    engine: str
    own: str
    pitch: float = 1.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"voice {self}: there is no engine {self.engine!r}; there are {', '.join(ENGINES)}")
        for key, low, high in (("pitch", 0.7, 1.4), ("rate", 0.7, 1.4)):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"voice {self}: {key} must be {low}..{high}; 1 is the voice's own")

    def __str__(self) -> str:
        further = f"+p{self.pitch:.2f}r{self.rate:.2f}" if (self.pitch, self.rate) != (1.0, 1.0) else ""
        return f"{self.engine}:{self.own}{further}"

    @property
    def speaker(self) -> str:
        """The engine's voice behind it: what two names share when they are one person's."""
        return f"{self.engine}:{self.own}"

    @classmethod
    def parse(cls, name: str) -> "VoiceName":
        """Raises ValueError on a name of another form."""
        found = _NAME.fullmatch(name)
        if not found:
            raise ValueError(f"voice {name!r} must look like flite:slt, espeak:en-us+f3 or flite:slt+p1.10r0.92")
        pitch, rate = (float(found[key] or 1) for key in ("pitch", "rate"))
        return cls(found["engine"], found["own"], pitch, rate)


@dataclass(frozen=True, kw_only=True)
class VoiceBankConfig:
    """Which voices speak."""

    voices: tuple[str, ...] = ("espeak:en-us", "espeak:en-us+f3", "espeak:en+m3", "espeak:en+f4")
    """Voices, each once: an engine (espeak, flite, pico), a colon, its own voice, and +p1.10r0.92 for another pitch and rate."""
    flite_folder: str = ""
    """Where Flite's libraries were unpacked; what is not there is taken from the system."""

    def __post_init__(self) -> None:
        if not self.voices or len(set(self.voices)) != len(self.voices):
            raise ValueError(f"voices={self.voices} must name at least one voice, each once")
        for voice in self.voices:
            VoiceName.parse(voice)

    def build(self) -> "VoiceBank":
        return VoiceBank(self)


class VoiceBank:
    """Engines are opened with the bank; `speak` is a pure function of (config, text, voice)."""

    def __init__(self, config: VoiceBankConfig) -> None:
        """Raises what the engines raise: ValueError on a voice they have not, FileNotFoundError or ImportError on an
        engine that is not there."""
        self.config = config
        self.voices: Sequence[str] = config.voices
        self._names = {voice: VoiceName.parse(voice) for voice in config.voices}
        self._engine = functools.cache(self._open)
        for name in self._names.values():
            self._engine(name.engine, name.own, name.rate / name.pitch)

    def speak(self, text: str, voice: str) -> Utterance:
        """One utterance at the engine's sample rate, with word times where the engine has them. Raises ValueError on a
        voice outside the config and on text that the engine cannot speak."""
        if voice not in self._names:
            raise ValueError(f"voice {voice!r} is not one of this bank's: {', '.join(self.voices)}")
        name = self._names[voice]
        spoken = self._engine(name.engine, name.own, name.rate / name.pitch).speak(text, name.own)
        return replace(faster(spoken, name.pitch), id=f"{voice}/{spoken.id.rpartition('/')[2]}")

    def _open(self, engine: str, own: str, rate: float) -> TextToSpeech:
        if engine == "flite":
            return FliteTTSConfig(voices=(own,), rate=rate, folder=self.config.flite_folder).build()
        if engine == "pico":
            return PicoTTSConfig(voices=(own,), rate=rate).build()
        return EspeakTTSConfig(voices=(own,), words_per_minute=round(ESPEAK_WORDS_PER_MINUTE * rate)).build()


def faster(utterance: Utterance, factor: float) -> Utterance:
    """The recording played `factor` times as fast, as a tape would: higher and shorter. The sample rate stays."""
    if factor == 1.0:
        return utterance
    rate = utterance.audio.sample_rate
    played = Waveform(samples_S=utterance.audio.samples_S, sample_rate=round(rate * factor))
    factor = played.sample_rate / rate
    words = (
        AlignedWord(text=w.text, start_s=w.start_s / factor, end_s=w.end_s / factor, score=w.score)
        for w in utterance.alignment
    )
    return replace(utterance, audio=audio.resample(played, rate), alignment=tuple(words))
