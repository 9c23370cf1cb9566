"""What a warm start keeps: before training the change is nought, document by document; weights that moved show."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speechquilt.evals.results import Schema
from speechquilt.evals.scorer import Scorer
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import StaticPatcher
from speechquilt.model.warm_start import latent_from_hugging_face, plain_from_hugging_face
from speechquilt.nn.llama import LlamaConfig
from speechquilt.stages.text_loss import MEASURES, base_nats, our_nats, text_losses
from speechquilt.vocab import Vocab
from tests.parity import tiny_checkpoints

BOS = 48  # of the tiny checkpoints
WORDS = 40  # ids of words, below their BOS and EOS
SPEECH = 1  # so few new rows take next to nothing from the base's softmax
LOCAL = LatentLMConfig(
    vocab_size=0, global_=LlamaConfig(width=8, num_layers=1, num_heads=1, num_kv_heads=1, ffn_width=8), local_width=16,
    encoder_layers=1, decoder_layers=1, local_heads=2, local_ffn=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.saved(tmp_path_factory.mktemp("base"), "llama")[0]


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, WORDS, n).astype(np.int32) for n in (2, 5, 31, 17, 9, 9)]


def vocab_of() -> Vocab:
    return Vocab(num_text=tiny_checkpoints.VOCAB, num_speech=SPEECH, opening_marker=False)


def test_the_base_is_read_without_its_first_token(base: Path, documents: list[np.ndarray]) -> None:
    _, theirs = tiny_checkpoints.saved(base, "llama")
    found = base_nats(base, BOS, documents)
    ids_T = torch.tensor([BOS, *documents[1].tolist()])
    with torch.no_grad():
        log_probs_TV = theirs(ids_T[None]).logits[0].log_softmax(-1)
    by_hand = -sum(float(log_probs_TV[t, ids_T[t + 1]]) for t in range(1, len(ids_T) - 1))
    assert found[1] == pytest.approx(by_hand, abs=1e-3)
    assert len(found) == len(documents)


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_before_training_nothing_has_changed(kind: str, base: Path, documents: list[np.ndarray]) -> None:
    vocab = vocab_of()
    if kind == "plain":
        scorer = Scorer(plain_from_hugging_face(base, vocab).eval(), vocab, None)
    else:
        scorer = Scorer(latent_from_hugging_face(base, vocab, LOCAL).eval(), vocab, StaticPatcher(2))
    base_N = base_nats(base, BOS, documents)
    assert our_nats(scorer, documents) == pytest.approx(base_N, rel=0.02)
    found = text_losses(kind, scorer, documents, base_N)
    Schema(MEASURES).check(found)
    assert found[f"lm.{kind}.text.tokens"] == sum(map(len, documents)) - len(documents)
    assert found[f"lm.{kind}.text.low"] <= found[f"lm.{kind}.text.change"] <= found[f"lm.{kind}.text.high"]
    assert found[f"lm.{kind}.text.change"] < 0.1
    (verdict,) = (v for v in Schema(MEASURES).verdicts(found) if kind in v.name)
    assert (verdict.target, verdict.met) == ("≤ 0.1 nats", True)


def test_weights_that_moved_show(base: Path, documents: list[np.ndarray]) -> None:
    vocab, model = vocab_of(), plain_from_hugging_face(base, vocab_of()).eval()
    with torch.no_grad():
        model.head.weight.mul_(2)  # as sure of what it does not know as training on little makes one
    found = text_losses("plain", Scorer(model, vocab, None), documents, base_nats(base, BOS, documents))
    assert found["lm.plain.text.change"] > 0.1
    verdicts = {v.name: v.met for v in Schema(MEASURES).verdicts(found)}
    assert verdicts == {"Text loss above the base's, plain": False, "Text loss above the base's, latent": False}


def test_other_documents_are_refused(base: Path, documents: list[np.ndarray]) -> None:
    scorer = Scorer(plain_from_hugging_face(base, vocab_of()).eval(), vocab_of(), None)
    with pytest.raises(ValueError, match="must be of the same ones"):
        text_losses("plain", scorer, documents, np.ones(2))
