"""A Llama folder with its own tokenizer, from shards in its vocabulary to an answer in transformers, by commands alone."""

from pathlib import Path

import numpy as np
import torch
import transformers

from speechquilt import config
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.model import saving
from speechquilt.stages.lm_recipe import LMRun
from speechquilt.stages.train_lm import load_scorer
from speechquilt.stages.training_documents import text_segment
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import network
from speechquilt.types import Document, Segment
from tests.e2e.test_seams import TINY_LM, World, made_shards, refused, run, world  # noqa: F401 (a fixture)

SPEAKER = ["--data.rows=2", "--train.steps=3", "--train.warmup-steps=1", "--train.device=cpu"]
ENDS = ["--bos-token", "<|end|>", "--eos-token", "<|end|>"]


def greedy_is_the_same(lm: Path, exported: Path) -> None:
    """Our scorer and transformers answer every prompt alike; the laid-out prompt has the layout of the run."""
    scorer, asked = load_scorer(lm)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    texts, vocab = TextTokenizer.load(lm / "text_tokenizer.json"), asked.vocab
    written = text_segment(texts, "the cat sat")
    spoken = Segment(modality="speech", ids_T=np.array([3, 1, 4], dtype=np.int32))
    ends, answered = [vocab.eos, vocab.marker("text"), vocab.marker("speech")], 0
    ids_V = torch.arange(vocab.size)
    for prompt in ((written,), (spoken,), (written, spoken)):
        for modality, allowed_V in (("text", vocab.is_text(ids_V)), ("speech", vocab.is_speech(ids_V))):
            (answer,) = scorer.generate([prompt], modality, max_tokens=12)
            start_T = vocab.lay_out(Document(id="", segments=prompt, source="")).ids_T[:-1]
            if prompt[-1].modality != modality:
                start_T = np.append(start_T, vocab.marker(modality))
            allowed = [*ids_V[allowed_V].tolist(), *ends]
            out_T = theirs.generate(
                torch.from_numpy(start_T)[None],
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=ends,
                prefix_allowed_tokens_fn=lambda row, ids, allowed=allowed: allowed,
            )[0, len(start_T) :]
            expected = vocab.to_model(modality, answer).tolist()
            assert [i for i in out_T.tolist() if i not in ends] == expected
            answered += len(expected)
    assert answered > 12


def test_a_base_learns_speech_goes_on_and_answers_in_transformers(world: World, tmp_path, capsys):  # noqa: F811
    units = ["--tokenizer", world.hubert]
    data = made_shards(world, world.hubert, tmp_path / "shards", capsys)
    speaker, interleaved = tmp_path / "text_to_token", tmp_path / "shards" / "interleaved"
    parallel = ["--data", f"parallel={tmp_path / 'shards' / 'parallel'}"]
    command = ["train", "text_to_token", *units, *SPEAKER, "--warm-start", world.base, *ENDS, "--run-dir", speaker]
    run(capsys, *command, *parallel)
    spoken = network.load(speaker)
    assert spoken.model.config.llama.width == 32  # the base's
    run(capsys, "interleave", world.text, interleaved, "--text-to-token", speaker, "--workers", 1)
    assert (
        ShardFolder(interleaved).info.text_fingerprint
        == ShardFolder(tmp_path / "shards" / "text").info.text_fingerprint
    )

    command = ["train", "lm", *data, f"interleaved={interleaved}", *units, "--text-tokenizer", world.base, *TINY_LM]
    warm = [
        *command,
        "--kind",
        "plain",
        "--warm-start",
        world.base,
        *ENDS,
        "--held-out",
        "0.3",
        "--evaluate-every",
        "1",
    ]
    run(capsys, *warm, "--run-dir", tmp_path / "warm")
    went_on = [*command, "--continue-from", tmp_path / "warm", "--run-dir"]
    run(capsys, *went_on, tmp_path / "longer")
    noted = config.load(LMRun, tmp_path / "longer" / "run.json")
    assert (noted.opening_marker, noted.continued_from) == (False, "../warm")
    assert saving.config_of(tmp_path / "longer") == saving.config_of(tmp_path / "warm")
    assert "is the run's own folder" in refused(capsys, *went_on, tmp_path / "warm")
    assert "kind=latent" in refused(capsys, *went_on, tmp_path / "no", "--kind", "latent")
    assert "other sizes" in refused(capsys, *went_on, tmp_path / "no", "--model.llama.num-layers", 2)

    run(capsys, "export", tmp_path / "longer", tmp_path / "exported")
    greedy_is_the_same(tmp_path / "longer", tmp_path / "exported")
    run(capsys, *command, "--kind", "plain", "--warm-start", tmp_path / "exported", "--run-dir", tmp_path / "again")
    assert not config.load(LMRun, tmp_path / "again" / "run.json").opening_marker  # as the export says


def test_the_speaker_is_told_what_it_reads(world: World, tmp_path, capsys):  # noqa: F811
    made_shards(world, world.hubert, tmp_path / "shards", capsys)
    command = ["train", "text_to_token", *SPEAKER, "--warm-start", world.base, "--run-dir", tmp_path / "run"]
    units = ["--tokenizer", world.hubert]
    assert "not neither" in refused(capsys, *command, *units)
    parallel = ["--data", f"parallel={tmp_path / 'shards' / 'parallel'}"]
    assert "not both" in refused(capsys, *command, *units, *parallel, "--speech", world.speech)
    assert "spoken texts shards are expected" in refused(
        capsys, *command, *units, "--data", f"x={tmp_path / 'shards' / 'asr'}"
    )
    assert "made with the speech tokenizer" in refused(capsys, *command, "--tokenizer", world.glm, *parallel)
    said = refused(capsys, *command, *units, *parallel, "--text-tokenizer", world.other)
    assert "made with the base's own" in said
    assert not (tmp_path / "run" / "text_to_token.json").exists()
    assert len(SpokenFolder(tmp_path / "shards" / "parallel")) == 8
