"""Train the speech tokenizer on real corpora: folders, Hugging Face datasets and lhotse manifests, mixed at a ratio.

`python -m speechquilt.recipes.tokenizer_corpora SIZE key=value ...`, also under torchrun; docs/how-to/train-a-tokenizer.md.

Place in the pipeline: layer 4, over `tokenizer` (the training) and `tokenizer_presets` (sizes and their cost). Audio stays on
disk; only the held-out recordings are decoded into memory.
Trap: held-out recordings come from corpora of their own. A share of the training data would hold the same speakers.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from speechquilt import config as configs
from speechquilt.config import nearest
from speechquilt.data.corpus import Reject
from speechquilt.data.speech_corpora import CutCorpus, DatasetCorpus, FolderCorpus, Mix, SpeechCorpus
from speechquilt.recipes.stage import make_folder, write_json
from speechquilt.recipes.tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.recipes.tokenizer_presets import RECIPES
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.train import distributed
from speechquilt.types import Utterance

TEXTS_FOR_VOCABULARY = 200_000  # transcripts that the text tokenizer is made from, per corpus
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class SpeechSource:
    """One corpus. `kind` "folder": audio with transcripts or a metadata table; "dataset": a Hugging Face dataset by name or
    path; "cuts": a lhotse manifest. The columns and `split` are for datasets alone. `ratio`: recordings of it for every
    recording of a source with ratio 1.
    """

    kind: Literal["folder", "dataset", "cuts"]
    path: str
    ratio: int = 1
    split: str = "train"
    text_column: str = "text"
    audio_column: str = "audio"
    duration_column: str | None = None

    def open(self) -> SpeechCorpus:
        """Raises FileNotFoundError or ValueError saying what is missing, ImportError naming the extra."""
        if self.kind == "folder":
            return FolderCorpus(self.path)
        if self.kind == "cuts":
            return CutCorpus.load(self.path)
        return DatasetCorpus.load(
            self.path,
            split=self.split,
            text_column=self.text_column,
            audio_column=self.audio_column,
            duration_column=self.duration_column,
        )


@dataclass(frozen=True, kw_only=True)
class CorporaRun:
    """`sources` are trained on, the first `held_out_recordings` usable ones of `held_out` are measured on."""

    sources: tuple[SpeechSource, ...] = ()
    held_out: tuple[SpeechSource, ...] = ()
    held_out_recordings: int = 500
    run_dir: str = "runs/tokenizer"
    recipe: TokenizerRecipe = RECIPES["two_cores"]


def preset_run(name: str) -> CorporaRun:
    """A run with one of the shipped sizes; sources and, for the large ones, `recipe.start` are still to be set.

    Raises ValueError naming the known sizes.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown size {name!r}; {nearest(name, list(RECIPES))}")
    return CorporaRun(recipe=RECIPES[name])


def train_on_corpora(run: CorporaRun) -> dict[str, Any]:
    """Train into `run_dir`; returns and writes (`results.json`) what `train_tokenizer` measures. Resumes by itself."""
    if not run.sources or not run.held_out:
        raise ValueError(
            'sources and held_out need at least one corpus each, for example {"kind": "folder", "path": "speech"}'
        )
    folder = Path(run.run_dir)
    make_folder(folder)
    mix = Mix(corpora=[source.open() for source in run.sources], ratio=[source.ratio for source in run.sources])
    held_out = list(islice(_usable(source.open() for source in run.held_out), run.held_out_recordings))
    if not held_out:
        raise ValueError(
            f"no recording of held_out={[s.path for s in run.held_out]} can be used; choose another corpus"
        )
    found = train_tokenizer(run.recipe, _text_tokenizer(run.recipe, mix), mix, held_out, folder)
    if distributed.rank() == 0:
        write_json(folder / RESULTS_FILE, found)
    return found


def _usable(corpora: Iterator[SpeechCorpus]) -> Iterator[Utterance]:
    for corpus in corpora:
        for index in range(len(corpus)):
            if isinstance(corpus.entry(index), Reject):
                continue
            try:
                yield corpus[index]
            except (ValueError, OSError) as error:
                print(f"  held-out recording {index} left out: {error}")


def _text_tokenizer(recipe: TokenizerRecipe, mix: Mix) -> TextTokenizer | None:
    """Made from the transcripts; None when the recipe starts from a Whisper, which brings its own."""
    if recipe.start:
        return None
    return TextTokenizer.train(_transcripts(mix.corpora), recipe.model.text_vocab_size)


def _transcripts(corpora: Sequence[SpeechCorpus]) -> Iterator[str]:
    for corpus in corpora:
        for index in range(min(len(corpus), TEXTS_FOR_VOCABULARY)):
            entry = corpus.entry(index)
            if not isinstance(entry, Reject):
                yield spoken_form(entry.text)


def main(arguments: Sequence[str]) -> None:
    """`SIZE key=value ...`"""
    if not arguments:
        raise ValueError(f"give a size first: {', '.join(RECIPES)}")
    name, *settings = arguments
    try:
        train_on_corpora(configs.override(preset_run(name), settings))
    finally:
        distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
