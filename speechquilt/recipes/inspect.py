"""`speechquilt inspect`: what is in a folder of shards, as numbers and as a few readable documents.

Place in the pipeline: layer 4; reads what every data stage writes.
Trap: the folder holds ids, not a tokenizer, so speech is shown by its ids and the original text stands beside it. Spoken
texts are shown whole: their blocks are drawn when a run loads them.
"""

from pathlib import Path

import numpy as np

from speechquilt.data.parallel import SpokenText
from speechquilt.data.spoken import open_shards
from speechquilt.types import Document, Segment


def inspect(path: Path, samples: int) -> None:
    """Print statistics of all documents and `samples` of them, evenly spaced."""
    folder = open_shards(path)
    info = folder.info
    print(f"{path}: {len(folder)} documents, made by {info.made_by}")
    text = f"{info.text_fingerprint} ({info.num_text} ids)" if info.text_fingerprint else "that of the run"
    print(f"text tokenizer {text}, speech tokenizer {info.speech_fingerprint}")
    if rejects := folder.manifest["rejects"]:
        print(f"rejects {rejects}")
    documents = [_whole(folder[i]) for i in range(len(folder))]
    lengths = {m: np.array([d.num_tokens(m) for d in documents] or [0]) for m in ("text", "speech")}
    for modality, counts_N in lengths.items():
        print(
            f"{modality:<7} tokens {counts_N.sum():>10}   per document {np.mean(counts_N):.1f}, most {counts_N.max()}"
        )
    units = [s for d in documents for s in d.segments if s.unit_end_T is not None]
    if units:
        ends = sum(np.count_nonzero(s.unit_end_T) for s in units if s.unit_end_T is not None)
        print(
            f"speech units (words and silences) {ends}, {sum(len(s.ids_T) for s in units) / max(1, ends):.2f} tokens each"
        )
    for i in np.linspace(0, len(folder) - 1, min(samples, len(folder)), dtype=int).tolist():
        print(f"\n{documents[i].id} ({documents[i].source})\n  {folder.text(i)}")
        for segment in documents[i].segments:
            print(f"  <{segment.modality}> {_shown(segment)}")


def _whole(item: Document | SpokenText) -> Document:
    return Document(id=item.id, source="parallel", segments=(item.segment(),)) if isinstance(item, SpokenText) else item


def _shown(segment: Segment) -> str:
    """Ids with a bar after each word or silence."""
    ends_T = segment.unit_end_T if segment.unit_end_T is not None else np.zeros(len(segment.ids_T), dtype=np.uint8)
    return " ".join(f"{i}|" if end else str(i) for i, end in zip(segment.ids_T.tolist(), ends_T.tolist()))
