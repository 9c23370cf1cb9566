"""Word times for a corpus in memory: an aligner is trained on its recordings and finds the words of all of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from speechquilt.evals.measures import Measure
from speechquilt.files import replacing
from speechquilt.stages.corpus import Corpus
from speechquilt.stages.train_aligner import AlignerRecipe, align_utterances, load_aligner, train_aligner
from speechquilt.types import AlignedWord, Reject, Utterance

WORDS_FILE = "words.jsonl"
MEASURES = (
    Measure(key="aligner.aligned", kind="count", meaning="recordings whose words have times"),
    Measure(key="aligner.rejects", kind="count", meaning="recordings that could not be aligned"),
)


def align_corpus(recipe: AlignerRecipe, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Train an aligner on the corpus in `folder`, and write there the word times of all its recordings."""
    found = train_aligner(recipe, corpus.sentences, corpus.held_out, folder)
    aligned, rejects = align_utterances(load_aligner(folder), [*corpus.sentences, *corpus.held_out])
    rows: list[dict[str, Any]] = [{"id": u.id, "words": [asdict(word) for word in u.alignment]} for u in aligned]
    rows += [asdict(reject) for reject in rejects]
    with replacing(folder / WORDS_FILE) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    return {**found, "aligner.aligned": len(aligned), "aligner.rejects": len(rejects)}


def aligned_corpus(corpus: Corpus, folder: Path) -> Corpus:
    """The corpus with the word times of `align_corpus`; what could not be aligned joins its rejects."""
    with (folder / WORDS_FILE).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    words = {row["id"]: tuple(AlignedWord(**word) for word in row["words"]) for row in rows if "words" in row}

    def aligned(utterances: Sequence[Utterance]) -> list[Utterance]:
        return [replace(u, alignment=words[u.id]) for u in utterances if u.id in words]

    rejects = [Reject(**row) for row in rows if "reason" in row]
    return replace(
        corpus,
        sentences=aligned(corpus.sentences),
        held_out=aligned(corpus.held_out),
        spoken=aligned(corpus.spoken),
        rejects=[*corpus.rejects, *rejects],
    )
