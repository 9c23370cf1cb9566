"""Blockwise generation: the same frames for every chunking, alone or among others, at a constant cost and a known delay."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.decoder.flow import FlowDecoder
from speechquilt.decoder.mel_stream import StreamConfig, StreamState, Window, faded
from tests.unit.tiny_flow import MEL, some_ids, tiny

MODEL = tiny()  # blocks of 4 tokens in the encoder
STREAMS = {
    "blocks of the encoder": StreamConfig(chunk_tokens=(4,), prompt_tokens=8),
    "smaller first blocks": StreamConfig(chunk_tokens=(1, 3, 4), prompt_tokens=4),
    "growing blocks that do not fit the encoder's": StreamConfig(chunk_tokens=(3, 5, 7), prompt_tokens=5),
    "no prompt": StreamConfig(chunk_tokens=(4,), prompt_tokens=0),
    "overlap": StreamConfig(chunk_tokens=(3, 4), prompt_tokens=6, overlap_tokens=2),
}


def with_stream(stream: StreamConfig, model: FlowDecoder = MODEL, **changes: Any) -> FlowDecoder:
    """The same weights, cut otherwise."""
    other = replace(model.config, stream=stream, **changes).build().eval()
    other.load_state_dict(model.state_dict())
    return other


MODELS = {name: with_stream(stream) for name, stream in STREAMS.items()}
MODELS["25 Hz"] = with_stream(StreamConfig(chunk_tokens=(6,), prompt_tokens=8), token_rate=25.0)


def stepped(model: FlowDecoder, ids_T: torch.Tensor, sizes: list[int], seed: int) -> list[torch.Tensor]:
    """The frames of every step, the last of which is final."""
    state, mels = model.init_state(seed), []
    parts = ids_T.split(sizes)
    for i, part_T in enumerate(parts):
        mel_MF, state = model.step(part_T, state, final=i == len(parts) - 1)
        mels.append(mel_MF)
    assert state.received == state.done == 0
    return mels


@pytest.mark.parametrize("kind", MODELS)
@given(cuts=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=6)
def test_every_chunking_gives_the_same_frames(kind: str, cuts: list[int], seed: int) -> None:
    model, ids_T = MODELS[kind], some_ids(sum(cuts), seed)
    whole_MF = model.decode([ids_T], [seed])[0]
    assert whole_MF.shape == (MEL.num_mels, model.time.num_frames(len(ids_T)))
    assert torch.equal(torch.cat(stepped(model, ids_T, cuts, seed), 1), whole_MF)
    assert torch.equal(torch.cat(stepped(model, ids_T, [*cuts, 0], seed), 1), whole_MF)  # `final` comes late


@pytest.mark.parametrize("kind", MODELS)
def test_many_sessions_in_one_batch_each_get_what_they_get_alone(kind: str) -> None:
    """They begin, stall and end at different times."""
    model = MODELS[kind]
    lengths, sizes = [13, 1, 7, 0, 22], [[3, 0, 10], [1, 0, 0], [0, 7, 0], [0, 0, 0], [9, 9, 4]]
    ids = [some_ids(n, seed=n) for n in lengths]
    states, mels = [model.init_state(i) for i in range(5)], [[] for _ in range(5)]
    for turn in range(3):
        parts = [ids_T.split(cut)[turn] for ids_T, cut in zip(ids, sizes, strict=True)]
        made, states = model.step_many(parts, states, [turn == 2] * 5)
        for mel, mel_MF in zip(mels, made, strict=True):
            mel.append(mel_MF)
    for i in range(5):
        alone_MF = model.decode([ids[i]], [i])[0]
        torch.testing.assert_close(torch.cat(mels[i], 1), alone_MF, rtol=1e-3, atol=2e-4)


def test_noise_and_speaker_belong_to_the_session() -> None:
    ids_T = some_ids(9)
    one_MF, same_MF, other_seed_MF, other_voice_MF = MODEL.decode([ids_T] * 4, [5, 5, 6, 5], [None, None, None, torch.ones(5)])  # fmt: skip
    torch.testing.assert_close(one_MF, same_MF, rtol=1e-4, atol=1e-5)
    for other_MF in (other_seed_MF, other_voice_MF):
        assert (one_MF - other_MF)[:, :10].abs().max() > 1e-2
        assert (one_MF - other_MF)[:, -10:].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["blocks of the encoder", "smaller first blocks", "overlap"])
def test_frames_come_as_soon_as_their_block_is_there_and_hear_no_more(kind: str) -> None:
    """One token at a time: frames come with the last token of a block. Later tokens change none of them."""
    model, ids_T = MODELS[kind], some_ids(17)
    stream = model.config.stream
    ends = [stream.chunk_tokens[0]]
    while ends[-1] < 17:
        ends.append(stream.end_of_chunk(ends[-1]))
    held = model.time.num_frames(stream.overlap_tokens)
    counts = torch.tensor([mel_MF.shape[1] for mel_MF in stepped(model, ids_T, [1] * 17 + [0], 0)]).cumsum(0)
    for received in range(1, 18):
        complete = max([end for end in ends if end <= received], default=0)
        assert counts[received - 1] == max(0, model.time.num_frames(complete) - held)
    assert counts[-1] == model.time.num_frames(17)
    assert model.delay_s == pytest.approx((4 + stream.overlap_tokens) / 12.5)
    assert model.first_delay_s == pytest.approx(stream.chunk_tokens[0] / 12.5)
    whole_MF = model.decode([ids_T], [0])[0]
    other_MF = model.decode([torch.cat([ids_T[:8], some_ids(9, seed=8)])], [0])[0]
    same = int(counts[7])
    assert torch.equal(whole_MF[:, :same], other_MF[:, :same])
    assert not torch.equal(whole_MF[:, same:], other_MF[:, same:])


def recorded(model: FlowDecoder, monkeypatch: pytest.MonkeyPatch) -> list[Window]:
    """The windows that this model generates from now on."""
    windows: list[Window] = []
    generate = model.generate

    def generated(given: list[Window]) -> list[torch.Tensor]:
        windows.extend(given)
        return generate(given)

    monkeypatch.setattr(model, "generate", generated)
    return windows


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_is_the_frames_that_were_given_in_their_places(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window holds the tokens of its place, as many as asked for, and is told all frames before its new ones."""
    model = with_stream(MODELS[kind].config.stream, MODELS[kind], token_rate=MODELS[kind].config.token_rate)
    stream, ids_T = model.config.stream, some_ids(30)
    windows = recorded(model, monkeypatch)
    whole_MF = model.decode([ids_T], [2])[0]
    done = 0
    for window in windows:
        end = min(30, stream.end_of_chunk(done))
        assert window.first % 4 == 0
        assert max(0, done - stream.prompt_tokens - 3) <= window.first <= max(0, done - stream.prompt_tokens)
        assert torch.equal(window.ids_T, ids_T[window.first : end])
        start = model.time.num_frames(window.first)
        known = max(0, model.time.num_frames(done) - model.time.num_frames(stream.overlap_tokens))
        assert start + window.mel_MF.shape[1] == known
        assert torch.equal(window.mel_MF, whole_MF[:, start:known])
        done = end
    assert done == 30


def test_an_hour_costs_the_same_per_block_and_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_stream(StreamConfig())
    largest = 0

    def generate(windows: list[Window]) -> list[torch.Tensor]:
        nonlocal largest
        largest = max(largest, *(len(w.ids_T) for w in windows))
        return [torch.zeros(MEL.num_mels, stop - first) for first, stop in map(model._frames, windows)]

    monkeypatch.setattr(model, "generate", generate)
    tokens = 45_000
    mel_MF, state = model.step(torch.zeros(tokens - 5, dtype=torch.long), model.init_state())
    assert largest == 30 + 10 + 2  # prompt and block, from the start of a block of 4 tokens
    assert mel_MF.shape[1] == model.time.num_frames(tokens - 10)
    assert len(state.ids_T) <= 42
    assert state.mel_MF.shape[1] <= model.time.num_frames(42)
    last_MF, _ = model.step(torch.zeros(5, dtype=torch.long), state, final=True)
    assert mel_MF.shape[1] + last_MF.shape[1] == 310_078 == model.time.num_frames(tokens)  # 45,000 * 441 / 64


def test_a_session_that_ended_begins_anew() -> None:
    ids_T, speaker_E = some_ids(6), torch.ones(5)
    first_MF, state = MODEL.step(ids_T, MODEL.init_state(3, speaker_E), final=True)
    again_MF, state = MODEL.step(ids_T, state, final=True)
    assert torch.equal(first_MF, again_MF)
    nothing_MF, _ = MODEL.step(ids_T[:0], state, final=True)
    assert nothing_MF.shape == (MEL.num_mels, 0)


def test_a_state_may_be_used_twice() -> None:
    """It is an argument and a result, and nothing in it is written."""
    ids_T = some_ids(12)
    _, state = MODEL.step(ids_T[:9], MODEL.init_state())
    kept = StreamState(**vars(state) | {"mel_MF": state.mel_MF.clone(), "ids_T": state.ids_T.clone()})
    once_MF, _ = MODEL.step(ids_T[9:], state, final=True)
    twice_MF, _ = MODEL.step(ids_T[9:], state, final=True)
    assert torch.equal(once_MF, twice_MF)
    assert torch.equal(state.mel_MF, kept.mel_MF)
    assert torch.equal(state.ids_T, kept.ids_T)


def test_a_fade_keeps_what_both_agree_on_and_goes_from_one_to_the_other() -> None:
    """Hamming's halves as they are would lift a constant by 6 to 8 %."""
    same_MF = torch.full((2, 34), -5.0)
    torch.testing.assert_close(faded(same_MF, torch.full((2, 68), -5.0)), torch.full((2, 68), -5.0))
    rising_F = faded(torch.zeros(1, 34), torch.ones(1, 68))[0]
    assert bool((rising_F[:34].diff() > 0).all())
    assert rising_F[0] < 0.1
    assert rising_F[33] > 0.9
    assert bool((rising_F[34:] == 1).all())
    window_F = torch.hamming_window(68, periodic=False)
    sum_F = window_F[:34] + window_F[34:]
    assert sum_F.min() == pytest.approx(1.06, abs=0.002)
    assert sum_F.max() == pytest.approx(1.08, abs=0.002)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_tokens": ()}, "chunk_tokens="),
        ({"chunk_tokens": (4, 0)}, "chunk_tokens="),
        ({"prompt_tokens": -1}, "prompt_tokens=-1"),
        ({"overlap_tokens": 10}, "less than the smallest"),
        ({"overlap_tokens": 5, "prompt_tokens": 4}, "at most prompt_tokens=4"),
    ],
)
def test_streams_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**changes)


def test_sessions_must_come_together() -> None:
    with pytest.raises(ValueError, match=r"1 runs of ids, 2 states and 1 of `final`"):
        MODEL.step_many([some_ids(1)], [MODEL.init_state(), MODEL.init_state()], [False])
