"""Ends of spoken sentences: a model that learned what speech means finds them, one that cannot listen is at chance by arithmetic."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from speechquilt.evals import continuations
from speechquilt.evals.continuations import MEASURES, PROMPTS, SCORES, SplitSentence, fronts, pairs_of
from speechquilt.evals.results import Schema
from speechquilt.evals.scorer import Scorer
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.types import Batch, Document, Segment
from speechquilt.vocab import Vocab

TOPICS, WORDS = 6, 3  # a topic has so many text ids, and so many speech ids, of its own
VOCAB = Vocab(num_text=TOPICS * WORDS, num_speech=TOPICS * WORDS)


def run_of(modality, topic: int, length: int, rng: np.random.Generator) -> Segment:
    return Segment(modality=modality, ids_T=(topic * WORDS + rng.integers(0, WORDS, length)).astype(np.int32))


def sentence(i: int, rng: np.random.Generator) -> SplitSentence:
    topic = int(rng.integers(TOPICS))
    spoken, written = run_of("speech", topic, 6, rng), run_of("text", topic, 4, rng)
    return SplitSentence(
        id=str(i), spoken=spoken, written=written, ending=run_of("text", topic, int(rng.integers(4, 9)), rng)
    )


def sentences(number: int, seed: int) -> list[SplitSentence]:
    rng = np.random.default_rng(seed)
    return [sentence(i, rng) for i in range(number)]


def model_of(**changes):
    sizes = {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 32} | changes
    return PlainLMConfig(vocab_size=VOCAB.size, llama=LlamaConfig(**sizes)).build(0)


@pytest.fixture(scope="module")
def listener() -> Scorer:
    """Trained on speech, then text, of one topic."""
    model, rng = model_of(), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(70):
        rows = []
        for topic in rng.integers(0, TOPICS, 12).tolist():
            segments = (run_of("speech", topic, 6, rng), run_of("text", topic, 6, rng))
            rows.append(VOCAB.lay_out(Document(id="", segments=segments, source="")).ids_T)
        ids_BT = torch.from_numpy(np.stack(rows))
        zeros_BT = torch.zeros_like(ids_BT)
        logits_BTV = model(Batch(ids_BT=ids_BT, labels_BT=zeros_BT, doc_BT=zeros_BT))
        loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Scorer(model.eval(), VOCAB, None)


def test_pairs_have_endings_of_one_length_and_no_text_twice():
    many = sentences(120, seed=1)
    again = [SplitSentence(id=f"{s.id} again", spoken=s.spoken, written=s.written, ending=s.ending) for s in many]
    pairs = pairs_of([*many, *again], most=1000)
    assert len(pairs) > 50
    assert all(len(a.ending.ids_T) == len(b.ending.ids_T) for a, b in pairs)
    endings = [tuple(s.ending.ids_T) for pair in pairs for s in pair]
    assert len(set(endings)) == len(endings)
    assert len({len(ending) for ending in endings}) > 2
    assert len(pairs_of(many, most=7)) == 7
    assert [p[0].id for p in pairs_of(many, most=7, seed=1)] != [p[0].id for p in pairs_of(many, most=7, seed=2)]
    with pytest.raises(ValueError, match="at least 2 are needed"):
        pairs_of(many[:2], most=7)


def test_the_control_is_speech_of_another_pair_and_differs_inside_it():
    pairs = pairs_of(sentences(60, seed=1), most=20)
    used = []
    for k, pair in enumerate(pairs):
        own, other = fronts(pairs, k, "speech"), fronts(pairs, k, "other_speech")
        assert [s is front for s, front in zip((x.spoken for x in pair), own)] == [True, True]
        assert not {id(front) for front in own} & {id(front) for front in other}
        assert other[0] is not other[1]
        used += [id(front) for front in other]
    assert sorted(used) == sorted(id(s.spoken) for pair in pairs for s in pair)


def test_a_model_that_learned_what_speech_means_finds_the_ending(listener):
    found = continuations.continuations("plain", listener, pairs_of(sentences(300, seed=2), most=100))
    Schema(MEASURES).check(found)
    for score in SCORES:
        own, other = (f"lm.plain.continuation.{prompt}.{score}" for prompt in ("speech", "other_speech"))
        assert found[f"{own}.accuracy"] > 0.8
        assert found[f"{own}.low"] > found[f"{own}.chance"] == 0.5
        assert found[f"{other}.low"] <= 0.5 <= found[f"{other}.high"]
        assert (found[f"{own}.n"], found[f"{own}.clusters"]) == (200, 100)
        assert found[f"lm.plain.listening.{score}.low"] > 0.2
    kept = {v.name: v.met for v in Schema(MEASURES).verdicts(found) if "plain" in v.name}
    assert len(kept) == 4
    assert all(kept.values()), kept


def test_a_model_that_cannot_listen_is_right_half_of_the_time():
    """It sees one token: whatever stands in front, every pair has one right answer."""
    scorer = Scorer(model_of(window=1), VOCAB, None)
    right = continuations.answers(scorer, pairs_of(sentences(100, seed=3), most=40))
    for prompt in PROMPTS.keys() - {"text"}:  # text runs on without a marker, so its last token is seen
        correct = np.array(right[prompt, "mean"]).reshape(-1, 2)
        assert (correct.sum(1) == 1).all()
