"""What a story starts from: transcribed speech, plain text, and which text is to be interleaved.

`micro_world_corpus` is the embedded default, `folder_corpus` one's own data.
Trap: in the micro-world the form in which a fact appears is the experiment. The tokenizer and the text-to-token model
are trained on sentences without facts, and facts of the groups "text" and "interleaved" are never spoken by a voice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechquilt import audio
from speechquilt.data.sources.micro_world import MicroWorld
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.data.sources.text_files import read_texts
from speechquilt.tts.espeak import EspeakTTS
from speechquilt.types import Reject, TextDocument, Utterance

HELD_OUT_EVERY = 20  # one in so many of a user's recordings is kept for measuring


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything that the stages of a story read."""

    sentences: Sequence[Utterance]
    """Short transcribed recordings for the tokenizer, the text-to-token model and ASR / TTS pairs."""
    held_out: Sequence[Utterance]
    """The same kind, never trained on."""
    spoken: Sequence[Utterance]
    """Recordings for speech-only documents."""
    num_parallel: int
    """How many of them, from the first, also become parallel interleaved documents."""
    texts: Sequence[TextDocument]
    """Plain text."""
    to_interleave: Sequence[TextDocument]
    """The texts of which synthetic interleaving speaks some words."""
    rejects: Sequence[Reject] = field(default=())
    """What could not be read, and why."""


@dataclass(frozen=True, kw_only=True)
class MicroCorpusConfig:
    """How much of the micro-world is written and spoken."""

    sentences: int = 8000
    """Different sentences that train the tokenizer and the text-to-token model."""
    max_joined: int = 5
    """Most sentences in one recording; 1 to this many are joined, since documents are longer than a sentence."""
    held_out: int = 200
    """Sentences that are spoken one by one to measure on, and never trained on."""
    story_documents: int = 600
    """Documents that tell stories: so many written ones, and as many others that are spoken."""
    fact_documents: int = 300
    """Documents about each group of facts, in each form (written, spoken) in which the group is shown."""
    seed: int = 0
    """Decides which sentences are joined."""


def micro_world_corpus(world: MicroWorld, speaker: EspeakTTS, config: MicroCorpusConfig) -> Corpus:
    """Facts by group: "text" in texts; "interleaved" in texts and to_interleave; "speech" in spoken; "both" in all of them
    and in parallel documents. Parallel interleaving shows the words of a recording as text, so "speech" recordings stay out of it.
    """

    def written(group: str, seed: int) -> list[TextDocument]:
        n = config.story_documents if group == "story" else config.fact_documents
        texts = world.documents(group, n, seed)  # type: ignore[arg-type]
        return [TextDocument(id=f"{group}-{seed}-{i}", text=text) for i, text in enumerate(texts)]

    spoken = {group: written(group, seed=1) for group in ("story", "both", "speech")}
    recordings = speak(speaker, [document.text for group in spoken for document in spoken[group]], "speak documents")
    groups = ("story", "text", "both", "interleaved")
    texts = {group: written(group, seed=0) for group in groups}
    return Corpus(
        sentences=speak(
            speaker, join(world.sentences(config.sentences), config.max_joined, config.seed), "speak sentences"
        ),
        held_out=speak(speaker, world.held_out_sentences(config.held_out), "speak held-out"),
        spoken=recordings,
        num_parallel=len(spoken["story"]) + len(spoken["both"]),
        texts=[document for group in groups for document in texts[group]],
        to_interleave=[document for group in groups if group != "text" for document in texts[group]],
    )


def join(sentences: Sequence[str], most: int, seed: int) -> list[str]:
    """Consecutive sentences in runs of 1 to `most`, uniformly at random; every sentence once, in order."""
    rng = np.random.default_rng(seed)
    runs: list[str] = []
    first = 0
    while first < len(sentences):
        length = int(rng.integers(1, most + 1))
        runs.append(" ".join(sentences[first : first + length]))
        first += length
    return runs


def speak(speaker: EspeakTTS, texts: Sequence[str], what: str = "speak") -> list[Utterance]:
    """Each text once, the voices in turn, at the tokenizers' sample rate (hours of speech must fit into memory)."""
    voices = speaker.voices
    spoken = []
    for i, text in enumerate(tqdm(texts, desc=what, unit="text", mininterval=5.0)):
        utterance = speaker.speak(text, voices[i % len(voices)])
        spoken.append(replace(utterance, audio=audio.resample(utterance.audio, audio.SAMPLE_RATE)))
    return spoken


def folder_corpus(speech: Path, text: Path | None, *, max_reject_ratio: float = 0.1) -> Corpus:
    """A folder of audio with transcripts, and a folder of text (default: the transcripts).

    Raises ValueError when too many items had to be rejected, FileNotFoundError when a folder is missing.
    """
    read = list(read_utterances(speech))
    num_read = len(read)
    rejects = [item for item in read if isinstance(item, Reject)]
    utterances = [item for item in read if isinstance(item, Utterance)]
    held_out = utterances[:: max(2, min(HELD_OUT_EVERY, len(utterances)))]
    train = [u for i, u in enumerate(utterances) if i % max(2, min(HELD_OUT_EVERY, len(utterances)))]
    texts = [TextDocument(id=u.id, text=u.text) for u in train]
    if text is not None:
        documents = list(read_texts(str(text)))
        rejects += [item for item in documents if isinstance(item, Reject)]
        texts = [item for item in documents if isinstance(item, TextDocument)]
        num_read += len(documents)
    if len(rejects) > max_reject_ratio * num_read:
        worst = "; ".join(f"{r.id}: {r.reason}" + (f" ({r.detail})" if r.detail else "") for r in rejects[:3])
        raise ValueError(
            f"{len(rejects)} of {num_read} items cannot be used, above max_reject_ratio={max_reject_ratio}: {worst}; "
            "mend them or raise the limit"
        )
    if len(train) < 2:
        raise ValueError(
            f"{speech} has {len(utterances)} usable recordings; at least 3 are needed to train and measure"
        )
    return Corpus(
        sentences=train,
        held_out=held_out,
        spoken=train,
        num_parallel=0,
        texts=texts,
        to_interleave=texts,
        rejects=rejects,
    )
