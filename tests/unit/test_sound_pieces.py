"""Pieces of recordings with their tokens: exact frames, whole blocks, the same batch from every place, broken ones counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.decoder.flow import FlowConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.stages.sound_pieces import PieceLoader, PiecesConfig, TokenSound, with_statistics
from speechquilt.train.objectives.velocity import flow_objective
from speechquilt.types import Waveform
from tests.unit.tiny_flow import tiny, tiny_config

RATE = 8000
FLOW: FlowConfig = tiny_config(mel=MelConfig(sample_rate=RATE, num_mels=6, fft_samples=256, hop=64, high_hz=4000.0))
CONFIG = PiecesConfig(rows=4, tokens=8)
TOKEN = round(RATE / FLOW.token_rate)


def speech(num_tokens: list[int], broken: tuple[int, ...] = (), extra: int = 0) -> TokenSound:
    """Noise; a recording's ids count up, so a piece tells where it is from."""

    def sound(i: int) -> Waveform:
        if i in broken:
            raise ValueError("cannot be read as audio: it is a picture")
        samples_S = np.random.default_rng(i).normal(size=num_tokens[i] * TOKEN + extra).astype(np.float32) * 0.1
        return Waveform(samples_S=samples_S, sample_rate=RATE)

    return TokenSound([str(i) for i in range(len(num_tokens))], [np.arange(n) % 20 for n in num_tokens], sound)


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.lists(st.integers(1, 19), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_piece_has_the_frames_of_the_whole_recording(num_tokens: list[int], seed: int) -> None:
    loader = PieceLoader(speech(num_tokens), CONFIG, FLOW, seed=seed)
    batch = loader.next_batch().validate(tiny(mel=FLOW.mel))
    mel, wholes = FLOW.mel.build(), [speech(num_tokens).sound(i) for i in range(len(num_tokens))]
    mels = [mel(torch.from_numpy(wav.samples_S)[None])[0] for wav in wholes]
    assert batch.ids_BT.shape == (4, 8)
    for b, (first, n, frames) in enumerate(zip(batch.first_B, batch.num_tokens_B, batch.num_frames_B)):  # type: ignore[arg-type]
        assert int(batch.ids_BT[b, 0]) == int(first) % 20
        start = FLOW.time.num_frames(int(first))
        same = [
            torch.allclose(batch.mel_BMF[b, :, :frames], whole_MF[:, start : start + frames], atol=1e-4)
            for whole_MF in mels
            if whole_MF.shape[1] >= start + frames
        ]
        assert any(same)
        assert int(frames) == FLOW.time.num_frames(int(first + n)) - start


def test_pieces_begin_at_blocks_end_anywhere_a_stream_does_and_reach_every_token() -> None:
    loader = PieceLoader(speech([30]), PiecesConfig(rows=64, tokens=8, truncated=0.5), FLOW)
    batch = loader.next_batch()
    assert batch.first_B is not None
    assert set(batch.first_B.tolist()) == {0, 4, 8, 12, 16, 20, 24}
    assert set(batch.num_tokens_B.tolist()) == {4, 6, 8}  # blocks of 4, and the recording's end
    whole = PieceLoader(speech([30]), PiecesConfig(rows=64, tokens=8, truncated=0.0), FLOW).next_batch()
    assert set(whole.num_tokens_B.tolist()) == {6, 8}


@pytest.mark.parametrize("threads", [0, 2])
def test_a_resumed_loader_goes_on_with_the_same_batches(threads: int) -> None:
    config = replace(CONFIG, threads=threads)
    one, other = (PieceLoader(speech([9, 20, 5]), config, FLOW, seed=3) for _ in range(2))
    for _ in range(3):
        one.next_batch()
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        a, b = one.next_batch(), other.next_batch()
        assert torch.equal(a.ids_BT, b.ids_BT)
        assert torch.equal(a.mel_BMF, b.mel_BMF)
    one.close()
    other.close()


def test_ranks_share_the_rows_of_one() -> None:
    whole = PieceLoader(speech([9, 20, 5]), CONFIG, FLOW, seed=3).next_batch()
    parts = [PieceLoader(speech([9, 20, 5]), CONFIG, FLOW, seed=3, rank=r, world_size=2).next_batch() for r in (0, 1)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.ids_BT, whole.ids_BT[rank::2])
        assert torch.equal(part.mel_BMF, whole.mel_BMF[rank::2])


def test_a_broken_recording_is_counted_and_replaced() -> None:
    loader = PieceLoader(speech([8] * 11, broken=(4,)), replace(CONFIG, rows=64), FLOW)
    assert len(loader.next_batch().ids_BT) == 64
    assert [(r.id, r.reason) for r in loader.rejects] == [("4", "cannot be read as audio")]
    many = PieceLoader(speech([8] * 5, broken=(0, 1)), replace(CONFIG, rows=64), FLOW)
    with pytest.raises(ValueError, match=r"of 5 recordings cannot be used, more than 10%.*mend"):
        many.next_batch()


@pytest.mark.parametrize(
    ("sound", "flow", "config", "message"),
    [
        (speech([8], extra=4 * TOKEN), FLOW, CONFIG, "does not fit its tokens"),
        (speech([0]), FLOW, CONFIG, "no recording has a speech token"),
        (speech([8]), replace(FLOW, codebook_size=5), CONFIG, r"ids 0 to 7; they must lie in 0\.\.4"),
        (speech([8]), FLOW, PiecesConfig(rows=4, tokens=6), "tokens=6 must be a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(sound: TokenSound, flow: FlowConfig, config: PiecesConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PieceLoader(sound, config, flow).next_batch()


def test_statistics_are_those_of_the_mel_and_move_nothing() -> None:
    loader = PieceLoader(speech([8, 16]), CONFIG, FLOW)
    scaled = with_statistics(FLOW, loader)
    first = loader.next_batch()
    assert torch.equal(first.mel_BMF, PieceLoader(speech([8, 16]), CONFIG, FLOW).next_batch().mel_BMF)
    values = torch.cat([m[:, :n].flatten() for m, n in zip(first.mel_BMF, first.num_frames_B.tolist())])
    assert abs((values.mean() - scaled.mel_mean) / scaled.mel_std) < 0.2
    loss, weight, _ = flow_objective(tiny(mel=FLOW.mel, mel_mean=scaled.mel_mean, mel_std=scaled.mel_std), first)
    assert torch.isfinite(loss / weight)
