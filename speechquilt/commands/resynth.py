"""`speechquilt resynth IN.wav OUT.wav`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt import audio
from speechquilt.commands.grammar import Flat, Positional
from speechquilt.stages.speak import Parts, made_again


@dataclass(frozen=True, kw_only=True)
class Resynth:
    """Make a recording again from its speech tokens, in the decoder's voice: what is lost on the way can be heard.

    speechquilt resynth in.wav out.wav --run runs/toy
    """

    input: Positional[Path]
    """Recording, of any rate."""
    output: Positional[Path]
    """Audio file to write; its suffix is the format."""
    parts: Flat[Parts] = Parts()
    """Which tokenizer and which decoder."""
    seed: int = 0
    """Of the decoder's noise."""

    def run(self) -> None:
        wav = made_again(audio.load(self.input), self.parts, self.seed)
        audio.save(self.output, wav)
        print(f"made     {self.output}: {wav.duration_s:.1f} s at {wav.sample_rate} Hz")
