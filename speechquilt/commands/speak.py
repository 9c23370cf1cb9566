"""`speechquilt speak TEXT OUT.wav`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt import audio
from speechquilt.commands.grammar import Flat, Positional
from speechquilt.recipes import defaults
from speechquilt.stages.speak import Parts, said
from speechquilt.text_to_token.generate import EngineConfig


@dataclass(frozen=True, kw_only=True)
class Speak:
    """Say a text: text-to-token model, then speech decoder.

    speechquilt speak "the red fox" fox.wav --run runs/toy
    """

    text: Positional[str]
    """What to say, in words that the text-to-token model knows."""
    output: Positional[Path]
    """Audio file to write; its suffix is the format."""
    parts: Flat[Parts] = Parts()
    """Whose voice."""
    engine: Flat[EngineConfig] = defaults.TEXT_TO_TOKEN.engine
    """How tokens are sampled."""
    seed: int = 0
    """Another seed says it otherwise."""

    def run(self) -> None:
        wav, span = said(self.text, self.parts, self.engine, self.seed)
        audio.save(self.output, wav)
        print(f"made     {self.output}: {wav.duration_s:.1f} s at {wav.sample_rate} Hz of {len(span.ids_T)} tokens")
