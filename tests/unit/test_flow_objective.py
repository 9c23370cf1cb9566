"""The flow's objective: sums that add up over batches, draws as configured, and a model that learns to use its tokens."""

from dataclasses import replace

import pytest
import torch

from speechquilt.decoder.flow import FlowDecoder
from speechquilt.decoder.matching import FlowDraws, draw_flow
from speechquilt.train.objectives.velocity import FlowBatch, flow_loss, flow_objective
from tests.unit.tiny_flow import MEL, tiny, tiny_config


def bands(num_rows: int, seed: int, model: FlowDecoder) -> FlowBatch:
    """Each id lights one band; utterances of 3 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens_B = torch.randint(3, 7, (num_rows,), generator=generator)
    ids_BT = torch.randint(0, MEL.num_mels, (num_rows, 6), generator=generator)
    num_frames_B = model.time.num_frames(num_tokens_B)
    token_F = model.time.token_of(torch.arange(int(num_frames_B.max())))
    mel_BMF = 2 * torch.nn.functional.one_hot(ids_BT[:, token_F], MEL.num_mels).float().mT - 0.5
    return FlowBatch(ids_BT=ids_BT, num_tokens_B=num_tokens_B, mel_BMF=mel_BMF, num_frames_B=num_frames_B)


def part(batch: FlowBatch, rows: slice) -> FlowBatch:
    return FlowBatch(
        ids_BT=batch.ids_BT[rows],
        num_tokens_B=batch.num_tokens_B[rows],
        mel_BMF=batch.mel_BMF[rows],
        num_frames_B=batch.num_frames_B[rows],
    )


def part_of_draws(draws: FlowDraws, rows: slice) -> FlowDraws:
    return FlowDraws(draws.time_B[rows], draws.noise_BMF[rows], draws.prompt_B[rows], draws.keep_B[rows])


def drawn(batch: FlowBatch, seed: int) -> FlowDraws:
    torch.manual_seed(seed)
    return draw_flow(batch.mel_BMF, batch.num_frames_B, prompt_chance=0.5, prompt_share=0.8, drop_chance=0.3)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    model = tiny()
    batch = bands(6, 0, model).validate(model)
    draws = drawn(batch, 1)
    assert 0 < int(draws.keep_B.sum()) < 6
    loss, weight, scalars = flow_loss(model, batch, draws)
    parts = [flow_loss(model, part(batch, rows), part_of_draws(draws, rows)) for rows in (slice(0, 2), slice(2, 6))]
    assert weight == batch.num_frames_B.sum() == sum(p[1] for p in parts)
    assert loss.item() == pytest.approx(sum(p[0].item() for p in parts), rel=1e-4)
    for key in scalars:
        assert scalars[key].item() == pytest.approx(sum(p[2][key].item() for p in parts), rel=1e-4)
    assert scalars["conditioned"] + scalars["unconditioned"] == pytest.approx(loss.item(), rel=1e-5)
    assert scalars["conditioned_weight"] + scalars["unconditioned_weight"] == weight


def test_padding_does_not_count() -> None:
    model = tiny()
    batch = bands(4, 0, model)
    draws = drawn(batch, 1)
    loss, _, _ = flow_loss(model, batch, draws)
    beyond_BF = torch.arange(batch.mel_BMF.shape[2]) >= batch.num_frames_B[:, None]
    assert beyond_BF.any()
    other = replace(
        batch,
        mel_BMF=batch.mel_BMF.masked_fill(beyond_BF[:, None], 100.0),
        ids_BT=batch.ids_BT.masked_fill(torch.arange(6) >= batch.num_tokens_B[:, None], 17),
    )
    assert flow_loss(model, other, draws)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_stretch_is_heard_as_decoding_hears_it() -> None:
    """Tokens 8 to 13 of an utterance: their frames are those of their places, 55 to 95, and not those of 0 to 5."""
    model = tiny()
    batch = replace(
        bands(2, 0, model),
        num_tokens_B=torch.tensor([6, 6]),
        first_B=torch.tensor([0, 8]),
        mel_BMF=torch.zeros(2, MEL.num_mels, 41),
        num_frames_B=torch.tensor([41, 41]),
    ).validate(model)
    token_BF: list[torch.Tensor] = []
    model.regulator.register_forward_pre_hook(lambda module, arguments: token_BF.append(arguments[1]))
    flow_loss(model, batch, drawn(batch, 0))
    assert token_BF[0][0].tolist() == [frame * 64 // 441 for frame in range(41)]
    assert token_BF[0][1].tolist() == [max(0, frame * 64 // 441 - 8) for frame in range(55, 96)]
    with pytest.raises(ValueError, match=r"first_B=\[0, 7\] must be multiples of block_tokens=4"):
        replace(batch, first_B=torch.tensor([0, 7])).validate(model)


def test_draws_are_those_of_the_spec() -> None:
    """Even times, prompts of 0 to 80 % in half of the items, no condition at all in a fifth."""
    torch.manual_seed(0)
    num_frames_B = torch.full((20_000,), 10)
    draws = draw_flow(torch.zeros(20_000, 1, 10), num_frames_B, prompt_chance=0.5, prompt_share=0.8, drop_chance=0.2)
    assert draws.time_B.min() >= 0
    assert draws.time_B.max() < 1
    assert draws.time_B.mean() == pytest.approx(0.5, abs=0.01)
    assert draws.keep_B.float().mean() == pytest.approx(0.8, abs=0.01)
    counts = torch.bincount(draws.prompt_B).float() / 20_000
    assert len(counts) == 9
    assert counts[0] == pytest.approx(0.5 + 0.5 / 9, abs=0.015)
    assert counts[1:] == pytest.approx(torch.full((8,), 0.5 / 9), abs=0.01)
    assert draws.noise_BMF.std() == pytest.approx(1, abs=0.01)


def test_the_generators_state_decides_what_is_drawn() -> None:
    """So a resumed run draws what the killed one would have."""
    model = tiny()
    batch = bands(4, 0, model)
    state = torch.get_rng_state()
    first = flow_objective(model, batch)[0]
    second = flow_objective(model, batch)[0]
    torch.set_rng_state(state)
    assert torch.equal(flow_objective(model, batch)[0], first)
    assert not torch.equal(first, second)


def test_a_batch_moves_whole() -> None:
    model = tiny()
    batch = replace(bands(2, 0, model), speaker_BE=torch.ones(2, 5), first_B=torch.tensor([0, 4]))
    moved = batch.to("meta")
    assert all(x.device.type == "meta" for x in vars(moved).values())
    assert bands(2, 0, model).to("meta").speaker_BE is None


def test_it_learns_and_its_tokens_are_what_it_learns_from() -> None:
    """A hundred steps: the right band is often the loudest, with other tokens another; conditions lower the loss."""
    torch.manual_seed(0)
    model = tiny_config(mel_mean=-0.2, mel_std=0.75, drop_chance=0.3, euler_steps=4).build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    last = []
    for step in range(100):
        loss, weight, scalars = flow_objective(model, bands(8, step, model))
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last.append(scalars)
    told, untold = (
        sum(s[name].item() for s in last[-30:]) / sum(s[f"{name}_weight"].item() for s in last[-30:])
        for name in ("conditioned", "unconditioned")
    )
    assert told < 0.85 * untold
    model.eval()
    ids_T = torch.arange(MEL.num_mels)
    band_F = model.time.token_of(torch.arange(model.time.num_frames(len(ids_T))))
    mel_MF, shuffled_MF = model.decode([ids_T, ids_T.flip(0)], [0, 0])
    assert (mel_MF.argmax(0) == band_F).float().mean() > 0.35  # chance is a sixth
    assert (shuffled_MF.argmax(0) == band_F).float().mean() < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mel_BMF": torch.zeros(2, 5, 41)}, r"mel_BMF has 5 bands; num_mels=6"),
        ({"ids_BT": torch.full((2, 6), 20)}, r"ids 20 to 20; they must lie in 0\.\.19"),
        ({"ids_BT": torch.full((2, 6), -100)}, r"ids -100 .* the padding too"),
        ({"num_frames_B": torch.tensor([3, 0])}, "a row without frames"),
        ({"speaker_BE": torch.zeros(2, 4)}, "speaker_BE has 4 numbers per row; speaker_width=5"),
        ({"num_tokens_B": torch.tensor([6, 2])}, r"row 1 has .* mel frames for 2 tokens, which last 13"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        replace(bands(2, 0, model), **change).validate(model)
