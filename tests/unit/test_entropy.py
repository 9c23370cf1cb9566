"""Entropy patching: patches end where the small LM is unsure, call equals step, and the threshold gives the size asked for."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.model import entropy, saving
from speechquilt.model.entropy import EntropyConfig, EntropyPatcher, calibrate
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig, eval_patcher
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.types import Document, LaidOut, Segment
from speechquilt.vocab import Vocab
from tests.dummies import VOCAB, make_batch, random_laid_out

LLAMA = LlamaConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=24)
CONFIG = PlainLMConfig(vocab_size=VOCAB.size, llama=LLAMA)
WORDS = [np.array(x) for x in ([1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 0])]  # each token has its one place


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speech(ids_T: np.ndarray) -> LaidOut:
    return VOCAB.lay_out(Document(id="x", segments=(Segment(modality="speech", ids_T=ids_T),), source="x"))


def of_words(seed: int, num_words: int = 12) -> tuple[LaidOut, list[int]]:
    """Random words without pauses, and their sizes."""
    chosen = [WORDS[i] for i in np.random.default_rng(seed).integers(0, len(WORDS), num_words)]
    return speech(np.concatenate(chosen)), [len(word) for word in chosen]


@pytest.fixture(scope="module")
def trained() -> PlainLM:
    """Knows the inside of every word, not which word comes next."""
    model = CONFIG.build(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = make_batch([[of_words(1000 + 8 * step + i)[0]] for i in range(8)])
        loss = torch.nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.labels_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def sizes(patcher: EntropyPatcher, laid_out: LaidOut) -> list[int]:
    opens_T = patcher(laid_out, 0.0)[0][laid_out.is_speech_T]
    return np.diff(np.append(np.flatnonzero(opens_T), len(opens_T))).tolist()


def stepped(patcher: EntropyPatcher, laid_out: LaidOut) -> tuple[list[bool], list[bool]]:
    opens, closes, state = [], [], patcher.init_state()
    for i, is_speech in zip(laid_out.ids_T.tolist(), laid_out.is_speech_T.tolist()):
        o, c, state = patcher.step(i, is_speech, state)
        opens.append(o)
        closes.append(c)
    return opens, closes


def test_patches_are_the_words_that_the_model_has_found(trained: PlainLM) -> None:
    documents = [of_words(seed) for seed in range(20)]
    threshold = calibrate(trained, [x for x, _ in documents], patch_size=4.0, max_patch_size=100)
    patcher = EntropyPatcher(trained, EntropyConfig(model="", threshold=threshold, max_patch_size=100))
    held_out = [of_words(seed) for seed in range(500, 520)]
    right = [sizes(patcher, laid_out) == words for laid_out, words in held_out]
    assert np.mean(right) >= 0.9


def test_the_entropy_is_that_of_the_next_token_given_the_marker_and_the_span(trained: PlainLM) -> None:
    """By hand: one patch per token whose distribution after `<s> s0..st` has more nats than the threshold."""
    laid_out, _ = of_words(7)
    speech_T = laid_out.ids_T[laid_out.is_speech_T]
    patcher = EntropyPatcher(trained, EntropyConfig(model="", threshold=0.5, max_patch_size=100))
    ids = torch.tensor([[VOCAB.marker("speech"), *speech_T.tolist()]])
    state = trained.init_state(1, ids.shape[1])
    over = []
    for t in range(ids.shape[1]):
        logits_BV, state = trained.step(ids[:, t], None, None, state)
        over.append(float(torch.distributions.Categorical(logits=logits_BV[0]).entropy()) > 0.5)
    assert patcher(laid_out, 0.0)[1][laid_out.is_speech_T].tolist() == over[1:]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cap=st.integers(1, 9),
    num_words=st.integers(0, 60),
    window=st.sampled_from([None, 8]),
)
def test_call_and_step_agree(seed: int, cap: int, num_words: int, window: int | None) -> None:
    """Also with a threshold that float32 could not tell from an entropy of the document, and when the cache must grow."""
    model = replace(CONFIG, llama=replace(LLAMA, window=window)).build(seed)
    laid_out = random_laid_out(seed) if num_words == 0 else of_words(seed, num_words)[0]
    spans = entropy._span_entropies(deepcopy(model).double(), laid_out)
    seen = np.concatenate([[0.0], *(entropy_S for _, entropy_S in spans)])
    threshold = float(np.random.default_rng(seed).choice(seen)) + 1e-10
    patcher = EntropyPatcher(model, EntropyConfig(model="", threshold=threshold, max_patch_size=cap))
    opens_T, closes_T = patcher(laid_out, 0.0)
    assert (opens_T.tolist(), closes_T.tolist()) == stepped(patcher, laid_out)
    assert max(sizes(patcher, laid_out), default=0) <= cap


def test_a_span_knows_nothing_of_what_was_before(trained: PlainLM) -> None:
    """The same span after other text or speech has the same patches: the model reads the span alone."""
    span = of_words(3)[0].ids_T[2:-1] - VOCAB.speech_start
    alone = speech(span)
    segments = (
        Segment(modality="text", ids_T=np.array([3, 1, 4])),
        Segment(modality="speech", ids_T=np.array([5, 6, 7])),
        Segment(modality="text", ids_T=np.array([1])),
        Segment(modality="speech", ids_T=span),
    )
    later = VOCAB.lay_out(Document(id="y", segments=segments, source="x"))
    patcher = EntropyPatcher(trained, EntropyConfig(model="", threshold=0.5, max_patch_size=100))
    for a, b in zip(patcher(alone, 0.0), patcher(later, 0.0)):
        np.testing.assert_array_equal(a[-len(span) - 1 :], b[-len(span) - 1 :])


@pytest.mark.parametrize("patch_size", [1.5, 2.5, 3.3, 4.0])
def test_calibration_gives_the_patch_size_asked_for(patch_size: float) -> None:
    model = CONFIG.build(4)
    documents = [speech(np.random.default_rng(i).integers(0, VOCAB.num_speech, 60)) for i in range(12)]
    threshold = calibrate(model, documents, patch_size=patch_size, max_patch_size=8)
    patcher = EntropyPatcher(model, EntropyConfig(model="", threshold=threshold, max_patch_size=8))
    found = np.mean([size for x in documents for size in sizes(patcher, x)])
    assert found == pytest.approx(patch_size, rel=0.03)


def test_calibration_keeps_clear_of_every_entropy(trained: PlainLM) -> None:
    documents = [of_words(seed)[0] for seed in range(5)]
    threshold = calibrate(trained, documents, patch_size=3.0, max_patch_size=6)
    seen = np.concatenate([x for d in documents for _, x in entropy._span_entropies(trained, d)])
    assert np.abs(seen - threshold).min() > 1e-10
    for d in documents:
        patcher = EntropyPatcher(trained, EntropyConfig(model="", threshold=threshold, max_patch_size=6))
        opens_T, closes_T = patcher(d, 0.0)
        assert (opens_T.tolist(), closes_T.tolist()) == stepped(patcher, d)


def test_calibration_refuses_what_cannot_be(trained: PlainLM) -> None:
    with pytest.raises(ValueError, match="needs documents with speech"):
        calibrate(trained, [speech(np.zeros(0, dtype=np.int64))], patch_size=4, max_patch_size=8)
    with pytest.raises(ValueError, match=r"patch_size=9 cannot be reached.*max_patch_size=4"):
        calibrate(trained, [of_words(0)[0]], patch_size=9, max_patch_size=4)


def test_config_reads_the_folder_of_a_plain_model(trained: PlainLM, tmp_path: Path) -> None:
    saving.save(trained, tmp_path / "plain")
    made = PatcherConfig(
        kind="entropy", entropy=EntropyConfig(model=str(tmp_path / "plain"), threshold=0.5, max_patch_size=9)
    )
    direct = EntropyPatcher(trained, EntropyConfig(model="", threshold=0.5, max_patch_size=9))
    for patcher in (made.build(), eval_patcher(made)):
        assert isinstance(patcher, EntropyPatcher)
        assert patcher.causal
        for a, b in zip(patcher(of_words(1)[0], 0.0), direct(of_words(1)[0], 0.0)):
            np.testing.assert_array_equal(a, b)
    latent = LatentLMConfig(
        vocab_size=VOCAB.size,
        global_=replace(LLAMA, width=32),
        local_width=16,
        encoder_layers=1,
        decoder_layers=1,
        local_heads=2,
        local_ffn=16,
    )
    saving.save(latent.build(), tmp_path / "latent")
    with pytest.raises(ValueError, match="LatentLM; train a plain LM"):
        EntropyConfig(model=str(tmp_path / "latent"), threshold=0.5, max_patch_size=9).build()
    with pytest.raises(FileNotFoundError, match="missing"):
        EntropyConfig(model=str(tmp_path / "nothing"), threshold=0.5, max_patch_size=9).build()


def test_misuse_is_refused(trained: PlainLM) -> None:
    with pytest.raises(ValueError, match="max_patch_size=0"):
        EntropyPatcher(trained, EntropyConfig(model="", threshold=0.5, max_patch_size=0))
    patcher = EntropyPatcher(trained, EntropyConfig(model="", threshold=0.5, max_patch_size=4))
    other = Vocab(num_text=2000, num_speech=9)
    segments = (Segment(modality="speech", ids_T=np.arange(3)),)
    laid_out = other.lay_out(Document(id="z", segments=segments, source="x"))
    with pytest.raises(ValueError, match="outside the entropy model's vocabulary of 64"):
        patcher(laid_out, 0.0)
    with pytest.raises(ValueError, match="outside the entropy model's vocabulary of 64"):
        stepped(patcher, laid_out)
    with pytest.raises(ValueError, match="before any marker"):
        patcher.step(VOCAB.speech_start, True, patcher.init_state())
