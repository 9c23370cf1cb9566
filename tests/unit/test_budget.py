"""Budgets in units and tokens, and runs on spoken shards and BPE pieces, with the data and the models they really use."""

import dataclasses
import json

import numpy as np
import pytest

from speechquilt.data.feed.pack import PackConfig
from speechquilt.evals.pieced import PiecedScorer
from speechquilt.evals.scorer import Request
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.stages.train_lm import (
    BPE_FILE,
    LMRecipe,
    load_scorer,
    num_steps,
    open_data,
    tokenizer_folder,
    train_lm,
)
from speechquilt.stages.training_documents import (
    shard_info,
    speech_documents,
    spoken_texts,
    text_segment,
    write_documents,
    write_spoken,
)
from speechquilt.text import TextTokenizer
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import AlignedTokens, Document, Segment, UnitEnd
from speechquilt.vocab import Vocab

NUM_SPEECH = 24
WORDS = [a + b for a in ("ba", "ke", "li", "mo", "nu") for b in ("lon", "mit", "nar", "rok")]
TOKENIZER = TextTokenizer.train([" ".join(WORDS)] * 4, 275)
TINY = LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_width=32)
PLAIN = PlainLMConfig(vocab_size=0, llama=TINY)
LATENT = LatentLMConfig(
    vocab_size=0, global_=TINY, local_width=8, encoder_layers=1, decoder_layers=1, local_heads=2, local_ffn=16
)
WEIGHTS = {"text": 1.0, "speech": 1.0, "parallel": 2.0}
PATCHERS = {
    "none": PatcherConfig(kind="none"),
    "static": PatcherConfig(kind="static", patch_size=4),
    "curriculum": PatcherConfig(kind="curriculum", patch_size=2),  # far from aligned, so that every part of it counts
}


def utterance(id: str, rng: np.random.Generator) -> AlignedTokens:
    """Words that always sound the same, of 2 to 8 tokens, with pauses."""
    words = rng.choice(WORDS, rng.integers(6, 30)).tolist()
    sounds, word_T = [], []
    for k, word in enumerate(words):
        voice = np.random.default_rng(WORDS.index(word))
        ids = voice.integers(1, NUM_SPEECH, voice.integers(2, 9)).tolist()
        pause = int(rng.integers(0, 4))
        sounds += ids + [0] * pause
        word_T += [k] * len(ids) + [-1] * pause
    return AlignedTokens(
        id=id,
        text=" ".join(words),
        words=tuple(words),
        ids_T=np.asarray(sounds, dtype=np.int32),
        word_T=np.asarray(word_T, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Text, speech and spoken shards of an invented language, a few hundred documents each."""
    root, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    info = shard_info(Vocab(num_text=TOKENIZER.size, num_speech=NUM_SPEECH), TOKENIZER, "speech-a", recipe="test")
    spoken = [utterance(f"u{i}", rng) for i in range(300)]
    texts = [Document(id=s.id, source="text", segments=(text(s.text),)) for s in spoken]
    write_documents(root / "text", info, [(t, "") for t in texts])
    write_documents(root / "speech", info, speech_documents(spoken))
    write_spoken(root / "parallel", info, spoken_texts(spoken))
    return {name: root / name for name in WEIGHTS}


def text(words: str) -> Segment:
    return text_segment(TOKENIZER, words)


def recipe(kind: str = "none", **changes) -> LMRecipe:
    default = LMRecipe(
        model=PLAIN if kind == "none" else LATENT,
        patcher=PATCHERS[kind],
        weights=WEIGHTS,
        pack=PackConfig(rows=2, units_per_row=200, tokens_per_row=700, buffer=32),
        train=TrainConfig(steps=3, lr=1e-3, warmup_steps=1, checkpoint_every=100, num_threads=1, device="cpu"),
    )
    return dataclasses.replace(default, **changes)


def realised(settings: LMRecipe, shards, folder) -> dict[str, int]:
    """What the steps that a budget gives really see, counted batch by batch as training does."""
    data = open_data(settings, shards, TOKENIZER, folder)
    patcher = settings.patcher.build()
    batches = num_steps(settings, data, patcher) * settings.train.accumulate
    loader = data.loader(settings, data.mixture(settings), patcher, total_batches=batches)
    counts = {"units": 0, "tokens": 0}
    for _ in range(batches):
        meta = loader.next_batch().meta
        counts = {key: counts[key] + meta[key] for key in counts}
    return counts


@pytest.mark.parametrize("budget", ["units", "tokens"])
@pytest.mark.parametrize("kind", ["none", "static", "curriculum", "bpe"])
def test_a_budget_is_kept_within_two_percent(kind, budget, shards, tmp_path):
    pieces = 40 if kind == "bpe" else None
    for amount, accumulate in ((60_000, 1), (110_000, 2)):
        settings = recipe("none" if kind == "bpe" else kind, speech_pieces=pieces, budget=budget, budget_amount=amount)
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, accumulate=accumulate))
        assert realised(settings, shards, tmp_path)[budget] == pytest.approx(amount, rel=0.02)


def test_equal_tokens_take_fewer_steps_with_patches_and_pieces(shards, tmp_path):
    def steps(kind, **changes):
        settings = recipe(kind, budget="tokens", budget_amount=60_000, **changes)
        return num_steps(settings, open_data(settings, shards, TOKENIZER, tmp_path), settings.patcher.build())

    assert steps("static") < steps("none", speech_pieces=40) < steps("none")


def test_a_run_trains_for_its_budget_and_a_second_one_agrees(shards, tmp_path):
    settings = recipe("static", budget="units", budget_amount=12_000)
    found = train_lm(settings, shards, TOKENIZER, tmp_path / "run", "a", tokenizer_dir=tmp_path / "speech")
    assert tokenizer_folder(tmp_path / "run", load_scorer(tmp_path / "run")[1]) == tmp_path / "speech"
    assert found["lm.a.units"] == pytest.approx(12_000, rel=0.04)  # 31 steps: half a step is 1.6 %
    assert found["lm.a.steps"] == num_steps(
        settings, open_data(settings, shards, TOKENIZER, tmp_path / "other"), settings.patcher.build()
    )
    timed = "lm.a.seconds"
    assert train_lm(settings, shards, TOKENIZER, tmp_path / "run", "a") | {timed: 0} == found | {timed: 0}


def test_bad_budgets_are_named():
    with pytest.raises(ValueError, match=r"budget_amount=5 has no meaning with budget='steps'"):
        recipe(budget_amount=5)
    with pytest.raises(ValueError, match=r"budget_amount=0 must be at least 1 with budget='tokens'"):
        recipe(budget="tokens")
    with pytest.raises(ValueError, match=r"speech_pieces=40 with patcher\.kind='curriculum'"):
        recipe("curriculum", speech_pieces=40)


def test_a_run_in_pieces_counts_base_tokens_and_scores_base_ids(shards, tmp_path):
    settings = recipe(speech_pieces=40)
    found = train_lm(settings, shards, TOKENIZER, tmp_path, "bpe")
    assert found["lm.bpe.tokens"] == found["lm.bpe.speech_tokens"] + found["lm.bpe.text_tokens"]
    compression = found["lm.bpe.patch_size"]
    assert 1.2 < compression < 4
    assert found["lm.bpe.units"] == pytest.approx(
        found["lm.bpe.text_tokens"] + found["lm.bpe.speech_tokens"] / compression
    )
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["num_speech"], run["speech_pieces"]) == (NUM_SPEECH, 40)

    scorer, loaded = load_scorer(tmp_path)
    assert isinstance(scorer, PiecedScorer)
    assert loaded.vocab.num_speech == 40
    spoken = utterance("u", np.random.default_rng(9))
    segment = Segment(modality="speech", ids_T=spoken.ids_T)
    (score,) = scorer.log_likelihoods([Request((text(spoken.text),), segment)])
    assert score.num_tokens == len(spoken.ids_T)
    (answer,) = scorer.generate([(segment,)], "speech", 7)
    assert len(answer) <= 7
    assert all(0 <= i < NUM_SPEECH for i in answer.tolist())

    other = recipe(speech_pieces=44)
    with pytest.raises(ValueError, match=r"24 ids and speech_pieces=40, this run has 24 ids and speech_pieces=44"):
        train_lm(other, shards, TOKENIZER, tmp_path, "bpe")
    (tmp_path / "second").mkdir()
    open_data(other, shards, TOKENIZER, tmp_path / "second")
    (tmp_path / BPE_FILE).write_bytes((tmp_path / "second" / BPE_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"put the file of its own run back"):
        load_scorer(tmp_path)


def test_spoken_shards_mark_pieces_for_a_patcher_of_pieces(shards, tmp_path):
    for units, marked in (("words", False), ("pieces", True)):
        settings = recipe("static", patcher=PatcherConfig(kind="aligned", units=units))
        source = open_data(settings, shards, TOKENIZER, tmp_path).sources["parallel"]
        ends = [s.unit_end_T for i in range(20) for s in source[i].segments if s.unit_end_T is not None]
        assert (UnitEnd.PIECE in np.concatenate(ends)) == marked
    static = open_data(recipe("static"), shards, TOKENIZER, tmp_path).sources["parallel"]
    assert static.in_epoch(0, 0).source == "parallel"


def test_another_text_tokenizer_is_refused(shards, tmp_path):
    other = TextTokenizer.train(["entirely different words"], 262)
    with pytest.raises(ValueError, match="make the shards again with this text tokenizer"):
        open_data(recipe(), shards, other, tmp_path)
    only_spoken = {"parallel": shards["parallel"]}  # no text in it: any tokenizer will do
    assert open_data(recipe(), only_spoken, other, tmp_path).run.num_text == other.size
