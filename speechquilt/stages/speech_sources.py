"""Transcribed speech to train on and to measure with: one folder in memory, or corpora on disk mixed at a ratio.

Trap: of one folder a share is held out, which holds the same speakers as the training data. Corpora are measured on others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from speechquilt.data.sources.speech_corpora import CutCorpus, DatasetCorpus, FolderCorpus, Mix, SpeechCorpus
from speechquilt.stages.corpus import folder_corpus
from speechquilt.text import spoken_form
from speechquilt.types import Reject, Utterance

TEXTS_FOR_VOCABULARY = 200_000  # transcripts that the text tokenizer is made from, per corpus


@dataclass(frozen=True, kw_only=True)
class SpeechSource:
    """One corpus of transcribed speech."""

    kind: Literal["folder", "dataset", "cuts"]
    """folder: audio with transcripts or a table; dataset: of Hugging Face; cuts: a lhotse manifest."""
    path: str
    """Folder, file, or name of a dataset."""
    ratio: int = 1
    """Recordings of it for every recording of a source with ratio 1."""
    split: str = "train"
    """Split of a dataset."""
    text_column: str = "text"
    """Column of a dataset that holds the transcript."""
    audio_column: str = "audio"
    """Column of a dataset that holds the audio."""
    duration_column: str | None = None
    """Column of a dataset with the length in seconds, when it has one."""

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
class Speech:
    """What to train on, what to measure on, and the transcripts that a text tokenizer can be made from."""

    train: Sequence[Utterance] | Mix
    held_out: Sequence[Utterance]
    texts: Iterable[str]


def speech_of_folder(folder: Path) -> Speech:
    """Recordings with transcripts that fit into memory; one in twenty is held out."""
    corpus = folder_corpus(folder, None)
    return Speech(train=corpus.sentences, held_out=corpus.held_out, texts=[u.text for u in corpus.sentences])


def speech_of_sources(
    sources: Sequence[SpeechSource], held_out: Sequence[SpeechSource], held_out_recordings: int
) -> Speech:
    """Corpora mixed at their ratios, and the first usable recordings of the held-out ones, decoded into memory.

    Raises ValueError or FileNotFoundError naming the corpus that cannot be used, or the column that it lacks.
    """
    if not sources or not held_out:
        raise ValueError("sources and held_out need at least one corpus each, for example kind=folder,path=my/speech")
    mix = Mix(corpora=[source.open() for source in sources], ratio=[source.ratio for source in sources])
    measured = list(islice(_usable(source.open() for source in held_out), held_out_recordings))
    if not measured:
        raise ValueError(f"no recording of held_out={[s.path for s in held_out]} can be used; choose another corpus")
    return Speech(train=mix, held_out=measured, texts=_transcripts(mix.corpora))


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
