"""Any tokenizer flows through every command: folders of the real layout, tiny, from `tokenize` to `eval`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from speechquilt import audio, cli, config
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.stages.train_lm import LMRun, tokenizer_folder
from speechquilt.text import TextTokenizer
from speechquilt.types import Waveform
from tests.contracts import tiny_tokenizer
from tests.parity import tiny_checkpoints, tiny_tokenizers

WORDS = ["the", "cat", "sat", "on", "mat", "where", "does", "anna", "live"]
TINY_LM = ["--pack.rows=2", "--pack.units-per-row=128", "--pack.tokens-per-row=256", "--train.steps=2"]
TINY_LM += ["--train.warmup-steps=1", "--train.device=cpu"]
TINY_LLAMA = ["--llama.width=32", "--llama.num-layers=1", "--llama.ffn-width=64", "--data.rows=2", "--train.steps=3"]
TINY_LLAMA += ["--train.warmup-steps=1", "--train.device=cpu"]


@dataclass(frozen=True, kw_only=True)
class World:
    """Folders that a lab brings: recordings with word times, texts, items, tokenizers, and a base model."""

    root: Path
    speech: Path
    text: Path
    items: Path
    glm: Path
    hubert: Path
    base: Path
    other: Path


def sentence(seed: int, num_words: int) -> list[str]:
    return np.random.default_rng(seed).choice(WORDS, num_words).tolist()


def save_text_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json as Llama 3 has it: no prefixed space, special tokens at the end, a template that puts one first.

    A length at which to cut is left in it, as some publish it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(sentence(0, 400))], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|begin|>", "<|end|>")])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer.enable_truncation(8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world")
    speech, text = root / "speech", root / "text"
    speech.mkdir()
    text.mkdir()
    rows = []
    for i in range(8):
        wave = tiny_tokenizers.noise(i, 2.0 + 0.3 * i).numpy().clip(-1, 1)
        audio.save(speech / f"{i}.wav", Waveform(samples_S=wave, sample_rate=16000))
        words = [[word, 0.2 + 0.3 * k, 0.5 + 0.3 * k] for k, word in enumerate(sentence(i, 5))]
        rows.append({"file_name": f"{i}.wav", "text": " ".join(word for word, _, _ in words), "words": words})
    (speech / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(6):
        (text / f"{i}.txt").write_text(" ".join(sentence(100 + i, 60)))
    item = {"prompt": {"text": "the cat"}, "endings": [{"text": "sat on"}, {"audio": "speech/0.wav"}], "answer": 0}
    (root / "items.jsonl").write_text(json.dumps(item) + "\n")
    glm_config = tiny_tokenizers.GLM4_CONFIG
    glm_weights = tiny_tokenizers.glm4_voice_weights(glm_config)
    tiny_tokenizers.write_glm4_voice(root / "glm-4-voice-tokenizer", glm_config, glm_weights)
    tiny_tokenizers.hubert(root / "hubert")
    save_text_tokenizer(root / "base", 280)
    num_ids = TextTokenizer.load(root / "base" / "tokenizer.json").size
    tiny_checkpoints.saved(
        root / "base", "llama", vocab_size=num_ids + 6, bos_token_id=num_ids - 2, eos_token_id=num_ids - 1
    )
    save_text_tokenizer(root / "other", 270)
    return World(
        root=root,
        speech=speech,
        text=text,
        items=root / "items.jsonl",
        glm=root / "glm-4-voice-tokenizer",
        hubert=root / "hubert",
        base=root / "base",
        other=root / "other",
    )


def run(capsys, *words: object) -> str:
    """What a command prints; it must do its work."""
    assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    """What a command says that must not do its work."""
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def made_shards(world: World, tokenizer: Path, out: Path, capsys) -> list[str]:
    """Shards of speech, pairs, spoken texts and text with the base's vocabulary -> the words of `--data`."""
    run(capsys, "tokenize", world.speech, out, "--tokenizer", tokenizer, "--text-tokenizer", world.base, "--workers", 1)
    run(capsys, "text", world.text, out / "text", "--text-tokenizer", world.base, "--workers", 1)
    sources = ("speech", "asr", "tts", "parallel", "text")
    return ["--data", *(f"{name}={out / name}" for name in sources)]


def text_ids(folder: Path) -> list[list[int]]:
    shards = ShardFolder(folder)
    return [s.ids_T.tolist() for d in shards.in_order() for s in d.segments if s.modality == "text"]


def base_ids(world: World, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(world.base / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_glm4_voice_from_recordings_to_answers(world, tmp_path, capsys):
    """Plain and latent, with pairs and texts in the base's own ids; the released folder is remembered, not copied."""
    data = made_shards(world, world.glm, tmp_path / "shards", capsys)
    assert text_ids(tmp_path / "shards" / "text")[0] == base_ids(world, " ".join(sentence(100, 60)))
    assert text_ids(tmp_path / "shards" / "asr")[1] == base_ids(world, " " + " ".join(sentence(0, 5)))  # behind speech
    tokenizers = ["--tokenizer", world.glm, "--text-tokenizer", world.base / "tokenizer.json"]
    for kind in ("plain", "latent"):
        folder = tmp_path / "runs" / kind
        patcher = ["--patcher.kind", "none"] if kind == "plain" else ["--patcher.kind", "curriculum"]
        run(capsys, "train", "lm", "--kind", kind, *data, *tokenizers, *patcher, *TINY_LM, "--run-dir", folder)
        remembered = config.load(LMRun, folder / "run.json")
        assert not (folder / "tokenizer").exists()
        assert tokenizer_folder(folder, remembered).resolve() == world.glm.resolve()
        assert "accuracy" in run(capsys, "eval", folder, world.items, "--out", folder / "items.json")
        assert json.loads((folder / "items.json").read_text())["accuracy"]["n"] == 1


def test_hubert_units_from_recordings_to_answers(world, tmp_path, capsys):
    """Latent; then the shards are looked at with both tokenizers, and a folder that has moved is named by a flag."""
    data = made_shards(world, world.hubert, tmp_path / "shards", capsys)
    tokenizers = ["--tokenizer", world.hubert, "--text-tokenizer", world.base]
    folder = tmp_path / "lm"
    run(capsys, "train", "lm", *data, *tokenizers, *TINY_LM, "--run-dir", folder)
    assert "accuracy" in run(capsys, "eval", folder, world.items)
    assert "hours" in run(capsys, "inspect", tmp_path / "shards" / "speech", "--tokenizer", world.hubert)
    page = tmp_path / "asr.html"
    run(capsys, "inspect", tmp_path / "shards" / "asr", *tokenizers, "--page", page)
    assert " ".join(sentence(0, 5)) in page.read_text()
    noted = config.load(LMRun, folder / "run.json")
    (folder / "run.json").write_text(json.dumps(config.to_dict(noted) | {"tokenizer": "../moved"}))
    assert "--tokenizer FOLDER" in refused(capsys, "eval", folder, world.items)
    run(capsys, "eval", folder, world.items, "--tokenizer", world.hubert)
    assert "was trained on" in refused(capsys, "eval", folder, world.items, "--tokenizer", world.glm)


def test_a_base_model_reads_shards_of_every_kind_in_its_own_ids(world, tmp_path, capsys):
    """Text-to-token model for HuBERT units; speech, text and interleaved shards in the ids of a Llama; its warm start."""
    speaker, own_text = tmp_path / "text_to_token", tmp_path / "own"
    save_text_tokenizer(own_text, 265)
    units = ["--tokenizer", world.hubert]
    command = ["train", "text_to_token", "--speech", world.speech, *units, "--run-dir", speaker, *TINY_LLAMA]
    assert "--text-tokenizer" in refused(capsys, *command)
    said = run(capsys, *command, "--text-tokenizer", own_text)
    assert "text_to_token.rejected" in said
    assert "text_to_token.wer" not in said  # nobody can read these tokens back
    data = made_shards(world, world.hubert, tmp_path / "shards", capsys)
    interleaved = tmp_path / "shards" / "interleaved"
    command = ["interleave", world.text, interleaved, "--text-to-token", speaker, "--workers", 1]
    said = refused(capsys, *command, "--text-tokenizer", world.base, *units)
    assert "cannot be read back" in said
    assert "--tokenizer" in said
    run(capsys, *command, "--text-tokenizer", world.base)
    unspoken = next(d for d in ShardFolder(interleaved).in_order() if d.segments[0].modality == "text")
    number = int(unspoken.id.split(".")[0])
    ids = unspoken.segments[0].ids_T.tolist()
    text = " ".join(sentence(100 + number, 60))
    ends = [at + 1 for at, sign in enumerate(text) if sign == " "]  # the space in front of a spoken word is the text's
    assert ids in [base_ids(world, text[:end]) for end in [*ends, len(text)]]
    assert "begun with other settings" in refused(capsys, *command, "--text-tokenizer", world.other)
    data += [f"interleaved={interleaved}"]
    command = ["train", "lm", "--kind", "plain", "--patcher.kind", "none", *data, *units, *TINY_LM]
    command += ["--text-tokenizer", world.base, "--run-dir", tmp_path / "warm"]
    copied = tmp_path / "copied"  # the base's weights with another vocabulary
    tiny_checkpoints.saved(copied, "llama", vocab_size=300)
    assert "tokenizer.json is missing" in refused(capsys, *command, "--warm-start", copied)
    save_text_tokenizer(copied, 278)
    said = refused(capsys, *command, "--warm-start", copied)
    assert "warm_start" in said
    assert "made with the base's own" in said
    assert not list((tmp_path / "warm").glob("checkpoints*"))
    run(capsys, *command, "--warm-start", world.base)
    run(capsys, "export", tmp_path / "warm", tmp_path / "exported")
    command[command.index(tmp_path / "warm")] = tmp_path / "again"
    run(capsys, *command, "--warm-start", tmp_path / "exported")  # which knows the speech tokens too


def test_another_tokenizer_is_refused_before_anything_is_made(world, tmp_path, capsys):
    """The speech or the text tokenizer of some source is another one: in both trainings, with what to do."""
    data = made_shards(world, world.glm, tmp_path / "shards", capsys)
    for training in ("lm", "entropy"):
        command = ["train", training, *data, *TINY_LM, "--run-dir", tmp_path / "run"]
        said = refused(capsys, *command, "--tokenizer", world.hubert, "--text-tokenizer", world.base)
        assert "was made with the speech tokenizer" in said
        assert "--tokenizer" in said
        said = refused(capsys, *command, "--tokenizer", world.glm, "--text-tokenizer", world.other)
        assert "was made with the text tokenizer" in said
        assert "--text-tokenizer" in said
        assert "has no text tokenizer" in refused(capsys, *command, "--tokenizer", world.glm)
        assert not (tmp_path / "run").exists()
    said = refused(capsys, "inspect", tmp_path / "shards" / "asr", "--text-tokenizer", world.other)
    assert "was made with the text tokenizer" in said


def test_a_tokenizer_of_ours_keeps_its_own_text_or_takes_another(world, tmp_path, capsys):
    """As before without the flag; with it, pairs are in the other vocabulary. Its folder is copied into the run."""
    ours = tmp_path / "ours"
    tiny_tokenizer.build().save(ours)
    for name, flags, size in (
        ("own", [], tiny_tokenizer.TEXT.size),
        ("base", ["--text-tokenizer", world.base], TextTokenizer.load(world.base / "tokenizer.json").size),
    ):
        shards, folder = tmp_path / name / "shards", tmp_path / name / "lm"
        run(capsys, "tokenize", world.speech, shards, "--tokenizer", ours, *flags, "--workers", 1)
        assert ShardFolder(shards / "asr").info.num_text == size
        assert SpokenFolder(shards / "parallel").info.num_text == 0
        run(capsys, "text", world.text, shards / "text", "--tokenizer", ours, *flags, "--workers", 1)
        data = [f"{source}={shards / source}" for source in ("speech", "asr", "text")]
        run(capsys, "train", "lm", "--data", *data, "--tokenizer", ours, *flags, *TINY_LM, "--run-dir", folder)
        assert (folder / "tokenizer" / "config.json").is_file()
        run(capsys, "eval", folder, world.items)


def test_text_alone_trains_a_model_with_room_for_speech(world, tmp_path, capsys):
    """Shards without a speech tokenizer fit to any; the model has the rows of the one that the training names."""
    run(capsys, "text", world.text, tmp_path / "text", "--text-tokenizer", world.base)
    assert (ShardFolder(tmp_path / "text").info.num_speech, len(ShardFolder(tmp_path / "text"))) == (0, 6)
    command = ["train", "lm", "--data", f"text={tmp_path / 'text'}", "--tokenizer", world.glm]
    run(capsys, *command, "--text-tokenizer", world.base, *TINY_LM, "--run-dir", tmp_path / "lm")
    assert config.load(LMRun, tmp_path / "lm" / "run.json").num_speech == 24
    run(capsys, "eval", tmp_path / "lm", world.items)
    run(capsys, "inspect", tmp_path / "text", "--tokenizer", world.glm, "--text-tokenizer", world.base)


def test_text_jobs_go_on_and_name_mistakes(world, tmp_path, capsys):
    command = ["text", world.text, tmp_path / "text", "--text-tokenizer", world.base, "--slice-mib", "0.0003"]
    run(capsys, *command, "--workers", 2)
    assert "complete, skipped" in run(capsys, *command)
    assert "begun with other settings" in refused(capsys, *command[:-1], "4")
    assert "--text-tokenizer" in refused(capsys, "text", world.text, tmp_path / "none")
    assert "lies inside the corpus" in refused(capsys, "text", world.text, world.text / "out", *command[3:5])
    for folder, message in ((world.speech, "tokenizer.json"), (world.items, "is no text tokenizer")):
        assert message in refused(capsys, "text", world.text, tmp_path / "no", "--text-tokenizer", folder)
