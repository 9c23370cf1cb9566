"""`speechquilt train decoder`."""

from dataclasses import dataclass, field
from pathlib import Path

from speechquilt.commands.grammar import Flat
from speechquilt.config import nearest
from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.hifi_gan import HifiGan
from speechquilt.files import write_json
from speechquilt.recipes import catalog, defaults
from speechquilt.stages.sound_pieces import on_disk
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_decoder import DecoderRecipe, train_decoder
from speechquilt.tokenizer import loading
from speechquilt.train import distributed

TOY, PREFIX = "toy", "decoder_"
PRESETS = (TOY, *(n.removeprefix(PREFIX) for n, entry in catalog.ENTRIES.items() if entry.kind == "decoder"))
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class TrainDecoder:
    """Train a speech decoder: speech tokens in, sound out.

      speechquilt tokenize my/speech shards --tokenizer runs/tokenizer
      speechquilt train decoder --speech my/speech --data speech=shards/speech --tokenizer runs/tokenizer

    With --voice it learns from all of that first, and then from one voice, in which it speaks. No transcripts are needed. Also
    under torchrun. The same command goes on after a kill.
    """

    STARTS = ("preset",)

    preset: str = TOY
    """Recipe to start from: toy, minutes on two CPU cores; 111m, the size of the released GLM-4-Voice decoder."""
    speech: str = ""
    """Folder of audio that was tokenized."""
    data: dict[str, str] = field(default_factory=dict)
    """Its tokens: name=FOLDER of the speech (or parallel) shards that tokenize made of it."""
    voice: str = ""
    """Folder of audio of one voice, which the decoder gets; none: that of everybody in speech."""
    voice_data: dict[str, str] = field(default_factory=dict)
    """Tokens of that voice: name=FOLDER, as data."""
    tokenizer: str = "runs/tokenizer"
    """Folder of the speech tokenizer that made the tokens."""
    vocoder: str = ""
    """Folder of a vocoder of `train vocoder`; its mel is what the decoder makes. None: phases are found without training."""
    run_dir: str = "runs/decoder"
    """Folder of the run; it becomes the decoder."""
    recipe: Flat[DecoderRecipe] = defaults.DECODER
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = TOY) -> "TrainDecoder":
        """Raises ValueError naming the known presets."""
        preset = preset.removeprefix(PREFIX)
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; {nearest(preset, PRESETS)}")
        return cls(preset=preset, recipe=defaults.DECODER if preset == TOY else catalog.load(PREFIX + preset).recipe)

    def run(self) -> None:
        if not self.data or bool(self.voice) != bool(self.voice_data):
            raise ValueError(
                "tokens are missing: give --data speech=FOLDER of the shards that tokenize made of --speech, and "
                "--voice-data with --voice"
            )
        vocoder = vocoder_folder.load(Path(self.vocoder)) if self.vocoder else None
        if isinstance(vocoder, HifiGan):
            raise ValueError(
                f"vocoder={self.vocoder} is a HiFi-GAN of transformers; train with none, and put its folder in "
                f"{self.run_dir}/vocoder afterwards"
            )
        try:
            tokenizer = loading.load(required("tokenizer", self.tokenizer))
            folder = Path(self.run_dir)
            with remembered(self, folder, writes=distributed.rank() == 0):
                found = train_decoder(
                    self.recipe,
                    tokenizer,
                    on_disk(required("speech", self.speech), [Path(p) for p in self.data.values()], tokenizer),
                    folder,
                    one_voice=on_disk(Path(self.voice), [Path(p) for p in self.voice_data.values()], tokenizer)
                    if self.voice
                    else None,
                    vocoder=vocoder,
                )
            if distributed.rank() == 0:
                write_json(folder / RESULTS_FILE, found)
                report(
                    found, folder, f"speechquilt resynth IN.wav OUT.wav --decoder {folder} --tokenizer {self.tokenizer}"
                )
        finally:
            distributed.stop()
