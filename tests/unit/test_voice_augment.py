"""Changed voices: nothing at 0, tones move by the factor, powers add, only in training, seeded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.audio import SAMPLE_RATE, LogMel
from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.train.objectives.asr import asr_objective, drawn_place
from speechquilt.train.voice_augment import VoiceAugmentConfig, summed, warped
from tests.unit.test_asr_objective import CONFIG, tones


def tiny() -> SupervisedTokenizer:
    return SupervisedTokenizerConfig(**CONFIG).build()


def tone(hz: float) -> torch.Tensor:
    """Whisper's log-mel of half a second of a tone, `[1, M, F]`."""
    wav_S = 0.3 * np.sin(2 * np.pi * hz * np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE)
    return LogMel(mode="stream")(torch.from_numpy(wav_S)[None])


@settings(max_examples=25, deadline=None)
@given(hz=st.floats(400, 5000), factor=st.floats(0.8, 1.2))
def test_a_tone_moves_to_the_factor_times_its_frequency(hz: float, factor: float) -> None:
    moved, wanted = warped(tone(hz), torch.tensor([factor])), tone(hz * factor)
    assert abs(int(moved[0, :, 20].argmax()) - int(wanted[0, :, 20].argmax())) <= 1


def test_powers_are_added() -> None:
    a, b = torch.tensor(1e-3), torch.tensor(4e-3)
    scaled = [(power.log10() + 4) / 4 for power in (a, b, a + b)]
    assert torch.allclose(summed(scaled[0], scaled[1]), scaled[2], atol=1e-6)


def test_zero_changes_nothing_and_every_change_does_something() -> None:
    mel_BMF = torch.cat([tone(500), tone(3000)])
    nothing = VoiceAugmentConfig(warp=0, curve_db=0, noise_share=0)
    assert torch.allclose(nothing.build()(mel_BMF), mel_BMF, atol=1e-5)
    for change in (
        {"warp": 0.2, "curve_db": 0, "noise_share": 0},
        {"warp": 0, "curve_db": 6, "noise_share": 0},
        {"warp": 0, "curve_db": 0, "noise_share": 1},
    ):
        augment = VoiceAugmentConfig(**change).build()  # type: ignore[arg-type]
        torch.manual_seed(0)
        first, second = augment(mel_BMF), augment(mel_BMF)
        assert (first - mel_BMF).abs().max() > 0.02
        assert not torch.equal(first, second)  # the generator moved on
        torch.manual_seed(0)
        assert torch.equal(augment(mel_BMF), first)
        assert not torch.allclose(first[0] - mel_BMF[0], first[1] - mel_BMF[1], atol=1e-3)  # a row is changed by itself


def test_noise_lies_as_far_below_the_loudest_moment_as_asked() -> None:
    mel_BMF = tone(1000)
    noisy = VoiceAugmentConfig(warp=0, curve_db=0, noise_share=1, noise_db=(30, 30)).build()(mel_BMF)
    quietest = 40 * (noisy.amin() - mel_BMF.amax())
    assert quietest == pytest.approx(-30, abs=0.5)


def test_only_training_hears_other_voices_and_later_places() -> None:
    model, batch = tiny(), tones(3, 0)
    augments = [VoiceAugmentConfig(warp=0.3, curve_db=12).build()]
    torch.manual_seed(0)
    model.eval()
    plain = asr_objective(model, batch)[0].item()
    assert asr_objective(model, batch, augments, latest_s=1.0)[0].item() == plain
    model.train()
    assert asr_objective(model, batch, augments)[0].item() != asr_objective(model, batch)[0].item()


def test_a_batch_begins_anywhere_up_to_the_latest_place_that_holds_it() -> None:
    model = tiny()
    window = model.rule.core
    places = {drawn_place(model, 3 * model.token_samples, latest_s=2 / model.frame_rate) for _ in range(60)}
    assert places == {0, 1, 2}
    nearly_full = (window - 1) * model.token_samples
    assert {drawn_place(model, nearly_full, latest_s=30.0) for _ in range(40)} == {0, 1}
    assert drawn_place(model, (window + 5) * model.token_samples, latest_s=30.0) == 0


def test_a_later_place_is_other_positions_and_nothing_else() -> None:
    """The same as tables that begin so many rows later."""
    model, batch, later = tiny().eval(), tones(3, 0), 2
    encoded = model(batch.wav_BS, batch.num_samples_B, batch.text_BL, later)
    assert not torch.allclose(encoded.states_BTD, model(batch.wav_BS, batch.num_samples_B).states_BTD)
    with torch.no_grad():
        for table, rows in (
            (model.encoder.embed_positions.weight, later * model.config.pooling),
            (model.encoder.embed_positions2.weight, later),
        ):
            table.copy_(torch.roll(table, -rows, 0))
    moved = model(batch.wav_BS, batch.num_samples_B, batch.text_BL)
    assert encoded.ids_BT is not None
    assert moved.ids_BT is not None
    assert torch.equal(encoded.ids_BT, moved.ids_BT)
    assert torch.allclose(encoded.states_BTD, moved.states_BTD, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("warp", 0.5), ("warp", -0.1), ("curve_db", -1), ("noise_share", 1.5), ("noise_db", (40, 20))]
)
def test_settings_that_mean_nothing_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        VoiceAugmentConfig(**{field: value})  # type: ignore[arg-type]
