"""A first guess of the mel: the best linear velocity before anything is learned, streaming as ever, and it is learned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.decoder import flow_folder
from speechquilt.decoder.mel_guess import MelGuessConfig, linear_velocity, phases
from speechquilt.train.objectives.velocity import flow_objective
from tests.unit.test_flow_objective import bands
from tests.unit.tiny_flow import filled, some_ids, tiny, tiny_config

GUESS = MelGuessConfig(width=16, num_layers=1, phases=3, missing_std=0.4)


@settings(max_examples=20, deadline=None)
@given(time=st.floats(0, 1), std=st.floats(0.1, 2.0))
def test_the_factor_of_the_point_is_the_regression_of_the_velocity_on_it(time: float, std: float) -> None:
    draw = torch.Generator().manual_seed(0)
    noise_N, missing_N = torch.randn(2, 200_000, generator=draw)
    missing_N = missing_N * std
    point_N, velocity_N = (1 - time) * noise_N + time * missing_N, missing_N - noise_N
    of_point, of_input, of_output = (x.item() for x in linear_velocity(torch.tensor([[[time]]]), std))
    slope = (point_N @ velocity_N / (point_N @ point_N)).item()
    assert of_point == pytest.approx(slope, abs=0.03 * (1 + abs(slope)))
    assert (of_input * point_N).std().item() == pytest.approx(1, abs=0.02)
    assert (velocity_N - of_point * point_N).std().item() == pytest.approx(of_output, abs=0.02 * (1 + of_output))


def test_what_an_untrained_estimator_makes_is_the_guess_and_noise_of_what_is_missing() -> None:
    """The estimator's last layer begins at zero, so the flow leads noise to deviation `missing_std` around the guess."""
    model = tiny_config(guess=GUESS, euler_steps=60, guidance=0.0, drop_chance=0.0).build().eval()
    ids_T = some_ids(120)
    mel_MF = model.decode_whole([ids_T], [3])[0]
    with torch.no_grad():
        frame_F = torch.arange(mel_MF.shape[1])[None]
        token_F = model.time.token_of(frame_F)
        states_BTD = model.tokens(ids_T[None], torch.tensor([len(ids_T)]))
        guess_MF = model.regulator(states_BTD, token_F, phases(model.time, frame_F, 3), None)[0]
    assert (mel_MF - guess_MF).std().item() == pytest.approx(0.4, rel=0.1)


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=3))
def test_it_streams_to_the_same_frames(cuts: list[int]) -> None:
    model, ids_T = tiny(guess=GUESS), some_ids(23)
    whole_MF = model.decode([ids_T], [5])[0]
    state, parts, edges = model.init_state(5), [], [0, *sorted(cuts), 23]
    for i in range(len(edges) - 1):
        mel_MF, state = model.step(ids_T[edges[i] : edges[i + 1]], state, final=i == len(edges) - 2)
        parts.append(mel_MF)
    assert torch.equal(torch.cat(parts, 1), whole_MF)


def test_phases_count_up_within_a_token() -> None:
    model = tiny(guess=GUESS)
    frame_F = torch.arange(200)[None]
    phase_F, token_F = phases(model.time, frame_F, 3)[0], model.time.token_of(frame_F)[0]
    assert set(phase_F.tolist()) == {0, 1, 2}
    same = token_F.diff() == 0
    assert bool((phase_F.diff()[same] >= 0).all())


def test_the_guess_is_learned_and_saved(tmp_path) -> None:
    torch.manual_seed(0)
    model = filled(tiny_config(guess=GUESS, drop_chance=0.0).build()).train()
    batch = bands(8, 0, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guesses = []
    for _ in range(40):
        loss, weight, scalars = flow_objective(model, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        guesses.append((scalars["guess"] / weight).item())
    assert guesses[-1] < 0.5 * guesses[0]
    flow_folder.save(model.eval(), tmp_path)
    assert torch.equal(flow_folder.load(tmp_path).decode([some_ids(9)], [0])[0], model.decode([some_ids(9)], [0])[0])


@pytest.mark.parametrize("field", ["width", "num_layers", "phases", "weight", "missing_std"])
def test_sizes_of_nothing_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0 must be above 0"):
        MelGuessConfig(**{field: 0})  # type: ignore[arg-type]
