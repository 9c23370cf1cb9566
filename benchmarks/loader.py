"""The data path of pre-training, from shards on disk to packed, patched batches, against plain Python loops of the same rules.

    python -m benchmarks.loader [--rows 16] [--batches 6] [--rounds 3] [--cases static curriculum parallel] [--profile]

The mixture has text (600-2000 tokens a document), interleaved documents (the same, 20 or so spans) and, in the case
"parallel", recordings that are cut into blocks at load time. Rows are the LST paper's: 4,096 units or 8,192 tokens. The
plain loader reads the same shards and draws from the same seeds; its batches are the same (checked in every run). Prints
tokens per CPU second on one core and the ratio.
"""

import argparse
import cProfile
import hashlib
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.interleave import invented
from benchmarks.plain_loader import PlainLoader, PlainSource
from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig, PackedLoader
from speechquilt.data.feed.spoken_documents import as_documents
from speechquilt.data.interleaving.parallel import word_by_word
from speechquilt.data.shards.documents import ShardFolder, ShardWriter
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.shards.spoken import SpokenFolder, SpokenWriter
from speechquilt.model.patcher import PatcherConfig
from speechquilt.protocols import Loader
from speechquilt.text import TextTokenizer
from speechquilt.types import Batch, Document, Segment, UnitEnd
from speechquilt.vocab import Vocab

NUM_TEXT, NUM_SPEECH, SEED = 2000, 500, 1
CASES = {  # patching, and the mixture's weights
    "static": ("static", {"text": 1.0, "interleaved": 2.0}),
    "curriculum": ("curriculum", {"text": 1.0, "interleaved": 2.0}),
    "parallel": ("curriculum", {"text": 1.0, "interleaved": 1.0, "parallel": 1.0}),
}
ARRAYS = ("ids_BT", "labels_BT", "doc_BT", "opens_BT", "closes_BT")


def text(i: int, rng: np.random.Generator) -> Document:
    """600 to 2000 text tokens."""
    ids_T = rng.integers(0, NUM_TEXT, rng.integers(600, 2001)).astype(np.int32)
    return Document(id=f"t{i}", source="text", segments=(Segment(modality="text", ids_T=ids_T),))


def interleaved(i: int, rng: np.random.Generator) -> Document:
    """600 to 2000 tokens in text spans of about 40 and speech spans of about 90, with words of about 6 and silences."""
    segments: list[Segment] = []
    left = int(rng.integers(600, 2001))
    while left > 0:
        segments.append(
            Segment(modality="text", ids_T=rng.integers(0, NUM_TEXT, rng.integers(10, 71)).astype(np.int32))
        )
        segments.append(_speech(int(rng.integers(20, 161)), rng))
        left -= len(segments[-1].ids_T) + len(segments[-2].ids_T)
    return Document(id=f"i{i}", source="interleaved", segments=tuple(segments))


def _speech(num_tokens: int, rng: np.random.Generator) -> Segment:
    ends_T = np.where(rng.random(num_tokens) < 0.17, rng.choice([UnitEnd.WORD, UnitEnd.SILENCE], num_tokens), 0)
    ends_T[-1] = UnitEnd.WORD
    ids_T = rng.integers(0, NUM_SPEECH, num_tokens).astype(np.int32)
    return Segment(modality="speech", ids_T=ids_T, unit_end_T=ends_T.astype(np.uint8))


def write_shards(folder: Path, num_documents: int) -> TextTokenizer:
    """`folder`/text, /interleaved and /parallel; returns the tokenizer that spells the words of the last."""
    recordings, tokenizer = invented(num_documents, num_words=160)
    info = ShardInfo(num_text=NUM_TEXT, num_speech=NUM_SPEECH, text_fingerprint="", speech_fingerprint="")
    rng = np.random.default_rng(0)
    for name, make in (("text", text), ("interleaved", interleaved)):
        with ShardWriter(folder / name, info, documents_per_shard=200) as writer:
            for i in range(num_documents):
                writer.write(make(i, rng))
    with SpokenWriter(folder / "parallel", info, documents_per_shard=200) as spoken_writer:
        for recording in recordings:
            spoken_writer.write(recording)
    return tokenizer


def pack_config(rows: int) -> PackConfig:
    return PackConfig(rows=rows, units_per_row=4096, tokens_per_row=8192)


def packed(folder: Path, case: str, tokenizer: TextTokenizer, rows: int, total_batches: int) -> PackedLoader:
    """The loader that training uses."""
    kind, weights = CASES[case]
    sources = {name: ShardFolder(folder / name) for name in weights if name != "parallel"}
    if "parallel" in weights:
        spoken = SpokenFolder(folder / "parallel")
        sources["parallel"] = as_documents(spoken, word_by_word(tokenizer), seed=SEED)  # type: ignore[assignment]
    patcher = PatcherConfig(kind=kind).build()  # type: ignore[arg-type]
    vocab = Vocab(num_text=NUM_TEXT, num_speech=NUM_SPEECH)
    mixture = Mixture(sources, weights, SEED)
    return pack_config(rows).build(mixture, vocab, patcher, seed=SEED, total_batches=total_batches)


def plain(folder: Path, case: str, tokenizer: TextTokenizer, rows: int, total_batches: int) -> PlainLoader:
    """The same rules as loops over tokens."""
    kind, weights = CASES[case]
    sources = {name: PlainSource(folder / name, tokenizer.encode, SEED) for name in weights}
    vocab = Vocab(num_text=NUM_TEXT, num_speech=NUM_SPEECH)
    return PlainLoader(sources, weights, vocab, kind, pack_config(rows), SEED, total_batches)


def digest(batch: Batch) -> bytes:
    """All that a model sees of a batch."""
    arrays = (getattr(batch, name).numpy() for name in ARRAYS)
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).digest()


def tokens_per_s(loader: Loader, num_batches: int) -> float:
    """Of CPU time; padding is not counted."""
    started = time.process_time()
    tokens = sum(int(loader.next_batch().meta["tokens"]) for _ in range(num_batches))
    return tokens / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="of the global batch")
    parser.add_argument("--batches", type=int, default=6, help="per round; the plain loader makes one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=600, help="per source")
    parser.add_argument("--profile", action="store_true", help="where our time goes, instead of the comparison")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_shards(folder, args.documents)
        total_batches = 2 + args.rounds * args.batches  # so that the curriculum goes all the way
        for case in args.cases:
            ours = packed(folder, case, tokenizer, args.rows, total_batches)
            if args.profile:
                profile(ours, total_batches)
                continue
            theirs = plain(folder, case, tokenizer, args.rows, total_batches)
            for _ in range(2):  # warms up both
                assert digest(ours.next_batch()) == digest(theirs.next_batch())
            rates: dict[str, list[float]] = {"ours": [], "plain": []}
            for _ in range(args.rounds):
                rates["ours"].append(tokens_per_s(ours, args.batches))
                rates["plain"].append(tokens_per_s(theirs, 1))
            medians = {name: statistics.median(values) for name, values in rates.items()}
            ratio = medians["ours"] / medians["plain"]
            print(
                f"{case:<11} {medians['ours']:>12,.0f} tokens/s {medians['plain']:>12,.0f} plain {ratio:>6.1f} times",
                flush=True,
            )


def profile(loader: Loader, num_batches: int) -> None:
    loader.next_batch()
    with cProfile.Profile() as profiler:
        for _ in range(num_batches):
            loader.next_batch()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
