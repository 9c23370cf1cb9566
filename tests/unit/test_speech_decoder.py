"""Tokens -> sound as one: equal for every chunking, on disk, and refused with a vocoder of another mel."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.decoder.phase import PhaseVocoderConfig
from speechquilt.decoder.speech_decoder import SpeechDecoder, load
from tests.unit.tiny_flow import MEL, some_ids, tiny

VOCODER = PhaseVocoderConfig(mel=MEL, rounds=1, frames_ahead=1)


def tiny_decoder() -> SpeechDecoder:
    return SpeechDecoder(tiny(), VOCODER.build())


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=4))
def test_every_chunking_of_the_tokens_sounds_the_same(cuts: list[int]) -> None:
    decoder, ids_T = tiny_decoder(), some_ids(23)
    whole = decoder.speak([ids_T.numpy()], seeds=[3])[0].samples_S
    state, parts, edges = decoder.init_state(3), [], [0, *sorted(cuts), 23]
    for start, stop in pairwise(edges):
        wav_S, state = decoder.step(ids_T[start:stop], state)
        parts.append(wav_S)
    wav_S, state = decoder.step(ids_T[:0], state, final=True)
    streamed = torch.cat([*parts, wav_S]).clamp(-1, 1).numpy()
    assert np.array_equal(streamed, whole)
    assert len(whole) == decoder.flow.time.num_frames(23) * MEL.hop
    again, _ = decoder.step(ids_T, state, final=True)  # fresh, of the same seed
    assert np.array_equal(again.clamp(-1, 1).numpy(), whole)


def test_samples_come_within_the_declared_delay() -> None:
    decoder, ids_T = tiny_decoder(), some_ids(60)
    state, given_samples = decoder.init_state(), 0
    for count, token in enumerate(ids_T, start=1):
        wav_S, state = decoder.step(token[None], state)
        given_samples += len(wav_S)
        due_s = count / decoder.flow.config.token_rate - decoder.delay_s
        assert given_samples / decoder.sample_rate >= due_s - 1 / MEL.frame_rate


def test_saved_and_loaded_it_sounds_the_same(tmp_path: Path) -> None:
    decoder, ids_T = tiny_decoder(), some_ids(11).numpy()
    decoder.save(tmp_path / "decoder")
    read = load(tmp_path / "decoder")
    assert np.array_equal(read.speak([ids_T])[0].samples_S, decoder.speak([ids_T])[0].samples_S)


def test_a_vocoder_of_another_mel_is_refused() -> None:
    with pytest.raises(ValueError, match="num_mels=80 and not 6"):
        SpeechDecoder(tiny(), PhaseVocoderConfig().build())


def test_nothing_is_said_of_no_tokens() -> None:
    assert len(tiny_decoder().speak([np.zeros(0, np.int64)])[0].samples_S) == 0
