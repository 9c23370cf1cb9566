"""BPE over speech ids: lossless, one span at a time, and a scorer that hides it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig
from speechquilt.data.feed.speech_bpe import BaseTokenCounts, SpeechBPE, speech_spans
from speechquilt.evals.pieced import PiecedScorer
from speechquilt.evals.scorer import Request, Scorer
from speechquilt.model.ladder import plain
from speechquilt.model.patcher import PatcherConfig
from speechquilt.types import Document, Segment
from speechquilt.vocab import Vocab

NUM_IDS = 20


def repetitive(seed: int, num_spans: int = 60) -> list[np.ndarray]:
    """Spans of a language of a few tunes, so that there is something to merge."""
    rng = np.random.default_rng(seed)
    tunes = [rng.integers(0, NUM_IDS, rng.integers(2, 6)) for _ in range(8)]
    return [np.concatenate([tunes[k] for k in rng.integers(0, 8, 12)]) for _ in range(num_spans)]


BPE = SpeechBPE.train(repetitive(0), NUM_IDS, 48)


def speech(ids: np.ndarray) -> Segment:
    return Segment(modality="speech", ids_T=np.asarray(ids, dtype=np.int32), unit_end_T=np.ones(len(ids), np.uint8))


def text(*ids: int) -> Segment:
    return Segment(modality="text", ids_T=np.asarray(ids, dtype=np.int32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, NUM_IDS - 1), max_size=80) | st.sampled_from([x.tolist() for x in repetitive(0)]))
def test_decoding_gives_back_what_was_encoded(ids):
    pieces_P = BPE.encode(np.asarray(ids, dtype=np.int32))
    assert pieces_P.dtype == np.int32
    assert BPE.decode(pieces_P).tolist() == ids
    assert BPE.length_V[pieces_P].sum() == len(ids)
    assert len(pieces_P) <= len(ids)


def test_pieces_shorten_speech_and_every_base_id_stays_a_piece():
    ids_T = np.concatenate(repetitive(0))
    pieces_P = BPE.encode(ids_T)
    assert BPE.num_pieces == 48
    assert len(ids_T) / len(pieces_P) > 2
    for i in range(NUM_IDS):
        assert BPE.encode(np.array([i])).tolist() == [i]
    assert SpeechBPE.train([], NUM_IDS, 48).num_pieces == NUM_IDS  # no pair to merge: still full coverage


def test_spans_are_cut_on_their_own():
    tune = repetitive(0)[0]
    whole = BPE.encode(tune)
    longest = int(BPE.length_V[whole].argmax())
    cut = int(BPE.length_V[whole[:longest]].sum()) + 1  # in the middle of a piece
    document = Document(id="d", source="s", segments=(speech(tune[:cut]), text(7, 8), speech(tune[cut:])))
    pieced = BPE.document(document)
    assert [s.modality for s in pieced.segments] == ["speech", "text", "speech"]
    for before, after in zip(document.segments, pieced.segments):
        if before.modality == "text":
            assert after is before
        else:
            assert after.unit_end_T is None
            np.testing.assert_array_equal(after.ids_T, BPE.encode(before.ids_T))
    assert pieced.num_tokens("speech") > len(whole)  # a merge across the text between them would save one


def test_training_is_a_function_of_the_spans_and_the_sizes():
    assert SpeechBPE.train(repetitive(0), NUM_IDS, 48).fingerprint == BPE.fingerprint
    others = [SpeechBPE.train(repetitive(1), NUM_IDS, 48), SpeechBPE.train(repetitive(0), NUM_IDS, 40)]
    assert len({BPE.fingerprint, *(bpe.fingerprint for bpe in others)}) == 3


def test_saved_and_loaded(tmp_path):
    BPE.save(tmp_path / "speech_bpe.json")
    loaded = SpeechBPE.load(tmp_path / "speech_bpe.json")
    assert (loaded.fingerprint, loaded.num_ids, loaded.wanted) == (BPE.fingerprint, NUM_IDS, 48)
    np.testing.assert_array_equal(loaded.encode(repetitive(0)[0]), BPE.encode(repetitive(0)[0]))
    assert [p.name for p in tmp_path.iterdir()] == ["speech_bpe.json"]
    with pytest.raises(FileNotFoundError, match="speech_pieces writes it"):
        SpeechBPE.load(tmp_path / "nowhere.json")
    for broken in ("{", "{}", json.dumps({"num_ids": 3, "wanted": 4, "tokenizer": 5})):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=r"broken\.json is no speech BPE"):
            SpeechBPE.load(tmp_path / "broken.json")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="speech_pieces=19 must be at least the 20 ids"):
        SpeechBPE.train([], NUM_IDS, 19)
    with pytest.raises(ValueError, match=r"num_ids=70000 must lie in 1\.\.65534"):
        SpeechBPE.train([], 70_000, 80_000)
    for wrong in ([-1, 3], [20]):
        with pytest.raises(ValueError, match=r"the BPE was trained for 0\.\.19"):
            BPE.encode(np.asarray(wrong))


def test_spans_to_learn_from_are_a_seeded_sample():
    sources = {
        "a": [Document(id=f"a{i}", source="a", segments=(text(1), speech([i]))) for i in range(6)],
        "b": [Document(id=f"b{i}", source="b", segments=(speech([10 + i]), speech([15 + i]))) for i in range(3)],
    }

    def drawn(seed: int, limit: int) -> list[int]:
        return [int(ids_T[0]) for ids_T in speech_spans(sources, seed, limit)]

    everything = drawn(0, 100)
    assert sorted(everything) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 15, 16, 17]  # each once, no text
    assert drawn(0, 5) == everything[:5]
    assert drawn(1, 100) != everything
    assert [int(x[0]) for x in speech_spans(dict(reversed(sources.items())), 0, 100)] == everything


def documents(num: int) -> list[Document]:
    spans = repetitive(0, num)
    return [Document(id=f"d{i}", source="a", segments=(text(i % 9, 3), speech(x))) for i, x in enumerate(spans)]


def test_batches_count_base_tokens_and_the_mixture_draws_the_same_documents():
    vocab = Vocab(num_text=10, num_speech=BPE.num_pieces)
    config = PackConfig(rows=2, units_per_row=80, tokens_per_row=80, buffer=8)

    def loader(convert):
        mixture = Mixture({"a": documents(30)}, {"a": 1.0}, convert=convert)
        size = BPE.num_pieces if convert else NUM_IDS
        packed = config.build(
            mixture,
            Vocab(num_text=10, num_speech=size),
            PatcherConfig(kind="none").build(),
            seed=0,
            total_batches=9,
        )
        return mixture, packed

    plain, _ = loader(None)
    pieced, packed = loader(BPE.document)
    for _ in range(40):  # over the edge of an epoch
        (sample, document), (other, short) = plain.draw(), pieced.draw()
        assert sample == other
        assert short.num_tokens("speech") < document.num_tokens("speech")
    assert plain.tokens == pieced.tokens  # the mixture weighs base tokens

    counting = BaseTokenCounts(packed, BPE, vocab)
    for _ in range(4):
        batch = counting.next_batch()
        ids_N = batch.ids_BT[vocab.is_speech(batch.ids_BT)].numpy() - vocab.speech_start
        assert batch.meta["speech_tokens"] == len(BPE.decode(ids_N))
        assert batch.meta["speech_units"] == len(ids_N) < batch.meta["speech_tokens"]
        others = int((~vocab.is_speech(batch.ids_BT) & (batch.ids_BT != vocab.pad)).sum())
        assert batch.meta["tokens"] == others + batch.meta["speech_tokens"]
        assert batch.meta["units"] == others + len(ids_N)


def test_resume_goes_on_with_the_same_batch():
    vocab = Vocab(num_text=10, num_speech=BPE.num_pieces)
    config = PackConfig(rows=2, units_per_row=80, tokens_per_row=80, buffer=8)

    def build():
        mixture = Mixture({"a": documents(30)}, {"a": 1.0}, convert=BPE.document)
        patcher = PatcherConfig(kind="static", patch_size=2).build()
        return BaseTokenCounts(config.build(mixture, vocab, patcher, seed=0, total_batches=9), BPE, vocab)

    first = build()
    for _ in range(3):
        first.next_batch()
    again = build()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    expected, found = first.next_batch(), again.next_batch()
    assert torch.equal(expected.ids_BT, found.ids_BT)
    assert expected.meta == found.meta


def scorers() -> tuple[PiecedScorer, Scorer]:
    vocab = Vocab(num_text=10, num_speech=BPE.num_pieces)
    model = plain("toy").for_vocab(vocab).build(0).eval()
    return PiecedScorer(model, vocab, None, BPE), Scorer(model, vocab, None)


def test_the_scorer_takes_base_ids_and_counts_them():
    pieced, plain = scorers()
    tunes = repetitive(0, 3)
    requests = [Request((text(1, 2), speech(tunes[0])), speech(x)) for x in tunes[1:]]
    in_pieces = [Request((text(1, 2), BPE.segment(p[1])), BPE.segment(c)) for p, c in requests]
    for ours, theirs, request in zip(
        pieced.log_likelihoods(requests), plain.log_likelihoods(in_pieces), requests, strict=True
    ):
        assert ours.sum == theirs.sum
        assert ours.num_tokens == len(request.continuation.ids_T) > theirs.num_tokens
    total = sum(-s.sum for s in plain.log_likelihoods([Request((), BPE.segment(speech(x))) for x in tunes]))
    assert pieced.mean_loss([speech(x) for x in tunes]) == pytest.approx(total / sum(map(len, tunes)))
    assert pieced.settings["speech_bpe"] == BPE.fingerprint


def test_generated_pieces_come_back_as_base_ids():
    pieced, plain = scorers()
    prompts = [(speech(tune),) for tune in repetitive(0, 24)]
    in_pieces = [(BPE.segment(tune),) for (tune,) in prompts]
    raw = [BPE.decode(p) for p in plain.generate(in_pieces, "speech", 12, temperature=1.0, seed=3)]
    assert max(map(len, raw)) > 12 > min(map(len, raw))  # some must be cut
    answers = pieced.generate(prompts, "speech", 12, temperature=1.0, seed=3)
    assert [x.tolist() for x in answers] == [x[:12].tolist() for x in raw]
    assert [x.tolist() for x in pieced.generate(prompts[:2], "text", 5)] == [
        x.tolist() for x in plain.generate(in_pieces[:2], "text", 5)
    ]


def test_a_scorer_of_another_run_is_refused():
    vocab = Vocab(num_text=10, num_speech=BPE.num_pieces + 1)
    with pytest.raises(ValueError, match="49 speech ids, the BPE 48 pieces"):
        PiecedScorer(plain("toy").for_vocab(vocab).build(0), vocab, None, BPE)
