"""`speechquilt train tokenizer`: on one folder, or on folders, Hugging Face datasets and lhotse manifests mixed at a ratio.

Place in the pipeline: layer 4, over `tokenizer` (the training) and `tokenizer_presets` (sizes and their cost). Also under
torchrun; docs/how-to/train-a-tokenizer.md. With `sources`, audio stays on disk and only the held-out recordings are decoded
into memory; `speech` is for a folder that fits into memory.
Trap: the held-out recordings of `sources` come from corpora of their own. A share of the training data would hold the same
speakers, as the one in twenty of `speech` does.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from speechquilt import config as configs
from speechquilt.config import nearest
from speechquilt.data.sources.speech_corpora import CutCorpus, DatasetCorpus, FolderCorpus, Mix, SpeechCorpus
from speechquilt.files import make_folder, write_json
from speechquilt.recipes.tokenizers import DEFAULT, RECIPES
from speechquilt.stages.corpus import folder_corpus
from speechquilt.stages.stage import report, required
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.train import distributed
from speechquilt.types import Reject, Utterance

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
class TokenizerRun:
    """`speech`: a folder of audio with transcripts, of which one recording in twenty is held out. Or `sources`, which are trained
    on, and `held_out`, whose first `held_out_recordings` usable ones are measured on. `preset`: where `recipe` starts from
    (`tokenizer_presets.RECIPES`); the other settings change it.
    """

    preset: str = DEFAULT
    speech: str = ""
    sources: tuple[SpeechSource, ...] = ()
    held_out: tuple[SpeechSource, ...] = ()
    held_out_recordings: int = 500
    run_dir: str = "runs/tokenizer"
    recipe: TokenizerRecipe = RECIPES[DEFAULT]


def preset_run(assignments: Sequence[str] = ()) -> TokenizerRun:
    """What `assignments` (key=value) are to be applied to: the recipe of the preset that they name, wherever they name it.

    Raises ValueError naming the known presets.
    """
    named = [a for a in assignments if a.partition("=")[0] == "preset"]
    name = configs.override(TokenizerRun(), named).preset
    if name not in RECIPES:
        raise ValueError(f"preset={name!r} is unknown; {nearest(name, list(RECIPES))}")
    return TokenizerRun(preset=name, recipe=RECIPES[name])


def run_tokenizer(run: TokenizerRun) -> None:
    """`speechquilt train tokenizer`; resumes by itself. Writes what was measured to `results.json`, and prints it."""
    try:
        found = train_on_speech(run)
        if distributed.rank() == 0:
            report(found, Path(run.run_dir), f"speechquilt tokenize AUDIO SHARDS --tokenizer {run.run_dir}")
    finally:
        distributed.stop()


def train_on_speech(run: TokenizerRun) -> dict[str, Any]:
    """Train into `run_dir`; returns and writes what `train_tokenizer` measures.

    Raises ValueError or FileNotFoundError naming the setting that is missing, the corpus that cannot be used, or the column
    that it lacks.
    """
    train, held_out, texts = _speech(run)
    if run.preset != DEFAULT and not run.recipe.start:
        print(
            f"  recipe.start is not set: preset={run.preset} begins from random weights, its lr is meant for a Whisper's"
        )
    # A recipe that starts from a Whisper takes its text tokenizer.
    text_tokenizer = None if run.recipe.start else TextTokenizer.train(texts, run.recipe.model.text_vocab_size)
    folder = Path(run.run_dir)
    make_folder(folder)
    found = train_tokenizer(run.recipe, text_tokenizer, train, held_out, folder)
    if distributed.rank() == 0:
        write_json(folder / RESULTS_FILE, found)
    return found


def _speech(run: TokenizerRun) -> tuple[Sequence[Utterance] | Mix, Sequence[Utterance], Iterable[str]]:
    """What to train on, what to measure on, and the transcripts that the text tokenizer is made from."""
    if run.speech and (run.sources or run.held_out):
        raise ValueError(
            f"speech={run.speech!r} and sources or held_out are both set; give one folder as speech, or all corpora as sources"
        )
    if not (run.sources or run.held_out):
        corpus = folder_corpus(required("speech", run.speech), None)
        return corpus.sentences, corpus.held_out, [u.text for u in corpus.sentences]
    if not run.sources or not run.held_out:
        raise ValueError(
            'sources and held_out need at least one corpus each, for example \'[{"kind": "folder", "path": "speech"}]\''
        )
    mix = Mix(corpora=[source.open() for source in run.sources], ratio=[source.ratio for source in run.sources])
    held_out = list(islice(_usable(source.open() for source in run.held_out), run.held_out_recordings))
    if not held_out:
        raise ValueError(
            f"no recording of held_out={[s.path for s in run.held_out]} can be used; choose another corpus"
        )
    return mix, held_out, _transcripts(mix.corpora)


def _usable(corpora: Iterable[SpeechCorpus]) -> Iterator[Utterance]:
    for corpus in corpora:
        for index in range(len(corpus)):
            if isinstance(corpus.entry(index), Reject):
                continue
            try:
                yield corpus[index]
            except (ValueError, OSError) as error:
                print(f"  held-out recording {index} left out: {error}")


def _transcripts(corpora: Sequence[SpeechCorpus]) -> Iterator[str]:
    for corpus in corpora:
        for index in range(min(len(corpus), TEXTS_FOR_VOCABULARY)):
            entry = corpus.entry(index)
            if not isinstance(entry, Reject):
                yield spoken_form(entry.text)
