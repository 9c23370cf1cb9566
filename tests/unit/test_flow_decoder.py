"""Tokens to mel: whose frames are whose, what hears what, the flow's formulas, and bad input."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.decoder import flow as flow_module
from speechquilt.decoder.flow import FlowConfig
from speechquilt.decoder.matching import SIGMA_MIN, FlowDraws, frame_noise, on_path, warped
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.mel_stream import Window
from speechquilt.decoder.mel_time import MelTime
from speechquilt.decoder.token_states import by_distance, distances
from tests.unit.tiny_flow import MEL, some_ids, tiny, tiny_config

RELEASED = MelTime.of(12.5, MelConfig())
NUM_MELS = MEL.num_mels


# Whose frames


def test_frames_of_the_released_decoder() -> None:
    assert [RELEASED.num_frames(n) for n in (0, 1, 5, 10, 25, 64)] == [0, 6, 34, 68, 172, 441]  # spec 1, 3.1 and 3.3
    assert MelTime.of(25, MelConfig()).num_frames(10) == 34


@given(
    rate=st.sampled_from([6.25, 12.5, 25.0, 50.0, 12.3]),
    mel=st.sampled_from([MelConfig(), MelConfig(sample_rate=24_000), MelConfig(sample_rate=16_000, hop=200, fft_samples=800)]),
    token=st.integers(0, 50_000),
)  # fmt: skip
@settings(deadline=None)
def test_a_frame_belongs_to_the_token_that_sounds_when_it_begins(rate: float, mel: MelConfig, token: int) -> None:
    time = MelTime.of(rate, mel)
    exact_rate = Fraction(str(rate))
    begin_s = token / exact_rate
    first, stop = time.num_frames(token), time.num_frames(token + 1)
    assert first == begin_s * mel.sample_rate // mel.hop
    assert stop > first
    frames_F = torch.arange(first, stop + 1)
    for frame, owner in zip(frames_F.tolist(), time.token_of(frames_F).tolist()):
        assert owner / exact_rate <= Fraction(frame * mel.hop, mel.sample_rate) < (owner + 1) / exact_rate


def test_a_token_needs_a_frame() -> None:
    for rate in (0.0, -1.0, 100.0):
        with pytest.raises(ValueError, match=r"token_rate=.* must be above 0 and at most 86\.13"):
            FlowConfig(token_rate=rate)


# What hears what


def test_token_states_see_their_block_and_the_past() -> None:
    tokens = tiny(block_tokens=4).tokens
    ids_BT, num_B = some_ids(11)[None], torch.tensor([11])
    with torch.no_grad():
        before_BTM = tokens(ids_BT, num_B)
        for changed in range(11):
            other_BT = ids_BT.clone()
            other_BT[0, changed] = (other_BT[0, changed] + 1) % 20
            moved_T = (tokens(other_BT, num_B) - before_BTM)[0].abs().amax(1) > 1e-6
            first = changed // 4 * 4
            assert moved_T.tolist() == [t >= first for t in range(11)]


def test_token_states_do_not_depend_on_where_the_window_begins() -> None:
    """Relative positions: two blocks that see each other alone are the same in the middle of an utterance."""
    tokens = tiny(block_tokens=4).tokens
    ids_T = some_ids(12)
    with torch.no_grad():
        last_BTM = tokens(ids_T[None, 4:], torch.tensor([8]))
        again_BTM = tokens(torch.cat([ids_T[4:], ids_T[:4]])[None], torch.tensor([8]))  # what follows is padding
    torch.testing.assert_close(last_BTM, again_BTM[:, :8], rtol=1e-5, atol=1e-6)


def test_scores_of_distances_reach_their_keys() -> None:
    distance_RD = distances(4, 6, torch.zeros(()))
    query_HTK = torch.randn(1, 1, 4, 6)
    found_BHTT = by_distance(query_HTK @ distance_RD.T)
    for q in range(4):
        for k in range(4):
            angle_C = (q - k) * 10_000.0 ** -(torch.arange(0, 6, 2) / 6)
            sines_D = torch.stack([angle_C.sin(), angle_C.cos()], 1).flatten()
            assert found_BHTT[0, 0, q, k].item() == pytest.approx((query_HTK[0, 0, q] @ sines_D).item(), abs=1e-5)


def test_conditions_are_used() -> None:
    """Tokens, speaker and prompt each change the mel; without any, guidance has nothing to do."""
    model = tiny()
    prompt_MF = torch.randn(NUM_MELS, 13)
    ids_T, speaker_E = some_ids(8), torch.ones(5)
    plain = Window(ids_T, 0, prompt_MF[:, :0], 0, None)
    other_ids = Window(some_ids(8, seed=1), 0, prompt_MF[:, :0], 0, None)
    mels = model.generate(
        [plain, other_ids, Window(ids_T, 0, prompt_MF, 0, None), Window(ids_T, 0, prompt_MF[:, :0], 0, speaker_E)]
    )
    for mel_MF in mels[1:]:
        assert (mel_MF - mels[0]).abs().max() > 1e-2
    again_MF = model.generate([Window(ids_T, 0, prompt_MF[:, :0], 1, None)])[0]
    assert (again_MF - mels[0]).abs().max() > 1e-2


def test_a_window_is_the_same_wherever_the_frames_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are told their tokens by absolute time: a window that begins with token 8 has its frames from 55 on."""
    model = tiny()
    asked: list[tuple[int, int]] = []

    def noise(seed: int, first: int, stop: int, num_mels: int) -> torch.Tensor:
        asked.append((first, stop))
        return torch.zeros(num_mels, stop - first)

    monkeypatch.setattr(flow_module, "frame_noise", noise)
    token_BF: list[torch.Tensor] = []
    model.regulator.register_forward_pre_hook(lambda module, arguments: token_BF.append(arguments[1]))
    model.generate([Window(some_ids(3), 8, torch.zeros(NUM_MELS, 0), 0, None)])
    assert asked == [(55, 75)]
    assert token_BF[0][0].tolist() == [max(0, frame * 64 // 441 - 8) for frame in range(55, 75)]


def test_the_mel_is_made_in_the_flows_scale_and_given_in_its_own() -> None:
    """With another mean and deviation the same weights make the same flow of a prompt that was moved alike."""
    plain, moved = tiny(), tiny(mel_mean=-5.0, mel_std=2.0)
    prompt_MF = torch.randn(NUM_MELS, 20)
    ids_T = some_ids(8)
    plain_MF = plain.generate([Window(ids_T, 0, prompt_MF, 0, None)])[0]
    moved_MF = moved.generate([Window(ids_T, 0, 2 * prompt_MF - 5, 0, None)])[0]
    torch.testing.assert_close(moved_MF, 2 * plain_MF - 5, rtol=1e-4, atol=1e-4)


# The flow


def test_the_path_goes_from_noise_to_mel_at_constant_velocity() -> None:
    noise_BMF, mel_BMF = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    at = [on_path(noise_BMF, mel_BMF, torch.full((3,), time, dtype=torch.double)) for time in (0.0, 0.3, 1.0)]
    torch.testing.assert_close(at[0][0], noise_BMF)
    torch.testing.assert_close(at[2][0], mel_BMF + SIGMA_MIN * noise_BMF)
    torch.testing.assert_close(at[1][0], noise_BMF + 0.3 * at[1][1])
    torch.testing.assert_close(warped(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.0, 1 - 0.5**0.5, 1.0]))


def test_sampling_is_eulers_method_with_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out for one window, with the conditions' velocity and that of none from two calls."""
    model = tiny(euler_steps=3, guidance=0.7, temperature=0.5)
    ids_T = some_ids(9)
    got_MF = model.generate([Window(ids_T, 0, torch.zeros(NUM_MELS, 0), 4, None)])[0]
    point_BMF = 0.5 * frame_noise(4, 0, 62, NUM_MELS)[None]
    with torch.no_grad():
        token_BF = (torch.arange(62) * 64 // 441)[None]
        states_BMF = model.regulator(model.tokens(ids_T[None], torch.tensor([9])), token_BF, None)
        speaker_BMF = model.speaker.bias[None, :, None].expand(1, -1, 62)
        given_BCF = torch.cat([states_BMF, speaker_BMF, torch.zeros_like(states_BMF)], 1)
        times = 1 - torch.cos(torch.linspace(0, 1, 4) * torch.pi / 2)
        for now, then in pairwise(times):
            with_BMF = model.unet(torch.cat([point_BMF, given_BCF], 1), now[None], None)
            without_BMF = model.unet(torch.cat([point_BMF, 0 * given_BCF], 1), now[None], None)
            point_BMF = point_BMF + (then - now) * (1.7 * with_BMF - 0.7 * without_BMF)
    torch.testing.assert_close(got_MF, point_BMF[0], rtol=1e-4, atol=1e-4)


def test_the_training_error_is_that_of_the_velocity_over_valid_frames() -> None:
    model = tiny()
    ids_BT = torch.stack([some_ids(6), some_ids(6, seed=1)])
    num_tokens_B, num_frames_B = torch.tensor([6, 4]), torch.tensor([40, 25])
    mel_BMF = torch.randn(2, NUM_MELS, 40)
    draws = FlowDraws(torch.tensor([0.3, 0.8]), torch.randn(2, NUM_MELS, 40), torch.tensor([11, 0]), torch.tensor([True, True]))  # fmt: skip
    error_BF = model(
        ids_BT, num_tokens_B, mel_BMF, num_frames_B, torch.tensor([0, 0]), None, draws
    ).velocity_BF.detach()
    assert error_BF[1, 25:].abs().max() == 0
    # the second row by hand, alone
    mel_1MF, noise_1MF = mel_BMF[1:, :, :25], draws.noise_BMF[1:, :, :25]
    with torch.no_grad():
        token_BF = (torch.arange(25) * 64 // 441)[None]
        states_BMF = model.regulator(model.tokens(ids_BT[1:, :4], torch.tensor([4])), token_BF, None)
        speaker_BMF = model.speaker.bias[None, :, None].expand(1, -1, 25)
        time_B = warped(torch.tensor([0.8]))
        point_BMF = (1 - time_B) * noise_1MF + time_B * mel_1MF
        x_BCF = torch.cat([point_BMF, states_BMF, speaker_BMF, torch.zeros_like(states_BMF)], 1)
        expected_F = (model.unet(x_BCF, time_B, None) - (mel_1MF - noise_1MF)).square().mean(1)[0]
    torch.testing.assert_close(error_BF[1, :25], expected_F, rtol=1e-3, atol=1e-4)


def test_a_row_whose_conditions_are_dropped_hears_none() -> None:
    model = tiny()
    mel_BMF = torch.randn(1, NUM_MELS, 30)
    num_B, frames_B = torch.tensor([5]), torch.tensor([30])

    def error(kept: bool, ids_seed: int, prompt: int, speaker: float) -> float:
        draws = FlowDraws(
            torch.tensor([0.5]), torch.ones(1, NUM_MELS, 30), torch.tensor([prompt]), torch.tensor([kept])
        )
        with torch.no_grad():
            speaker_BE = torch.full((1, 5), speaker)
            speaker_BE[0, 0] = 1.0
            errors = model(
                some_ids(5, seed=ids_seed)[None], num_B, mel_BMF, frames_B, torch.tensor([0]), speaker_BE, draws
            )
        return errors.velocity_BF.sum().item()

    assert error(False, 0, 0, 0.0) == error(False, 1, 20, 3.0)
    kept = {error(True, *given) for given in ((0, 0, 0.0), (1, 0, 0.0), (0, 20, 0.0), (0, 0, 3.0))}
    assert len(kept) == 4


@given(seed=st.integers(0, 2**40), first=st.integers(0, 500), length=st.integers(0, 200), inside=st.data())
@settings(deadline=None)
def test_a_frame_has_one_noise_whoever_asks(seed: int, first: int, length: int, inside: st.DataObject) -> None:
    whole_MF = frame_noise(seed, first, first + length, 3)
    begin = inside.draw(st.integers(0, length))
    stop = inside.draw(st.integers(begin, length))
    assert torch.equal(whole_MF[:, begin:stop], frame_noise(seed, first + begin, first + stop, 3))
    assert length == 0 or not torch.equal(whole_MF, frame_noise(seed + 1, first, first + length, 3))


def test_noise_is_standard_normal_and_no_frame_repeats_another() -> None:
    noise_MF = frame_noise(3, 0, 4096, 8)
    assert abs(noise_MF.mean()) < 0.02
    assert abs(noise_MF.std() - 1) < 0.02
    assert len(noise_MF.T.unique(dim=0)) == 4096


# Bad input


@pytest.mark.parametrize(
    ("ids_T", "message"),
    [
        (torch.tensor([0, 20]), r"speech id 20 must lie in 0\.\.19"),
        (torch.tensor([-1, 3]), r"speech id -1 must lie in 0\.\.19"),
        (torch.zeros(1, 4, dtype=torch.long), r"shape \(1, 4\).*one row of whole numbers"),
        (torch.zeros(3), r"float32; one row of whole numbers"),
    ],
)
def test_ids_that_are_no_speech_tokens_are_refused(ids_T: torch.Tensor, message: str) -> None:
    model = tiny()
    for use in (lambda: model.step(ids_T, model.init_state()), lambda: model.decode_whole([ids_T], [0])):
        with pytest.raises(ValueError, match=message):
            use()


def test_short_utterances_have_their_frames() -> None:
    model = tiny()
    ids = [some_ids(n) for n in (0, 1, 2)]
    for mels in (model.decode(ids, [0, 1, 2]), model.decode_whole(ids, [0, 1, 2])):
        assert [mel_MF.shape for mel_MF in mels] == [(NUM_MELS, 0), (NUM_MELS, 6), (NUM_MELS, 13)]
    assert model.decode([], []) == []


def test_an_utterance_too_long_for_one_pass_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"1501 tokens is too long for one pass, at most 1500; decode it block by block"
    ):
        tiny().decode_whole([some_ids(1501)], [0])


def test_another_tokenizer_is_refused() -> None:
    config = tiny_config(tokenizer="0123456789ab")
    config.require_tokenizer("0123456789ab")
    with pytest.raises(ValueError, match=r"tokenizer ffff.*trained on those of 0123456789ab"):
        config.require_tokenizer("ffff")
    tiny_config().require_tokenizer("ffff")


def test_weights_that_are_not_finite_are_noticed() -> None:
    model = tiny()
    with torch.no_grad():
        model.unet.out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="the mel is not finite; the decoder's weights are damaged"):
        model.decode([some_ids(3)], [0])


def test_a_model_in_training_generates_nothing() -> None:
    with pytest.raises(ValueError, match=r"training mode, with dropout; call eval\(\)"):
        tiny().train().decode([some_ids(3)], [0])


def test_seeds_and_speakers_are_checked() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        model.init_state(-1)
    for speaker_E in (torch.zeros(4), torch.tensor([1.0, 2, 3, 4, torch.nan])):
        with pytest.raises(ValueError, match="speaker_width=5 finite numbers"):
            model.init_state(0, speaker_E)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_size": 0}, {"euler_steps": 0}, {"mel_std": 0.0}, {"drop_chance": 1.5}, {"prompt_share": -0.1},
        {"guidance": -1.0}, {"temperature": -0.1},
    ],
)  # fmt: skip
def test_configs_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}="):
        tiny_config(**changes)
