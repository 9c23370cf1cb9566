"""How often neighbours in a shard meet in a batch, against perfect shuffling, packing's choices included.

Shuffling itself is perfect, so documents whose lengths say nothing about their places meet as often as chance wants it. The
packer chooses by length: where a shard is runs of ten documents of exactly one length, they meet a fifth more often (measured
over 40 seeds: 1.19, standard error 0.02; lengths at random: 1.02, 0.02; `docs/how-to/mixtures.md`).
"""

from collections import defaultdict

import numpy as np
import pytest

from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig, PackedLoader
from speechquilt.types import Document, Segment
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=50, num_speech=30)
NUM_DOCUMENTS, BATCHES, SEEDS = 300, 120, 12
Places = dict[str, list[np.ndarray]]  # source -> the indices of its documents in each batch


def documents(source: str, seed: int, run: int) -> list[Document]:
    """Runs of so many documents of one length."""
    lengths = np.random.default_rng(seed).integers(5, 120, NUM_DOCUMENTS // run).repeat(run)
    return [
        Document(id=f"{source}{i}", source=source, segments=(Segment(modality="text", ids_T=np.zeros(n, np.int32)),))
        for i, n in enumerate(lengths)
    ]


def packed(seed: int, run: int) -> PackedLoader:
    mixture = Mixture({"a": documents("a", 1, run), "b": documents("b", 2, run)}, {"a": 2.0, "b": 1.0}, seed)
    config = PackConfig(rows=4, units_per_row=256, tokens_per_row=256, buffer=64)
    return config.build(mixture, VOCAB, None, seed=seed, total_batches=BATCHES)


def places(made: PackedLoader) -> Places:
    found: Places = defaultdict(list)
    for _ in range(BATCHES):
        ids = [id for row in made.next_batch().meta["document_ids"] for id in row]
        for source in "ab":
            found[source].append(np.array([int(id[1:]) for id in ids if id[0] == source], dtype=np.int64))
    return found


def meetings(found: Places) -> int:
    """How often documents i and i + 1 of one source are in one batch."""
    return sum(int(np.isin(index_N + 1, index_N).sum()) for batches in found.values() for index_N in batches)


def relabelled(found: Places, rng: np.random.Generator) -> Places:
    """The same batches under a random renaming of each source's documents: what perfect shuffling gives."""
    names = {source: rng.permutation(NUM_DOCUMENTS) for source in found}
    return {source: [names[source][index_N] for index_N in batches] for source, batches in found.items()}


def against_chance(run: int) -> float:
    """Meetings over those of perfect shuffling, all seeds together; the standard error is about 0.04."""
    rng = np.random.default_rng(0)
    found = [places(packed(seed, run)) for seed in range(SEEDS)]
    shuffled = [meetings(relabelled(one, rng)) for one in found for _ in range(20)]
    return sum(map(meetings, found)) / (sum(shuffled) / 20)


def test_neighbours_meet_as_under_perfect_shuffling():
    assert against_chance(run=1) == pytest.approx(1, abs=0.17)


def test_neighbours_of_one_length_meet_little_more_often():
    assert 0.83 < against_chance(run=10) < 1.4


def test_the_measure_sees_a_window_of_shuffling(monkeypatch):
    """The common shortcut, shuffling inside windows of 100 documents, is far outside what is allowed above."""

    def in_windows(self, name, epoch):
        return np.random.default_rng(epoch).permuted(np.arange(NUM_DOCUMENTS).reshape(-1, 100), axis=1).ravel()

    monkeypatch.setattr(Mixture, "_permutation", in_windows)
    assert against_chance(run=1) > 2
