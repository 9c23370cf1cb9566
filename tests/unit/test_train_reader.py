"""The reader of pieces: the tokens stay what they were, the pieces say what they hold, and what it has learned it reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechquilt.stages.train_reader import PieceLoader, ReaderRecipe, train_reader
from speechquilt.text_to_token.examples import whole_example
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import IGNORE, AlignedTokens
from tests.contracts.tiny_tokenizer import build

WORDS = ("the", "cat", "sat", "on", "mat", "where", "does", "anna", "live")
SILENCE = 23
RECIPE = ReaderRecipe(
    train=TrainConfig(steps=400, lr=3e-3, warmup_steps=20, num_threads=1, checkpoint_every=200, seed=5),
    rows=16,
    max_words=4,
)


def recording(number: int) -> AlignedTokens:
    """Six words drawn at random: two tokens each, 2 w and 2 w + 1, silence at the edges."""
    said = np.random.default_rng(number).integers(0, len(WORDS), 6)
    ids_T = np.array([SILENCE, *(2 * w + i for w in said for i in (0, 1)), SILENCE])
    word_T = np.array([-1, *np.arange(6).repeat(2), -1])
    words = tuple(WORDS[w] for w in said)
    return AlignedTokens(id=str(number), text=" ".join(words), words=words, ids_T=ids_T, word_T=word_T)


RECORDINGS = [recording(i) for i in range(40)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    build(seed=3, read_back_head="attention", ctc_weight=0.0).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_piece_says_what_it_holds(tokenizer: Path) -> None:
    model = SupervisedTokenizer.load(tokenizer)
    assert model.text_tokenizer is not None
    lengths = set()
    loader = PieceLoader(RECIPE, model, RECORDINGS)
    for _ in range(8):
        batch = loader.next_batch()
        for ids_T, num_tokens, text_L in zip(batch.ids_BT, batch.num_tokens_B, batch.text_BL):
            tokens = [i for i in ids_T[:num_tokens].tolist() if i != SILENCE]
            said = model.text_tokenizer.decode(text_L[text_L != IGNORE].tolist()).split()
            assert tokens == [2 * WORDS.index(w) + i for w in said for i in (0, 1)]
            lengths.add(len(said))
    assert lengths == {1, 2, 3, 4, 6}  # runs of words, and whole recordings


def test_two_ranks_read_what_one_reads(tokenizer: Path) -> None:
    model = SupervisedTokenizer.load(tokenizer)
    one = PieceLoader(RECIPE, model, RECORDINGS).next_batch()
    for rank in (0, 1):
        part = PieceLoader(RECIPE, model, RECORDINGS, rank, 2).next_batch()
        assert part.num_tokens_B.tolist() == one.num_tokens_B[rank::2].tolist()


def test_it_learns_to_read_pieces_and_the_tokens_stay(tokenizer: Path, tmp_path: Path) -> None:
    train_reader(RECIPE, tokenizer, RECORDINGS, tmp_path / "reader")
    before, after = SupervisedTokenizer.load(tokenizer), SupervisedTokenizer.load(tmp_path / "reader")
    assert after.fingerprint == before.fingerprint
    changed = {name for name, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert changed == {name for name in changed if name.startswith(("encoder.layers.2.", "encoder.layer_norm", "encoder.embed_positions2", "decoder."))}  # fmt: skip
    pieces = [np.array([2 * w, 2 * w + 1]) for w in range(len(WORDS))]
    assert after.read_back(pieces) == list(WORDS)
    assert before.read_back(pieces) != list(WORDS)


def test_a_stopped_run_ends_like_an_uninterrupted_one(tokenizer: Path, tmp_path: Path) -> None:
    short = replace(
        RECIPE, train=replace(RECIPE.train, steps=6, warmup_steps=0, checkpoint_every=3, keep_checkpoints=2)
    )
    train_reader(short, tokenizer, RECORDINGS, tmp_path / "whole")
    train_reader(short, tokenizer, RECORDINGS, tmp_path / "again")
    for late in ("step_00000006",):  # as a kill behind step 3 leaves it
        for path in sorted((tmp_path / "again" / "checkpoints" / late).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (tmp_path / "again" / "checkpoints" / late).rmdir()
    train_reader(short, tokenizer, RECORDINGS, tmp_path / "again")
    whole, again = (SupervisedTokenizer.load(tmp_path / name).state_dict() for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_cannot_be_read_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    build(seed=3).save(tmp_path / "ctc")
    with pytest.raises(ValueError, match="reads by CTC or not at all"):
        train_reader(RECIPE, tmp_path / "ctc", RECORDINGS, tmp_path / "reader")
    silent = replace(RECORDINGS[0], word_T=np.full(14, -1))
    with pytest.raises(ValueError, match="none of 1 recordings has text"):
        train_reader(RECIPE, tokenizer, [silent], tmp_path / "reader")
    for wrong in ({"rows": 0}, {"whole": 1.5}, {"max_words": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(RECIPE, **wrong)
    assert whole_example(silent, build().text_tokenizer) is None
