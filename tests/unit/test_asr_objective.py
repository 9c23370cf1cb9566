"""The tokenizer's objective: sums that add up over batches, and a model that learns through the bottleneck."""

from dataclasses import replace

import pytest
import torch

from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.train.codebook_watch import CodebookWatch
from speechquilt.train.objectives.asr import asr_objective
from speechquilt.types import IGNORE, AudioBatch

CONFIG = {
    "text_vocab_size": 5, "num_mels": 20, "width": 32, "num_heads": 2, "ffn_width": 64, "layers_below": 1,
    "layers_above": 1, "decoder_layers": 1, "block_frames": 16, "codebook_size": 16, "max_text_ids": 8,
}  # fmt: skip


def tones(num_rows: int, seed: int) -> AudioBatch:
    """Each id is a quarter second of its own tone; texts of 2 to 4 ids."""
    generator = torch.Generator().manual_seed(seed)
    length_B = torch.randint(2, 5, (num_rows,), generator=generator)
    text_BL = torch.randint(0, 5, (num_rows, 4), generator=generator)
    text_BL = text_BL.masked_fill(torch.arange(4) >= length_B[:, None], IGNORE)
    time_S = torch.arange(4000) / 16000
    wav_BLS = torch.sin(2 * torch.pi * 300 * (1 + text_BL[..., None]) * time_S) * 0.3
    return AudioBatch(wav_BS=wav_BLS.flatten(1), num_samples_B=length_B * 4000, text_BL=text_BL)


def part(batch: AudioBatch, rows: slice) -> AudioBatch:
    return AudioBatch(wav_BS=batch.wav_BS[rows], num_samples_B=batch.num_samples_B[rows], text_BL=batch.text_BL[rows])


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    model = SupervisedTokenizerConfig(**CONFIG).build().eval()
    batch = tones(6, 0)
    loss, weight, scalars = asr_objective(model, batch)
    parts = [asr_objective(model, part(batch, rows)) for rows in (slice(0, 2), slice(2, 6))]
    assert weight == (batch.text_BL != IGNORE).sum() == sum(p[1] for p in parts)
    assert loss.item() == pytest.approx(sum(p[0].item() for p in parts), rel=1e-4)
    for key in ("ctc", "attention", "commitment", "commitment_weight"):
        assert scalars[key].item() == pytest.approx(sum(p[2][key].item() for p in parts), rel=1e-4)
        assert scalars[key] > 0


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    weights = {"ctc_weight": 0.3, "commitment_weight": 4.0, "text_ids_per_s": 5.0}
    model = SupervisedTokenizerConfig(**CONFIG, **weights).build().eval()
    loss, _, scalars = asr_objective(model, tones(3, 1))
    ids_per_token = 5.0 / 12.5
    expected = 0.3 * scalars["ctc"] + 0.7 * scalars["attention"] + 4 * ids_per_token * scalars["commitment"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_commitment_is_a_mean_over_tokens_whatever_the_texts() -> None:
    model = SupervisedTokenizerConfig(**CONFIG).build().eval()
    batch = tones(6, 0)
    long_text_BL = batch.text_BL.clone()
    long_text_BL[0, :] = 1
    for text_BL in (batch.text_BL, long_text_BL):
        _, _, scalars = asr_objective(model, replace(batch, text_BL=text_BL))
        encoded = model(batch.wav_BS, batch.num_samples_B)
        each_N = torch.cat([row_T[:n] for row_T, n in zip(encoded.commitment_BT, encoded.num_tokens_B.tolist())])
        assert (scalars["commitment"] / scalars["commitment_weight"]).item() == pytest.approx(each_N.mean().item())


def test_without_ctc_there_is_no_head_and_every_parameter_learns() -> None:
    model = SupervisedTokenizerConfig(**CONFIG, ctc_weight=0.0, read_back_head="attention").build().train()
    loss, _, scalars = asr_objective(model, tones(3, 1))
    loss.backward()
    assert "ctc" not in scalars
    assert not [name for name in model.state_dict() if name.startswith("ctc")]
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_codebook_use_is_that_of_valid_tokens_and_of_the_running_counts() -> None:
    model = SupervisedTokenizerConfig(**CONFIG, vq_restart_threshold=0.5).build().eval()
    batch = tones(5, 3)
    ids_BT, num_tokens_B = model.encode(batch.wav_BS, batch.num_samples_B)
    model.quantizer.ema_count_K[:] = torch.tensor([3.0] * 10 + [0.1] * 6)  # mean 1.9
    _, _, scalars = asr_objective(model, batch)
    assert num_tokens_B.min() < ids_BT.shape[1]  # there is padding
    assert scalars["codes"] == len({i for row, n in zip(ids_BT.tolist(), num_tokens_B.tolist()) for i in row[:n]})
    assert scalars["dead"] == 6
    assert 10 < scalars["perplexity"] < 11
    assert scalars["codes_weight"] == scalars["dead_weight"] == scalars["perplexity_weight"] == 1


def test_restarts_are_counted_once_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 tells what the quantiser did, the others add nothing; the trainer's sum over ranks is then the count."""
    model = SupervisedTokenizerConfig(**CONFIG, vq_decay=0.5, vq_restart_interval=1, vq_restart_threshold=0.9).build()
    _, _, scalars = asr_objective(model, tones(5, 3))
    assert scalars["total_restarts"] == model.quantizer.restarted > 0
    monkeypatch.setenv("RANK", "1")
    assert asr_objective(model, tones(5, 3))[2]["total_restarts"] == 0
    assert model.quantizer.restarted > 0


def error_rate(model: SupervisedTokenizer, batch: AudioBatch) -> float:
    """Share of rows that the CTC head does not read exactly from their tokens."""
    ids_BT, num_tokens_B = model.encode(batch.wav_BS, batch.num_samples_B)
    with torch.no_grad():
        states_BTD = model._upper(model.quantizer.decode(ids_BT), num_tokens_B)
    texts = [[i for i in row if i != IGNORE] for row in batch.text_BL.tolist()]
    return sum(a != b for a, b in zip(texts, model.ctc.greedy(states_BTD, num_tokens_B))) / len(texts)


def test_tokens_learn_to_carry_the_text() -> None:
    model = (
        SupervisedTokenizerConfig(**CONFIG, vq_warmup_updates=60, vq_decay=0.95, commitment_weight=0.2).build().train()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        loss, weight, scalars = asr_objective(model, tones(12, step))
        assert (scalars["codes"] > 0) == (scalars["perplexity"] > 0) == (step >= 60)
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert error_rate(model.eval(), tones(40, 1000)) < 0.5  # equal neighbours stay hard; untrained: 1.0


def test_a_collapse_is_named_while_it_happens() -> None:
    watch = CodebookWatch()
    assert watch({"codes": 0.0, "commitment": 0.0}) is None  # the warm-up
    assert watch({"codes": 300.0, "commitment": 0.2}) is None
    assert watch({"codes": 200.0, "commitment": 0.3}) is None
    assert "collapses: 140 codes in a batch, 300 before" in str(watch({"codes": 140.0, "commitment": 0.3}))
    assert "runs away" in str(watch({"codes": 290.0, "commitment": 0.7}))
