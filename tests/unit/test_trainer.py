"""The loop itself: sums divided once, what it refuses, how it stops, what it writes down."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from speechquilt import config as configs
from speechquilt.train import checkpoint, metrics
from speechquilt.train.metrics import Sums, read_metrics
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.surroundings import StopRequest
from speechquilt.train.trainer import Stopped, TrainConfig, Trainer
from speechquilt.types import IGNORE, Batch, Document, Segment
from speechquilt.vocab import Vocab
from tests.e2e import tiny_training
from tests.e2e.tiny_training import make, objective


def weights(run_dir):
    return checkpoint.load_tensors(checkpoint.latest(run_dir), "model")


def test_accumulation_is_one_large_batch(tmp_path):
    """Weights differ between the batches, so averaging their means would be something else."""
    many = make(tmp_path / "many", rows=2, accumulate=4, dropout=0.0)
    one = make(tmp_path / "one", rows=8, dropout=0.0)
    many_result, one_result = many.train(), one.train()
    for name, p in one.model.named_parameters():
        assert torch.allclose(p, many.model.get_parameter(name), rtol=2e-6, atol=2e-7), name
    assert many_result.totals == one_result.totals == {"total_rows": 160.0}
    for a, b in zip(read_metrics(tmp_path / "many"), read_metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_one_step_is_adamw_on_the_mean_loss(tmp_path):
    trainer = make(tmp_path, dropout=0.0, clip=0.5, steps=1, warmup_steps=1)
    reference, loader = tiny_training.TinyModel(0.0), tiny_training.ShuffledLoader()
    batch = loader.next_batch()
    loss, weight, _ = objective(reference, batch)
    (loss / weight).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim == d], "weight_decay": w} for d, w in ((2, 0.1), (1, 0))
    ]
    torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95)).step()
    result = trainer.train()
    for name, p in reference.named_parameters():
        assert torch.allclose(p, trainer.model.get_parameter(name), rtol=1e-5, atol=1e-7)
    line = read_metrics(tmp_path)[0]
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["loss"] == pytest.approx(float(loss.detach() / weight), rel=1e-6)
    assert result.scalars["loss"] == line["loss"]


def test_metrics_lines(tmp_path):
    """One line for step 1, every log_every-th and the last; totals never restart; means are of the window."""
    seen = []

    def recording(model, batch):
        result = objective(model, batch)
        seen.append([float(x.detach()) for x in (result[0], result[1], result[2]["one"], result[2]["one_weight"])])
        return result

    result = make(tmp_path, objective=recording, steps=10, log_every=4).train()
    lines = read_metrics(result.metrics_path)
    assert [line["step"] for line in lines] == [1, 4, 8, 10]
    assert [line["total_rows"] for line in lines] == [4.0, 16.0, 32.0, 40.0]
    assert result.totals == {"total_rows": 40.0}
    for first, line in zip((0, 1, 4, 8), lines):
        loss, weight, one, one_weight = np.sum(seen[first : line["step"]], axis=0)
        assert line["loss"] == pytest.approx(loss / weight)
        assert line["one"] == (pytest.approx(one / one_weight) if one_weight else None)
        assert line["rate"] > 0
    assert result.scalars == {k: lines[-1][k] for k in ("loss", "one", "logit")}


def test_a_finished_run_gives_its_model_and_its_result_again(tmp_path):
    first = make(tmp_path)
    result = first.train()
    again = make(tmp_path)
    repeated = again.train()
    assert (repeated.steps, repeated.scalars, repeated.totals) == (20, result.scalars, result.totals)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))
    assert not again.model.training
    assert not first.model.training


def spoil(step, value):
    calls = 0

    def spoilt(model, batch):
        nonlocal calls
        calls += 1
        loss, weight, scalars = objective(model, batch)
        return (loss * value if calls == step else loss), weight, scalars

    return spoilt


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path, value):
    with pytest.raises(ValueError, match=r"step 8: loss (nan|inf).*'items'.*lower lr.*step_00000005 is kept") as error:
        make(tmp_path, objective=spoil(8, value)).train()
    items = make(tmp_path / "other").loader
    expected = [items.next_batch().meta["items"] for _ in range(8)][-1]
    assert str(expected) in str(error.value)
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    assert read_metrics(tmp_path)[-1]["step"] == 4
    assert all(x.isfinite().all() for x in weights(tmp_path).values())


def test_only_the_spoilt_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match="step 1") as error:
        make(tmp_path, objective=spoil(2, math.nan), accumulate=3).train()
    assert str(error.value).count("items") == 1


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    def root(model, batch):
        loss, weight, scalars = objective(model, batch)
        return loss + (model.first.weight * 0).abs().sqrt().sum(), weight, scalars  # 0, with an infinite slope

    with pytest.raises(ValueError, match=r"step 1: loss \d.*gradient norm nan"):
        make(tmp_path, objective=root, checkpoint_every=1).train()
    assert checkpoint.latest(tmp_path) is None


def test_a_trainer_that_failed_starts_clean_or_not_at_all(tmp_path):
    early = make(tmp_path / "early", objective=spoil(3, math.nan))
    with pytest.raises(ValueError, match="step 3: loss nan"):
        early.train()
    with pytest.raises(ValueError, match="build model and Trainer anew"):
        early.train()
    calls = 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 14:  # the second batch of step 7: the gradients of the first are there
            raise KeyboardInterrupt
        return objective(model, batch)

    late = make(tmp_path / "late", objective=interrupted, accumulate=2)
    with pytest.raises(KeyboardInterrupt):
        late.train()
    late.train()
    make(tmp_path / "whole", accumulate=2).train()
    left, right = weights(tmp_path / "late"), weights(tmp_path / "whole")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_a_step_without_targets(tmp_path):
    def empty(model, batch):
        loss, weight, scalars = objective(model, batch)
        return loss * 0, weight * 0, scalars

    with pytest.raises(ValueError, match=r"step 1: .*nothing to predict"):
        make(tmp_path, objective=empty).train()


def test_one_micro_batch_without_targets_is_fine(tmp_path):
    calls = 0

    def sometimes_empty(model, batch):
        nonlocal calls
        calls += 1
        loss, weight, scalars = objective(model, batch)
        return (loss * 0, weight * 0, scalars) if calls % 2 else (loss, weight, scalars)

    assert make(tmp_path, objective=sometimes_empty, accumulate=2).train().steps == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(tmp_path, number):
    calls = 0

    def signalled(model, batch):
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), number)
        return objective(model, batch)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"after step 7.*run the same command again") as stopped:
        make(tmp_path / "cut", objective=signalled).train()
    assert stopped.value.step == 7
    assert signal.getsignal(number) == before
    assert checkpoint.latest(tmp_path / "cut").name == "step_00000007"
    make(tmp_path / "cut").train()
    make(tmp_path / "whole").train()
    left, right = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_a_second_signal_interrupts_at_once(tmp_path):
    def impatient(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return objective(model, batch)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, objective=impatient).train()


def test_under_torchrun_a_ctrl_c_arrives_twice():
    with StopRequest(patience_s=60) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        stop.patience_s = 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_config_cannot_go_on(tmp_path):
    make(tmp_path).train(stop_after=5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"lr=0.1 \(was 0.05\), steps=30 \(was 20\); set these back .*another run_dir"):
        make(tmp_path, lr=0.1, steps=30).train()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    make(tmp_path, log_every=3, checkpoint_every=2, keep_checkpoints=5).train()


def test_another_model_cannot_go_on(tmp_path):
    trainer = make(tmp_path)
    trainer.train(stop_after=5)
    model = nn.Sequential(trainer.model)
    with pytest.raises(ValueError, match="weights of another model than this Sequential"):
        Trainer(trainer.config, model, objective, trainer.loader, tmp_path).train()


def test_run_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: cannot create .*choose a writable folder"):
        make(tmp_path / "file" / "run")


def test_run_dir_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"run_dir: .* is not writable"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"accumulate": 0}, "accumulate=0 must be positive"),
        ({"warmup_steps": 30}, r"warmup_steps=30 must lie in 0\.\.steps=20"),
        ({"device": "cupboard"}, "device='cupboard' is not a device"),
    ],
)
def test_bad_values(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(tmp_path):
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        make(tmp_path, device="cuda")


def test_config_is_a_strict_config():
    config = TrainConfig(steps=10, lr=0.1)
    assert (
        configs.from_dict(TrainConfig, configs.to_dict(config) | {"dtype": "bfloat16", "num_threads": 2}).num_threads
        == 2
    )
    with pytest.raises(ValueError, match="did you mean warmup_steps"):
        configs.from_dict(TrainConfig, configs.to_dict(config) | {"warm_steps": 3})


def test_reserved_scalars_are_refused(tmp_path):
    def greedy(model, batch):
        loss, weight, _ = objective(model, batch)
        return loss, weight, {"lr": loss}

    with pytest.raises(ValueError, match="names a scalar 'lr'"):
        make(tmp_path, objective=greedy).train()


@pytest.mark.parametrize("state", [{"at": (1, 2)}, {"at": torch.zeros(2)}, {1: "int keys become strings"}])
def test_loader_state_must_survive_json(tmp_path, state):
    trainer = make(tmp_path)
    trainer.loader.state_dict = lambda: state
    with pytest.raises(ValueError, match="must be plain JSON data"):
        trainer.train()


def test_bfloat16_keeps_float32_weights(tmp_path):
    trainer = make(tmp_path, dtype="bfloat16", dropout=0.0)
    dtypes = set()
    trainer.model.second.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    result = trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert result.scalars["loss"] == pytest.approx(make(tmp_path / "b", dropout=0.0).train().scalars["loss"], rel=0.05)


def test_settings_are_put_back(tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    make(tmp_path, num_threads=before[0] + 1, steps=1, warmup_steps=0).train()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_progress_is_lines_in_a_log(tmp_path, capsys):
    make(tmp_path).train()
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert "tiny: step 20/20" in err
    assert "loss=" in err


# Sums and the metrics file


def test_sums_divide_by_their_own_weight():
    sums = Sums()
    for loss, weight, x, w in ((6.0, 2.0, 5.0, 0.0), (2.0, 2.0, 3.0, 4.0)):
        values = {"loss": loss, "weight": weight, "x": x, "x_weight": w, "y": 1.0, "total_z": 7.0}
        sums.add({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
    assert sums.means() == {"loss": 2.0, "x": 2.0, "y": 0.5}
    assert sums.read_totals() == {"total_z": 14.0}
    again = Sums()
    again.load_state_dict(json.loads(json.dumps(sums.state_dict())), torch.device("cpu"))
    assert again.state_dict() == sums.state_dict()


def test_metrics_file_is_cut_to_its_step(tmp_path):
    with metrics.MetricsFile(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    with metrics.MetricsFile(tmp_path, 2) as log:
        log.write({"step": 9})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 9}\n'


def test_metrics_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="training writes one"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


# Next-token prediction

VOCAB = Vocab(num_text=10, num_speech=8)


def text_and_speech_batch():
    document = Document(
        id="a",
        segments=(
            Segment(modality="text", ids_T=np.array([1, 2, 3])),
            Segment(modality="speech", ids_T=np.array([4, 5, 6, 7])),
        ),
        source="test",
    )
    ids_T = torch.from_numpy(VOCAB.lay_out(document).ids_T)
    ids_BT = functional.pad(ids_T, (0, 3), value=VOCAB.pad)[None]
    labels_BT = torch.full_like(ids_BT, IGNORE)
    labels_BT[0, : len(ids_T) - 1] = ids_T[1:]
    doc_BT = (torch.arange(ids_BT.shape[1]) >= len(ids_T)).long()[None]
    meta = {"tokens": len(ids_T), "speech_tokens": 4, "units": 9, "speech_units": 2, "unit_slots": 12}
    return Batch(ids_BT=ids_BT, labels_BT=labels_BT, doc_BT=doc_BT, meta=meta).validate()


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB.size, VOCAB.size, generator=draw))

    def forward(self, batch):
        return self.table[batch.ids_BT]


def test_next_token_sums():
    model, batch = Bigram(), text_and_speech_batch()
    loss, weight, scalars = NextTokenObjective(VOCAB, flops=lambda b: 2.0 * b.ids_BT.numel())(model, batch)
    log_p = model.table.log_softmax(-1)
    ids = batch.ids_BT[0].tolist()
    nats = {t: -float(log_p.detach()[ids[t], ids[t + 1]]) for t in range(10)}  # BOS TEXT 1 2 3 SPEECH 4 5 6 7 EOS
    text, speech = (1, 2, 3), (5, 6, 7, 8)
    assert float(weight) == 10
    assert float(loss.detach()) == pytest.approx(sum(nats.values()), rel=1e-6)
    assert float(scalars["text_loss"]) == pytest.approx(sum(nats[t] for t in text), rel=1e-6)
    assert float(scalars["speech_loss"]) == pytest.approx(sum(nats[t] for t in speech), rel=1e-6)
    rest = {k: float(v) for k, v in scalars.items() if k not in ("text_loss", "speech_loss")}
    assert rest == {
        "text_loss_weight": 3,
        "speech_loss_weight": 4,
        "total_tokens": 11,
        "total_speech_tokens": 4,
        "total_units": 9,
        "total_speech_units": 2,
        "total_flops": 28,
        "patch_size": 4,
        "patch_size_weight": 2,
        "text_patch_size": 7,
        "text_patch_size_weight": 7,
        "row_tokens": 11,
        "row_tokens_weight": 1,
        "row_units": 9,
        "row_units_weight": 1,
        "waste_tokens": 3,
        "waste_tokens_weight": 14,
        "waste_units": 3,
        "waste_units_weight": 12,
    }
    assert not any(x.requires_grad for x in scalars.values())


def test_next_token_needs_the_packers_counts():
    batch = text_and_speech_batch()
    del batch.meta["units"]
    with pytest.raises(ValueError, match="lacks units"):
        NextTokenObjective(VOCAB)(Bigram(), batch)


def test_rows_without_a_number_of_units_have_no_waste_of_units():
    batch = text_and_speech_batch()
    del batch.meta["unit_slots"]
    names = NextTokenObjective(VOCAB)(Bigram(), batch)[2]
    assert "waste_tokens" in names
    assert "waste_units" not in names


def test_next_token_trains(tmp_path):
    class OneBatch(tiny_training.ShuffledLoader):
        def next_batch(self):
            return text_and_speech_batch()

    config = TrainConfig(steps=30, lr=0.3, log_every=10, weight_decay=0.0, device="cpu", num_threads=1)
    result = Trainer(config, Bigram(), NextTokenObjective(VOCAB), OneBatch(), tmp_path).train()
    first = read_metrics(tmp_path)[0]
    assert result.scalars["speech_loss"] < 0.2 * first["speech_loss"]
    assert result.totals["total_tokens"] == 330
    packing = {"patch_size": 2, "text_patch_size": 1, "row_tokens": 11, "row_units": 9}
    packing |= {"waste_tokens": 3 / 14, "waste_units": 0.25}
    assert {key: first[key] for key in packing} == pytest.approx(packing)
    assert all(key in result.scalars for key in packing)
