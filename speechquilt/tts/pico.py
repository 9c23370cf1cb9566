"""Text -> English speech by SVOX Pico's command `pico2wave` (Debian's non-free section): two good voices, no word times.

Trap: speed is a tag inside the text, so the text is XML and must be escaped.
"""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from speechquilt import audio
from speechquilt.tts.spoken_words import spoken_words
from speechquilt.types import Utterance

COMMAND = "pico2wave"
VOICES = ("en-US", "en-GB")


@dataclass(frozen=True, kw_only=True)
class PicoTTSConfig:
    """Voices and speed of SVOX Pico."""

    voices: tuple[str, ...] = VOICES
    """Voices to speak with, each once: en-US or en-GB."""
    rate: float = 1.0
    """Speed, 0.5 to 2; 1 is the voice's own. Higher: less audio for the same text."""

    def __post_init__(self) -> None:
        if not self.voices or len(set(self.voices)) != len(self.voices):
            raise ValueError(f"voices={self.voices} must name at least one voice, each once")
        if unknown := [voice for voice in self.voices if voice not in VOICES]:
            raise ValueError(f"voices: Pico has no {', '.join(unknown)}; it has {', '.join(VOICES)}")
        if not 0.5 <= self.rate <= 2:
            raise ValueError(f"rate={self.rate} must be 0.5..2; 1 is the voice's own speed")

    def build(self) -> "PicoTTS":
        return PicoTTS(self)


class PicoTTS:
    """One process per utterance. Its utterances have no alignment; `align` finds one."""

    def __init__(self, config: PicoTTSConfig) -> None:
        """Raises FileNotFoundError when `pico2wave` is not on the PATH."""
        if shutil.which(COMMAND) is None:
            raise FileNotFoundError(
                f"{COMMAND} is not on the PATH; install libttspico-utils (Debian's non-free section), or leave its voices out"
            )
        self.config = config
        self.voices: Sequence[str] = config.voices

    def speak(self, text: str, voice: str) -> Utterance:
        """One utterance at 16 kHz without word times. Raises ValueError on a voice outside the config, on text without
        words and where Pico fails."""
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is not one of this speaker's: {', '.join(self.voices)}")
        spoken_words(text)
        tagged = f'<speed level="{round(100 * self.config.rate)}">{escape(text)}</speed>'
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            done = subprocess.run(
                [COMMAND, f"--lang={voice}", f"--wave={path}", tagged], capture_output=True, text=True, check=False
            )
            if done.returncode or not path.is_file():
                raise ValueError(f"{COMMAND} failed on {text!r}: {done.stderr.strip() or f'status {done.returncode}'}")
            waveform = audio.load(path)
        digest = hashlib.sha256(f"{self.config.rate}\n{text}".encode()).hexdigest()[:12]
        return Utterance(id=f"{voice}/{digest}", text=text, audio=waveform)
