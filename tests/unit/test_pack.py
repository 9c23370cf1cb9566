"""Packing: every batch is valid and full, labels are right, no document is lost, and resume and ranks change nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig, PackedLoader
from speechquilt.types import IGNORE, Batch, Document, LaidOut, Segment
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=50, num_speech=30)
ARRAYS = ("ids_BT", "labels_BT", "doc_BT", "opens_BT", "closes_BT")


class Chunks:
    """Patches of `size` speech tokens; a span's short last patch is closed by nothing but the next token."""

    causal = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[tuple[str, float, float]] = []

    def size_at(self, draw: float, progress: float) -> int:
        return self.size

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append((laid_out.id, draw, progress))
        size = self.size_at(draw, progress)
        opens, closes, k = [], [], 0
        for speech in laid_out.is_speech_T.tolist():
            k = k + 1 if speech else 0
            opens.append(not speech or k % size == 1 or size == 1)
            closes.append(not speech or k % size == 0)
        return np.array(opens), np.array(closes)

    def init_state(self):
        raise NotImplementedError

    def step(self, is_speech, state):
        raise NotImplementedError


class Drifting(Chunks):
    """The patch size depends on the draw and on progress, like a curriculum's."""

    def size_at(self, draw, progress):
        return 4 if draw < progress else 2


def document(source: str, i: int, rng: np.random.Generator, low: int = 1, high: int = 60) -> Document:
    segments = tuple(
        Segment(modality=m, ids_T=rng.integers(0, 30, rng.integers(low, high)), loss=bool(rng.random() < 0.8))
        for m in rng.permutation(["text", "speech", "text"])[: rng.integers(1, 4)]
    )
    return Document(id=f"{source}{i}", source=source, segments=segments)


def sources(seed: int = 0, high: int = 60, **counts: int) -> dict[str, list[Document]]:
    rng = np.random.default_rng(seed)
    return {name: [document(name, i, rng, high=high) for i in range(count)] for name, count in counts.items()}


SOURCES = sources(a=23, b=40)
CONFIG = PackConfig(rows=4, units_per_row=128, tokens_per_row=400, buffer=12)


def loader(
    config=CONFIG, patcher: Chunks | None = None, patch=True, data=SOURCES, seed=0, total_batches=20, **ranks
) -> PackedLoader:
    patcher = (patcher or Chunks(4)) if patch else None
    weights = dict.fromkeys(data, 1.0)
    return PackedLoader(Mixture(data, weights, seed), VOCAB, patcher, config, seed, total_batches, **ranks)


def same(a: Batch, b: Batch) -> bool:
    def equal(x, y):
        return (x is None and y is None) or torch.equal(x, y)

    return a.meta == b.meta and all(equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def documents_in(batch: Batch) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """(id, its slice of every array) for every document of a batch."""
    found = []
    for r, ids in enumerate(batch.meta["document_ids"]):
        for k, id in enumerate(ids):
            inside = batch.doc_BT[r] == k
            arrays = {n: getattr(batch, n) for n in ("ids_BT", "labels_BT", "opens_BT", "closes_BT")}
            found.append((id, {n: x[r][inside] for n, x in arrays.items() if x is not None}))
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    patch=st.sampled_from([None, 1, 2, 4, 7]),
    rows=st.integers(1, 5),
    units=st.integers(4, 200),
    tokens=st.integers(4, 400),
    buffer=st.integers(0, 20),
    step=st.sampled_from([1, 32, 100]),
)
def test_every_batch_is_valid(seed, patch, rows, units, tokens, buffer, step):
    config = PackConfig(rows=rows, units_per_row=units, tokens_per_row=tokens, buffer=buffer, round_tokens_to=step)
    made = loader(config, Chunks(patch or 1), patch=patch is not None, data=sources(seed, a=6, b=9), seed=seed)
    by_id = {d.id: VOCAB.lay_out(d) for docs in made.mixture.sources.values() for d in docs}
    for _ in range(4):
        batch = made.next_batch().validate()
        B, T = batch.ids_BT.shape
        assert (rows, 0) == (B, T % step)
        real_BT = batch.ids_BT != VOCAB.pad
        assert T - int(real_BT.sum(1).max()) < step
        check_static_axes(batch, config, patched=patch is not None)
        assert (real_BT.sum(1) <= tokens).all()
        assert ((batch.unit_BT + 1) * real_BT <= units).all()
        assert batch.meta["max_units"] == int(batch.unit_BT.max()) + 1
        assert (batch.visible_BT >= 1).all()
        # every position, padding too, sees a unit of its own document
        first_unit_BT = torch.stack(
            [torch.stack([batch.unit_BT[r][batch.doc_BT[r] == d].min() for d in batch.doc_BT[r]]) for r in range(B)]
        )
        if patch is not None:
            assert (batch.visible_BT > first_unit_BT).all()
            assert int(batch.unit_BT.max()) < units + 2
        assert (batch.labels_BT[~real_BT] == IGNORE).all()
        assert sum(batch.meta["documents"].values()) + batch.meta["parts"] == len(documents_in(batch))
        later = 0
        for id, arrays in documents_in(batch):
            if by_id[id].loss_T[1] and arrays["labels_BT"][0] == IGNORE:
                later += 1  # a part behind the first: it does not choose its span (test_parts looks into them)
            else:
                check_document(by_id[id], arrays, cut=len(by_id[id].ids_T) != len(arrays["ids_BT"]))
        assert batch.meta["parts"] == later


def check_static_axes(batch: Batch, config: PackConfig, patched: bool) -> None:
    """`num_units` and `num_local` hold what every row needs, and `num_local` no more than rounding adds."""
    if not patched:
        assert batch.num_units is batch.num_local is None
        return
    assert batch.num_units == config.units_per_row + 2
    assert batch.num_units > int(batch.unit_BT.max())
    ids_BT = batch.ids_BT.numpy()
    local_BT = VOCAB.is_speech(ids_BT) | (ids_BT == VOCAB.marker("speech"))
    step = config.round_tokens_to
    assert batch.num_local == max(1, -(-int(local_BT.sum(1).max()) // step)) * step <= ids_BT.shape[1]


def check_document(laid_out: LaidOut, arrays: dict[str, torch.Tensor], cut: bool) -> None:
    """Ids as laid out; a label exactly where the next id is a target."""
    ids, labels = arrays["ids_BT"].tolist(), arrays["labels_BT"].tolist()
    loss = laid_out.loss_T.tolist()
    assert ids[0] == VOCAB.bos
    assert ids[-1] == VOCAB.eos
    keep = len(ids) - 1 if cut else len(ids)
    assert ids[:keep] == laid_out.ids_T[:keep].tolist()
    for t, label in enumerate(labels):
        is_target = t + 1 < keep and loss[t + 1]
        assert label == (ids[t + 1] if is_target else IGNORE)


def test_counts_in_meta():
    made = loader()
    for _ in range(5):
        batch = made.next_batch()
        real = batch.ids_BT != VOCAB.pad
        speech = torch.from_numpy(VOCAB.is_speech(batch.ids_BT.numpy()))
        assert batch.meta["tokens"] == int(real.sum())
        assert batch.meta["speech_tokens"] == int(speech.sum())
        assert batch.meta["units"] == int((batch.opens_BT & real).sum())
        assert batch.meta["speech_units"] == int((batch.opens_BT & speech).sum())
        assert batch.meta["unit_slots"] == 4 * 128
        assert batch.meta["targets"] == int((batch.labels_BT != IGNORE).sum())
        assert batch.meta["waste"] == pytest.approx(1 - batch.meta["units"] / (4 * 128))
        assert batch.meta["cut_documents"] == batch.meta["cut_tokens"] == 0
        sizes = [-(-n // 4) for d, n in speech_runs(batch)]
        assert batch.meta["speech_units"] == sum(sizes)  # ceil(n / 4) patches per span of n tokens


def speech_runs(batch: Batch) -> list[tuple[str, int]]:
    runs = []
    for id, arrays in documents_in(batch):
        for segment in VOCAB.read_back(arrays["ids_BT"].numpy()):
            if segment.modality == "speech":
                runs.append((id, len(segment.ids_T)))
    return runs


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), buffer=st.integers(0, 30), rows=st.integers(1, 6))
def test_no_document_is_lost_or_doubled(seed, buffer, rows):
    """The stream's documents come out once each; what has not come out is in the buffer."""
    config = PackConfig(rows=rows, units_per_row=150, tokens_per_row=300, buffer=buffer)
    made = loader(config, data=sources(seed, a=30), seed=seed)
    out: list[str] = []
    while made.mixture.epochs["a"] < 3:
        out += [id for ids in made.next_batch().meta["document_ids"] for id in ids]
    reference = Mixture(sources(seed, a=30), {"a": 1.0}, seed)
    drawn = [reference.draw()[1].id for _ in range(made.mixture.number)]
    assert sorted([*out, *(item.laid_out.id for item in made._buffer)]) == sorted(drawn)


def test_the_oldest_document_is_always_taken():
    made = loader()
    for _ in range(20):
        made._refill()
        oldest = made._buffer[0].sample.number
        made.next_batch()
        assert made._buffer[0].sample.number > oldest


@settings(max_examples=12, deadline=None)
@given(before=st.integers(0, 9), seed=st.integers(0, 5), patched=st.booleans())
def test_resume_is_bit_identical(before, seed, patched):
    """Also across epoch edges (the sources last about two batches) and while the patch size drifts."""

    def make():
        return loader(patcher=Drifting(2), patch=patched, seed=seed, total_batches=12, data=sources(a=13, b=21))

    made = make()
    for _ in range(before):
        made.next_batch()
    state = json.loads(json.dumps(made.state_dict()))
    expected = [made.next_batch() for _ in range(6)]
    again = make()
    again.next_batch()  # a used loader forgets what it had
    again.load_state_dict(state)
    assert all(same(again.next_batch(), batch) for batch in expected)
    assert again.state_dict() == made.state_dict()
    assert min(made.mixture.epochs.values()) > 1  # the edge was crossed


def global_rows(ranks: list[PackedLoader]) -> list[list[tuple]]:
    """One global batch: of every row, in order, its documents and all their arrays."""
    batches = [rank.next_batch() for rank in ranks]
    return [
        [batch.meta["document_ids"][r], *(getattr(batch, name)[r].tolist() for name in ARRAYS)]
        for r in range(len(batches[0].ids_BT))
        for batch in batches
    ]


@settings(max_examples=8, deadline=None)
@given(before=st.integers(0, 8), seed=st.integers(0, 3), saved_with=st.sampled_from([1, 2, 4]))
def test_any_number_of_ranks_goes_on_with_the_same_global_rows(before, seed, saved_with):
    """Every rank builds every row of the global batch, so a state knows nothing of ranks; also across epochs."""

    def ranks(world_size: int) -> list[PackedLoader]:
        data = sources(a=13, b=21)
        return [
            loader(patcher=Drifting(2), seed=seed, total_batches=12, data=data, rank=r, world_size=world_size)
            for r in range(world_size)
        ]

    first = ranks(saved_with)
    for _ in range(before):
        global_rows(first)
    states = [json.loads(json.dumps(rank.state_dict())) for rank in first]
    assert all(state == states[0] for state in states)
    expected = [global_rows(first) for _ in range(5)]
    for world_size in (1, 2, 4):
        others = ranks(world_size)
        for rank in others:
            rank.load_state_dict(states[0])
        assert [global_rows(others) for _ in range(5)] == expected


def test_two_ranks_are_one():
    one = loader()
    two = [loader(rank=r, world_size=2) for r in range(2)]
    for n in range(8):
        whole, parts = one.next_batch(), [rank.next_batch() for rank in two]
        for name in ARRAYS:
            x = getattr(whole, name)
            assert torch.equal(x[0::2], getattr(parts[0], name))
            assert torch.equal(x[1::2], getattr(parts[1], name))
        for key in ("tokens", "speech_tokens", "units", "speech_units", "unit_slots", "targets"):
            assert whole.meta[key] == sum(part.meta[key] for part in parts)
        for key in ("waste", "max_units"):
            assert whole.meta[key] == parts[0].meta[key] == parts[1].meta[key]
        for part in parts:  # axes are those of the global batch
            assert (part.num_units, part.num_local) == (whole.num_units, whole.num_local)
        assert one.state_dict() == two[0].state_dict() == two[1].state_dict()
        if n == 3:  # a state of one rank serves any number
            two = [loader(rank=r, world_size=2) for r in range(2)]
            for rank in two:
                rank.load_state_dict(one.state_dict())


@pytest.mark.parametrize("patch", [None, 2, 4])
@pytest.mark.parametrize(("rows", "units"), [(4, 256), (16, 256), (8, 512)])
def test_little_is_wasted(patch, rows, units):
    """Documents like the micro-world's: 30-250 tokens, text, speech and both."""
    rng = np.random.default_rng(0)
    kinds = {"text": (30, 90, 1), "speech": (60, 248, 1), "both": (15, 60, 4)}
    data = {}
    for name, (low, high, n) in kinds.items():
        modalities = ["text", "speech"] * 2 if n == 4 else [name]
        data[name] = [
            Document(
                id=f"{name}{i}",
                source=name,
                segments=tuple(
                    Segment(modality=m, ids_T=rng.integers(0, 30, rng.integers(low, high))) for m in modalities
                ),
            )
            for i in range(100)
        ]
    config = PackConfig(rows=rows, units_per_row=units, tokens_per_row=4 * units)
    made = loader(config, Chunks(patch or 1), patch=patch is not None, data=data)
    check_waste([made.next_batch() for _ in range(12)])


def check_waste(batches: list[Batch]) -> None:
    """At most 5 % of the units and of the token positions of the rows are empty."""
    assert np.mean([batch.meta["waste"] for batch in batches]) <= 0.05
    assert 1 - sum(b.meta["tokens"] for b in batches) / sum(b.ids_BT.numel() for b in batches) <= 0.05


def interleaved(i: int, rng: np.random.Generator) -> Document:
    """Up to 120 s of text blocks, half as many words as speech after each; spec 2, 3.2 and 4: 1.40 text tokens and
    5.8 + 3.7 speech tokens per word (9.4 in the end, not every word has a silence)."""
    segments: list[Segment] = []
    words_left = int(rng.integers(30, 320))
    while words_left > 0:
        words = min(words_left, int(rng.integers(5, 31)))
        spoken = max(2, int(words + rng.integers(2)) // 2)
        num_text = int((1 + rng.poisson(0.4, words)).sum())
        num_speech = int((1 + rng.poisson(4.8, spoken) + rng.poisson(3.6, spoken)).sum())
        segments.append(Segment(modality="text", ids_T=rng.integers(0, 30, num_text)))
        segments.append(Segment(modality="speech", ids_T=rng.integers(0, 30, num_speech)))
        words_left -= words + spoken
    return Document(id=f"i{i}", source="interleaved", segments=tuple(segments))


def written(i: int, rng: np.random.Generator) -> Document:
    """Log-normal lengths: median 400 tokens, mean 730."""
    ids_T = rng.integers(0, 30, int(np.clip(rng.lognormal(6.0, 1.1), 16, 4000)))
    return Document(id=f"w{i}", source="text", segments=(Segment(modality="text", ids_T=ids_T),))


def mixture_of_the_paper(patch: int | None, **changes: int) -> PackedLoader:
    """r_mix 1:2 in tokens (spec 2, 3.3), rows as the paper has them."""
    rng = np.random.default_rng(0)
    data = {
        "interleaved": [interleaved(i, rng) for i in range(400)],
        "text": [written(i, rng) for i in range(800)],
    }
    config = PackConfig(**{"rows": 4, "units_per_row": 4096, "tokens_per_row": 8192} | changes)
    mixture = Mixture(data, {"interleaved": 1.0, "text": 2.0})
    return config.build(mixture, VOCAB, patch and Chunks(patch), seed=0, total_batches=50)


@pytest.mark.parametrize(
    ("patch", "changes"),
    [
        (None, {}),
        (4, {}),
        (4, {"rows": 1}),
        (4, {"rows": 16}),
        (2, {"rows": 8}),
        (4, {"tokens_per_row": 5248, "round_tokens_to": 128}),
        (4, {"tokens_per_row": 5248, "round_tokens_to": 5248}),  # one shape for a GPU
    ],
)
def test_little_is_wasted_of_the_papers_rows(patch, changes):
    made = mixture_of_the_paper(patch, **changes)
    check_waste([made.next_batch() for _ in range(12)])


def test_units_of_the_paper():
    """Spec 2, 8: 3.00 tokens of the mixture are 2.42 units at p = 4."""
    made = mixture_of_the_paper(4, rows=16)
    batches = [made.next_batch() for _ in range(32)]
    units, tokens = (sum(b.meta[key] for b in batches) for key in ("units", "tokens"))
    assert 3 * units / tokens == pytest.approx(2.42, rel=0.01)
    assert sum(b.meta["cut_tokens"] for b in batches) == 0


def test_a_long_document_waits_until_it_is_the_oldest():
    """Far longer than what a row of units holds on average, it leaves the other rows of its batch padded."""
    rng = np.random.default_rng(0)
    speech = Segment(modality="speech", ids_T=rng.integers(0, 30, 390))
    docs = [document("text", i, rng) for i in range(60)]
    for i in (10, 25, 40):
        docs.insert(i, Document(id=f"long{i}", source="text", segments=(speech,)))
    made = loader(CONFIG, Chunks(4), data={"text": docs})
    num_waited, num_long = 0, 0
    for _ in range(20):
        first = made._refill()
        waiting = [item.laid_out.id.startswith("long") for item in made._buffer[:first]]
        batch = made.next_batch()
        in_batch = [id for ids in batch.meta["document_ids"] for id in ids if id.startswith("long")]
        assert bool(in_batch) == waiting[0]
        assert (batch.ids_BT.shape[1] >= 393) == waiting[0]
        num_waited += any(waiting[1:]) and not waiting[0]
        num_long += len(in_batch)
    assert num_waited > 2
    assert num_long > 5


def test_long_documents_are_cut_and_counted():
    """Those with context, which are not split: a part behind the cut would lack what it is made from."""
    context = Segment(modality="text", ids_T=np.zeros(0, dtype=np.int32), loss=False)
    speech = Segment(modality="speech", ids_T=np.arange(100) % 30, unit_end_T=np.arange(100) % 10 == 9)
    long = Document(id="long", source="a", segments=(context, speech))
    for units, tokens, expected in ((64, 50, 50), (10, 1000, 3 + 6 * 4 + 1), (40, 1000, 104)):
        config = PackConfig(rows=1, units_per_row=units, tokens_per_row=tokens, buffer=0)
        batch = loader(config, Chunks(4), data={"a": [long]}).next_batch().validate()
        assert batch.meta["tokens"] == expected
        assert batch.meta["cut_documents"] == int(expected < 104)
        assert batch.meta["cut_tokens"] == 104 - expected
        assert batch.meta["split_documents"] == batch.meta["parts"] == 0
        ids = batch.ids_BT[0, :expected]
        assert ids[-1] == VOCAB.eos
        labels = batch.labels_BT[0, :expected].tolist()
        assert labels[-2] == (VOCAB.eos if expected == 104 else IGNORE)  # a cut does not teach an end
        assert batch.meta["units"] <= units


def test_patcher_gets_a_draw_per_sample_and_the_progress():
    patcher = Chunks(4)
    made = loader(patcher=patcher, total_batches=4, seed=5, data=sources(a=7))
    progresses = []
    for _ in range(8):
        before = len(patcher.calls)
        made.next_batch()
        progresses.append({progress for _, _, progress in patcher.calls[before:]})
    assert progresses == [{0.0}, {0.25}, {0.5}, {0.75}, {1.0}, {1.0}, {1.0}, {1.0}]
    draws = [draw for _, draw, _ in patcher.calls]
    assert len(set(draws)) == len(draws)  # also for the same document in another epoch
    assert 0 <= min(draws) < 0.05
    assert 0.95 < max(draws) < 1
    other = Chunks(4)
    loader(patcher=other, total_batches=4, seed=6, data=sources(a=7)).next_batch()
    assert other.calls[0][1] != patcher.calls[0][1]


def test_bad_settings_are_refused():
    for key in ("rows", "units_per_row", "tokens_per_row", "round_tokens_to"):
        with pytest.raises(ValueError, match=f"{key}=0 must be at least"):
            replace(CONFIG, **{key: 0})
    with pytest.raises(ValueError, match="rows=4 cannot be divided over 3 ranks"):
        loader(world_size=3)
    with pytest.raises(ValueError, match="rank=2 must be between 0 and 1"):
        loader(rank=2, world_size=2)
    with pytest.raises(ValueError, match="total_batches=0"):
        loader(total_batches=0)
    state = loader().state_dict()
    with pytest.raises(ValueError, match="loader's state was saved with"):
        loader(replace(CONFIG, rows=8)).load_state_dict(state)
    with pytest.raises(ValueError, match="mixture's state was saved with"):
        loader(data=sources(a=23, b=41)).load_state_dict(state)


def test_config_builds_the_loader():
    made = CONFIG.build(Mixture(SOURCES, {"a": 1.0}), VOCAB, Chunks(4), seed=0, total_batches=1)
    assert made.next_batch().ids_BT.shape[0] == 4
