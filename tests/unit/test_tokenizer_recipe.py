"""The tokenizer's recipes: measuring on the way changes nothing, real corpora train end to end, costs are counted right."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speechquilt import audio
from speechquilt import config as configs
from speechquilt.cli import main
from speechquilt.commands.grammar import parse
from speechquilt.commands.train_tokenizer import PRESETS, TrainTokenizer
from speechquilt.recipes import defaults
from speechquilt.recipes import tokenizers as presets
from speechquilt.stages import cost
from speechquilt.stages import train_tokenizer as recipes
from speechquilt.stages.first_codebook import collect
from speechquilt.stages.held_out import read_held_out
from speechquilt.stages.speech_sources import SpeechSource
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.train import checkpoint
from speechquilt.train.objectives.asr import asr_objective
from speechquilt.train.spec_augment import SpecAugmentConfig
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import AudioBatch, Utterance
from tests.pages import ANYWHERE, DOCS, commands
from tests.parity.tiny_tokenizers import whisper
from tests.unit.test_asr_objective import CONFIG, tones
from tests.unit.test_speech_corpora import TEXT, TEXTS, CountingCorpus, noise, write_dataset, write_folder

MODEL = SupervisedTokenizerConfig(**CONFIG | {"text_vocab_size": TEXT.size, "max_text_ids": 64}, vq_warmup_updates=2)
TRAIN = TrainConfig(steps=7, lr=1e-3, log_every=1, checkpoint_every=3, num_threads=1, device="cpu")
RECIPE = TokenizerRecipe(model=MODEL, train=TRAIN, batch_seconds=3.0)


def held_out() -> list[Utterance]:
    return [CountingCorpus(3)[i] for i in range(3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SupervisedTokenizer.load(folder).state_dict()


def test_measuring_on_the_way_changes_nothing_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    rates = recipes.held_out_rates
    monkeypatch.setattr(recipes, "held_out_rates", lambda *a: (measured.append(1), rates(*a))[1])
    plain = train_tokenizer(RECIPE, TEXT, CountingCorpus(9), held_out(), tmp_path / "plain")
    assert not measured
    often = replace(RECIPE, evaluate_every=2, threads=1)
    found = train_tokenizer(often, TEXT, CountingCorpus(9), held_out(), tmp_path / "often")
    assert found == plain
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weight, weights(tmp_path / "often")[name]), name
    lines = read_held_out(tmp_path / "often")
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert all({"wer", "cer", "wer_attention", "cer_attention"} <= line.keys() for line in lines)
    train_tokenizer(often, TEXT, CountingCorpus(9), held_out(), tmp_path / "often")
    assert read_held_out(tmp_path / "often") == lines
    assert len(measured) == 5  # only the last step's again


def test_a_measurement_on_the_way_is_of_a_sample_that_is_evenly_spread() -> None:
    recordings = [Utterance(id=str(i), text="cat", audio=noise(0.1, 0)) for i in range(10)]
    assert [u.id for u in recipes.evenly(recordings, 4)] == ["0", "2", "5", "7"]
    assert recipes.evenly(recordings, 64) == recordings


@pytest.mark.parametrize(
    ("head", "ctc_weight", "readings"), [("ctc", 0.5, 2), ("attention", 0.5, 1), ("attention", 0.0, 1)]
)
def test_no_head_reads_the_same_twice(
    head: str, ctc_weight: float, readings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(MODEL, read_back_head=head, ctc_weight=ctc_weight, vq_warmup_updates=0).build(TEXT).eval()
    calls: list[str] = []
    read = SupervisedTokenizer._read
    monkeypatch.setattr(SupervisedTokenizer, "_read", lambda *a: (calls.append(a[-1]), read(*a))[1])
    rates = recipes.held_out_rates(model, held_out()[:1])
    assert set(rates) == {"wer", "cer", "wer_attention", "cer_attention"}
    assert len(calls) == readings
    calls.clear()
    found = recipes.measure_tokenizer(model, held_out())
    assert {"tokenizer.wer", "tokenizer.cer", "tokenizer.wer_attention"} <= found.keys()
    assert len(calls) == readings


def test_transcripts_come_back_in_order_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL.build(TEXT).eval()
    utterances = [
        Utterance(id=str(i), text="cat", audio=noise(s, i, rate=(16000, 8000)[i % 2]))
        for i, s in enumerate(np.random.default_rng(0).uniform(0.3, 2.0, 7))
    ]
    together = recipes.transcribe(model, utterances, "attention")
    monkeypatch.setattr(recipes, "HELD_OUT_BATCH_S", 0.5)
    assert recipes.transcribe(model, utterances, "attention") == together
    assert len(set(together)) > 1


def test_corpora_of_two_kinds_train_at_a_ratio(tmp_path: Path) -> None:
    for name in ("folder", "set", "test"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "folder")
    write_folder(tmp_path / "test")
    write_dataset(tmp_path / "set")  # skips here without the extra
    import datasets

    cells = [{"bytes": (tmp_path / "set" / f"{i}.flac").read_bytes(), "path": None} for i in range(len(TEXTS))]
    table = datasets.Dataset.from_dict({"sound": cells, "said": TEXTS}).cast_column("sound", datasets.Audio())
    table.save_to_disk(tmp_path / "disk")
    supervised = {"kind": "folder", "path": str(tmp_path / "folder")}
    pseudo = {"kind": "dataset", "path": str(tmp_path / "disk"), "ratio": 3, "text_column": "said"}
    pseudo["audio_column"] = "sound"
    recipe = replace(RECIPE, threads=2, augment=SpecAugmentConfig(time_frames=20), evaluate_every=5)
    configs.save(TrainTokenizer(recipe=recipe), tmp_path / "settings.json")
    arguments = [
        "train",
        "tokenizer",
        f"--config={tmp_path / 'settings.json'}",
        f"--run-dir={tmp_path / 'run'}",
        "--sources",
        *(",".join(f"{k}={v}" for k, v in source.items()) for source in (supervised, pseudo)),
        "--held-out",
        f"kind=folder,path={tmp_path / 'test'}",
        "--held-out-recordings=2",
    ]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["tokenizer.wer_n"] == 2
    assert found["tokenizer.steps"] == TRAIN.steps
    assert len(read_held_out(tmp_path / "run")) == 2
    model = SupervisedTokenizer.load(tmp_path / "run")
    assert model.text_tokenizer is not None
    assert model.text_tokenizer.decode(model.text_tokenizer.encode("the cat sat")) == "the cat sat"


def test_a_run_says_what_is_missing(tmp_path: Path) -> None:
    here = SpeechSource(kind="folder", path=str(tmp_path))
    with pytest.raises(ValueError, match="speech is not set"):
        TrainTokenizer().train()
    with pytest.raises(ValueError, match="sources and held_out need at least one corpus"):
        TrainTokenizer(sources=(here,)).train()
    with pytest.raises(ValueError, match="speech='x' and sources or held_out are both set"):
        TrainTokenizer(speech="x", held_out=(here,)).train()
    with pytest.raises(ValueError, match="holds no audio"):
        TrainTokenizer(sources=(here,), held_out=(here,), run_dir=str(tmp_path / "run")).train()
    with pytest.raises(FileNotFoundError, match="give a manifest of cuts"):
        SpeechSource(kind="cuts", path=str(tmp_path / "cuts.jsonl.gz")).open()
    with pytest.raises(ValueError, match="preset='larg' is unknown; did you mean large"):
        TrainTokenizer.starting_from("larg")


def test_flags_change_the_preset_wherever_it_stands() -> None:
    """The preset's recipe with the other flags applied to it."""
    run = parse(TrainTokenizer, ["--batch-seconds", "100", "--preset", "large", "--start", "whisper"])
    recipe = replace(presets.LARGE, start="whisper", batch_seconds=100.0)
    assert run == TrainTokenizer(preset="large", recipe=recipe)
    assert parse(TrainTokenizer, []).recipe == defaults.TOKENIZER


def test_training_starts_from_whisper_with_its_text_tokenizer(tmp_path: Path) -> None:
    whisper(tmp_path / "whisper")
    model = replace(MODEL, layers_below=1, max_frames=80, block_frames=16, read_back_head="attention")
    recipe = replace(RECIPE, model=model, start=str(tmp_path / "whisper"), train=replace(TRAIN, steps=3))
    found = train_tokenizer(recipe, None, CountingCorpus(9), held_out(), tmp_path / "run")
    assert found["tokenizer.steps"] == 3
    trained = SupervisedTokenizer.load(tmp_path / "run")
    assert trained.config.decoder_prompt
    assert trained.config.layers_below == 1
    loader = recipes.new_loader(recipe, recipes.new_model(recipe, None), CountingCorpus(1))
    ids = loader.next_batch().text_BL[0].tolist()
    assert trained.text_tokenizer is not None
    assert ids == trained.text_tokenizer.encode(" the cat sat")
    with pytest.raises(ValueError, match="needs a text tokenizer"):
        recipes.new_model(RECIPE, None)


def test_the_one_gpu_recipe_runs_from_whisper_to_results(tmp_path: Path) -> None:
    """`--preset small` as a user gives it, on a tiny Whisper: bfloat16, threads, background checkpoints, WER on the way."""
    whisper(tmp_path / "whisper")
    (tmp_path / "speech").mkdir()
    write_folder(tmp_path / "speech")
    source = f"kind=folder,path={tmp_path / 'speech'}"
    sizes = ["layers_below=1", "max_frames=80", "block_frames=16", "context_frames=0", "codebook_size=16"]
    tiny = ["train.steps=5", "train.warmup_steps=1", "train.num_threads=1", "train.accumulate=1", "threads=1"]
    tiny += ["batch_seconds=3", "evaluate_every=2", f"start={tmp_path / 'whisper'}", "model.vq_warmup_updates=1"]
    settings = [f"--{s}" for s in (*tiny, *(f"model.{size}" for size in sizes))]
    common = [f"--run-dir={tmp_path / 'run'}", "--sources", source, "--held-out", source]
    assert main(["train", "tokenizer", "--preset=small", *settings, *common]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["tokenizer.steps"] == 5
    assert {"tokenizer.wer", "tokenizer.cer", "tokenizer.codebook_used", "tokenizer.perplexity"} <= found.keys()
    assert [line["step"] for line in read_held_out(tmp_path / "run")] == [2, 4, 5]
    assert SupervisedTokenizer.load(tmp_path / "run").config.decoder_prompt


def test_ranks_get_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL.build(TEXT)
    alone = recipes.new_loader(RECIPE, model, CountingCorpus(30))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = recipes.new_loader(RECIPE, model, CountingCorpus(30))
    for _ in range(8):
        alone.next_batch()
        assert torch.equal(alone.next_batch().wav_BS, second.next_batch().wav_BS)


def how_to_commands() -> list[list[str]]:
    """The arguments of every `train tokenizer` in the how-to, under torchrun or not."""
    found = commands((DOCS / "how-to" / "train-a-tokenizer.md").read_text(), [ANYWHERE, "sh"])
    return [words[2:] for words in found if words[:2] == ["train", "tokenizer"]]


def test_the_commands_of_the_how_to_are_settings_that_exist() -> None:
    commands = how_to_commands()
    assert len(commands) >= 9
    for command in commands:
        run = parse(TrainTokenizer, command)
        with torch.device("meta"):
            SupervisedTokenizer(run.recipe.model)


@pytest.mark.parametrize("name", PRESETS)
def test_shipped_sizes_build_and_survive_json(name: str) -> None:
    run = TrainTokenizer.starting_from(name)
    assert configs.from_dict(TrainTokenizer, configs.to_dict(run)) == run
    with torch.device("meta"):
        model = SupervisedTokenizer(run.recipe.model)
    assert model.frame_rate == (25.0 if name == "real" else 12.5)
    assert model.vocab_size == (256 if name == "toy" else 16384)


def test_the_large_recipe_is_the_papers() -> None:
    train, model = presets.LARGE.train, presets.LARGE.model
    assert (train.lr, train.beta1, train.beta2, train.weight_decay, train.clip) == (1e-5, 0.9, 0.98, 0.01, 1.0)
    assert train.warmup_steps == pytest.approx(0.02 * train.steps, abs=1)
    assert (train.schedule, train.min_lr_ratio) == ("cosine", 0.1)
    clips = presets.PAPER_RANKS * train.accumulate * presets.LARGE.batch_seconds / cost.CLIP_S
    assert clips == 4096
    assert (model.width, model.layers_below, model.layers_above, model.num_mels) == (1280, 16, 16, 128)
    assert presets.LARGE.augment is None
    assert (model.ctc_weight, model.read_back_head) == (0.0, "attention")
    assert (model.vq_decay, model.commitment_weight, model.vq_restart_interval) == (0.99, 2.5, 100)


def test_the_cost_is_audio_times_flops_over_speed() -> None:
    machine = cost.Machine(gpu=cost.GPUS["h100"], gpus=8, mfu=0.4)
    found = cost.tokenizer_training(presets.LARGE, presets.PAPER_RANKS, machine)
    assert found.amount / 3600 == pytest.approx(presets.PAPER_HOURS, rel=1e-3)
    per_second = cost.training_flops_per_s(
        presets.LARGE.model, clip_s=cost.CLIP_S, text_ids_per_s=presets.LARGE.model.text_ids_per_s
    )
    assert found.gpu_hours == pytest.approx(found.amount * per_second / (0.4 * 989e12 * 3600))
    assert cost.tokenizer_training(presets.one_gpu("small"), 1, machine).gpu_hours < 24
    alone = cost.tokenizer_training(presets.LARGE, 1, machine)
    assert alone.gpu_hours * presets.PAPER_RANKS == pytest.approx(found.gpu_hours)


@pytest.mark.parametrize(("pooling", "ctc_weight"), [(1, 0.5), (4, 0.5), (4, 0.0)])
def test_flops_are_those_that_torch_counts(pooling: int, ctc_weight: float) -> None:
    """What is not a matrix product (norms, softmax, CTC's sums) is not counted; the features are subtracted."""
    sizes = {"width": 64, "ffn_width": 96, "layers_below": 2, "layers_above": 2, "decoder_layers": 2}
    heads = {"ctc_weight": ctc_weight, "read_back_head": "attention"}
    config = SupervisedTokenizerConfig(
        **CONFIG | sizes | {"text_vocab_size": 70, "pooling": pooling, "causal": False, "max_frames": 400}, **heads
    )
    model = config.build().train()
    audio_BS, length_B = torch.randn(6, 16000) * 0.1, torch.full((6,), 16000)
    batch = AudioBatch(wav_BS=audio_BS, num_samples_B=length_B, text_BL=tones(6, 0).text_BL[:, :2])
    # The counter knows attention only as the products it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        asr_objective(model, batch)[0].backward()
    tokens = -(-16000 // model.token_samples)
    mel = 2 * 2 * tokens * pooling * (audio.WINDOW // 2 + 1) * config.num_mels  # the filters, a constant matrix
    counted = counter.get_total_flops() / 6 - mel
    # Padded to whole tokens; the decoder reads two ids and the end.
    seconds = tokens * model.token_samples / 16000
    expected = seconds * cost.training_flops_per_s(config, clip_s=seconds, text_ids_per_s=3 / seconds)
    assert counted == pytest.approx(expected, rel=0.002)


FIRST_RUN = replace(
    RECIPE,
    model=replace(MODEL, vq_warmup_updates=0),
    first=replace(TRAIN, steps=4, seed=1),
    vectors_per_code=4,
    lower_lr=0.1,
)


def test_a_first_run_leaves_codes_that_are_means_of_what_its_encoder_says(tmp_path: Path) -> None:
    train_tokenizer(FIRST_RUN, TEXT, CountingCorpus(9), held_out(), tmp_path)
    model = recipes.new_model(FIRST_RUN, TEXT)
    checkpoint.load_model(tmp_path / "first", model)
    assert not model.quantizer.active
    codebook_KD = load_file(tmp_path / "first" / "codebook.safetensors")["codebook"]
    loader = recipes.new_loader(replace(FIRST_RUN, train=FIRST_RUN.first), model, CountingCorpus(9))
    said_ND = collect(model, loader, 200)
    distance_N = torch.cdist(said_ND, codebook_KD).min(1).values
    assert distance_N.mean() < 0.7 * (said_ND - said_ND.mean(0)).norm(dim=1).mean()


def test_a_run_that_is_killed_in_either_part_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_tokenizer(FIRST_RUN, TEXT, CountingCorpus(9), held_out(), tmp_path / "whole")
    steps = Trainer.train_step

    def killed_at(seen: int) -> None:
        left = iter(range(seen))

        def step(trainer: Trainer) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            steps(trainer)

        monkeypatch.setattr(Trainer, "train_step", step)

    for seen in (2, 3, 5):  # in the first run, at its end, in the second after a checkpoint
        killed_at(seen)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(FIRST_RUN, TEXT, CountingCorpus(9), held_out(), tmp_path / "killed")
    monkeypatch.setattr(Trainer, "train_step", steps)
    assert train_tokenizer(FIRST_RUN, TEXT, CountingCorpus(9), held_out(), tmp_path / "killed") == whole
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weight, weights(tmp_path / "killed")[name]), name


def test_what_is_below_the_codebook_moves_at_its_own_rate(tmp_path: Path) -> None:
    moved = {}
    for share in (1.0, 0.1):
        recipe = replace(FIRST_RUN, lower_lr=share, train=replace(TRAIN, steps=1, weight_decay=0.0))
        train_tokenizer(recipe, TEXT, CountingCorpus(9), held_out(), tmp_path / str(share))
        before = recipes.new_model(recipe, TEXT)
        checkpoint.load_model(tmp_path / str(share) / "first", before)
        after = weights(tmp_path / str(share))
        moved[share] = {n: (after[n] - w).abs().max().item() for n, w in before.named_parameters()}
    for name, slow in moved[0.1].items():
        if name.startswith(("encoder.conv", "encoder.layers.0.")) and moved[1.0][name]:
            assert slow == pytest.approx(0.1 * moved[1.0][name], rel=0.05), name
    assert moved[0.1]["decoder.layer_norm.weight"] == pytest.approx(moved[1.0]["decoder.layer_norm.weight"], rel=0.05)


def test_two_starts_without_a_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="both begin without a codebook"):
        replace(RECIPE, first=TRAIN)
