"""`speechquilt generate LM`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat, Positional
from speechquilt.model.generation import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A trained language model goes on from a text or a recording, in text and in speech.

      speechquilt generate runs/lm --text "the red fox"
      speechquilt generate runs/lm --audio question.wav --answer text
      speechquilt generate runs/lm --text "the red fox" --answer speech --decoder runs/decoder --out runs/heard

    With --out: result.json (settings, text, token ids, what is read back) and continuation_0.wav, ... where a decoder makes
    sound of the speech. Lengths are bounded by the rows that the model was trained on.
    """

    lm: Positional[Path]
    """Run of a language model: of `train lm`, or lm/NAME of a story."""
    text: str = ""
    """Text to go on from; when both are given, the recording comes first."""
    audio: Path | None = None
    """Recording to go on from, of any rate."""
    settings: Flat[GenerationConfig] = GenerationConfig()
    """How it is continued."""
    number: int = 1
    """How many continuations; each has draws of its own, and the first is what one alone would be."""
    tokenizer: Path | None = None
    """Speech tokenizer that made the model's shards; none: the one that the run has or remembers."""
    decoder: Path | None = None
    """Speech decoder trained on that tokenizer's tokens; none: speech is shown as ids and as what is read in it."""
    out: Path | None = None
    """Folder for result.json and the sound; none: they are only printed."""
    device: str = "auto"
    """Where the language model runs: "auto" (CUDA when there is one), "cpu" or "cuda"."""

    def run(self) -> None:
        from speechquilt.stages.generate_lm import GenerationRequest, generate

        generate(
            GenerationRequest(
                lm=self.lm,
                text=self.text,
                audio=self.audio,
                settings=self.settings,
                number=self.number,
                tokenizer=self.tokenizer,
                decoder=self.decoder,
                out=self.out,
                device=self.device,
            )
        )
