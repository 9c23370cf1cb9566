"""Carried context: what is heard across the edge of a window, and that nothing else changes. (Chunkings: tests/contracts.)"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechquilt.tokenizer import load
from speechquilt.tokenizer.emitters import TokenizerEmitter
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tokenizer.token_encoder import TokenEncoder
from speechquilt.tokenizer.whisper_sizes import RATES, preset
from tests.contracts.tiny_tokenizer import CONFIG, TEXT, build
from tests.parity.tiny_tokenizers import noise

WINDOW, CONTEXT = 30, 12  # tokens of the tiny tokenizer: 2.4 s, and three blocks of 0.32 s
FRAMES = 4 * CONTEXT
SETTINGS = {"deadline": None, "derandomize": True}


@pytest.fixture(scope="module")
def hard() -> SupervisedTokenizer:
    return build()


@pytest.fixture(scope="module")
def carried(hard: SupervisedTokenizer) -> SupervisedTokenizer:
    """The same weights and codes."""
    model = replace(CONFIG, context_frames=FRAMES).build(TEXT).eval()
    model.load_state_dict(hard.state_dict())
    return model


def pooled(model: TokenEncoder, wav_S: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model._pooled(wav_S[None], torch.tensor([len(wav_S)]))[0][0]


def tokens(model: TokenEncoder, wav_S: torch.Tensor) -> torch.Tensor:
    return model.encode(wav_S[None], torch.tensor([len(wav_S)]))[0][0]


def streamed(model: TokenEncoder, wav_S: torch.Tensor, chunk: int) -> torch.Tensor:
    state, ids = model.init_state(), []
    for part_S in wav_S.split(chunk):
        ids_T, state = model.step(part_S, state)
        ids.append(ids_T)
    return torch.cat([*ids, model.step(torch.zeros(0), state, final=True)[0]])


# Where a window ends, begins to carry, and ends again: one sample or token off is where this breaks.
EDGES = [WINDOW, WINDOW + 1, 2 * WINDOW - CONTEXT, 2 * WINDOW - CONTEXT + 1, 3 * WINDOW - 2 * CONTEXT]


@settings(max_examples=40, **SETTINGS)
@given(
    edge=st.sampled_from(EDGES),
    off=st.integers(-400, 400),
    chunk=st.integers(900, 60_000),
    causal=st.booleans(),
    context=st.sampled_from([0, 4, CONTEXT, 24]),
)
@example(edge=WINDOW, off=1, chunk=1280, causal=True, context=CONTEXT)
def test_around_the_edges_of_windows_streaming_equals_offline(
    edge: int, off: int, chunk: int, causal: bool, context: int
) -> None:
    model, wav_S = build(causal=causal, context_frames=4 * context), noise(edge, 5.0)[: edge * 1280 + off]
    assert torch.equal(streamed(model, wav_S, chunk), tokens(model, wav_S))


def test_a_clip_of_one_window_is_what_it_is_without_context(
    carried: SupervisedTokenizer, hard: SupervisedTokenizer
) -> None:
    wav_S = noise(2, 2.4)
    assert torch.equal(pooled(carried, wav_S), pooled(hard, wav_S))
    with torch.no_grad():
        states = [m(wav_S[None], torch.tensor([len(wav_S)])).states_BTD for m in (carried, hard)]
    assert torch.equal(*states)


def test_the_next_window_is_the_clip_that_begins_with_the_context(carried: SupervisedTokenizer) -> None:
    """A hand-made reference: tokens 30 to 47 are the last 18 of the clip from token 18 on."""
    wav_S = noise(3, 2 * 2.4)
    second_S = wav_S[(WINDOW - CONTEXT) * 1280 : (2 * WINDOW - CONTEXT) * 1280]
    expected = pooled(carried, second_S)[CONTEXT:]
    assert torch.equal(pooled(carried, wav_S)[WINDOW : 2 * WINDOW - CONTEXT], expected)


def test_context_is_heard_and_nothing_before_it(carried: SupervisedTokenizer, hard: SupervisedTokenizer) -> None:
    wav_S, other_S = noise(4, 3.6), noise(5, 3.6)
    heard_from = (WINDOW - CONTEXT) * 1280
    before_S = torch.cat([other_S[:heard_from], wav_S[heard_from:]])
    inside_S = torch.cat([wav_S[:heard_from], other_S[heard_from : heard_from + 1280], wav_S[heard_from + 1280 :]])
    after = slice(WINDOW, None)
    assert torch.equal(pooled(carried, wav_S)[after], pooled(carried, before_S)[after])
    assert (pooled(carried, wav_S)[after] - pooled(carried, inside_S)[after]).abs().max() > 1e-4
    assert torch.equal(pooled(hard, wav_S)[after], pooled(hard, inside_S)[after])


def test_the_asr_half_carries_the_same_context(carried: SupervisedTokenizer) -> None:
    """States after the edge depend on tokens of the context, and on none before."""
    ids_BT = tokens(carried, noise(6, 3.6))[None]
    num_tokens_B = torch.tensor([ids_BT.shape[1]])

    def states(changed: slice) -> torch.Tensor:
        other_BT = ids_BT.clone()
        other_BT[:, changed] = (other_BT[:, changed] + 1) % carried.vocab_size
        with torch.no_grad():
            return carried._upper(carried.quantizer.decode(other_BT), num_tokens_B)[:, WINDOW:]

    same = states(slice(0, 0))
    assert torch.equal(states(slice(0, WINDOW - CONTEXT)), same)
    assert (states(slice(WINDOW - CONTEXT, WINDOW - CONTEXT + 1)) - same).abs().max() > 1e-4


def test_hour_long_streams_keep_a_bounded_state(carried: SupervisedTokenizer) -> None:
    """Over many windows nothing accumulates: samples within context and a block, keys within a window."""
    state, sizes = carried.init_state(), []
    for i in range(60):
        _, state = carried.step(noise(i, 0.32), state)
        sizes.append((len(state.wav_S), max((k.shape[2] for k, _ in state.past), default=0)))
    assert max(samples for samples, _ in sizes) <= (FRAMES + 16) * 320
    assert max(frames for _, frames in sizes) <= 120
    assert sizes.count(sizes[-1]) > 2  # the same sizes come again: a cycle


def test_folders_from_before_keep_their_tokens_and_fingerprint(tmp_path: Path, hard: SupervisedTokenizer) -> None:
    hard.save(tmp_path)
    path = tmp_path / "config.json"
    keys = json.loads(path.read_text())
    assert keys.pop("context_frames") == 0
    path.write_text(json.dumps(keys))
    old = load(tmp_path)
    wav_S = noise(7, 5.0)
    assert isinstance(old, SupervisedTokenizer)
    assert torch.equal(tokens(old, wav_S), tokens(hard, wav_S))
    assert old.fingerprint == hard.fingerprint


def test_context_is_saved_and_part_of_the_fingerprint(
    tmp_path: Path, carried: SupervisedTokenizer, hard: SupervisedTokenizer
) -> None:
    carried.save(tmp_path)
    again, wav_S = load(tmp_path), noise(8, 5.0)
    assert isinstance(again, SupervisedTokenizer)
    assert torch.equal(tokens(again, wav_S), tokens(carried, wav_S))
    assert again.fingerprint == carried.fingerprint != hard.fingerprint


def test_the_part_that_makes_tokens_alone_makes_them(carried: SupervisedTokenizer) -> None:
    alone = carried.config.tokens_only().build().eval()
    alone.load_state_dict(carried.state_dict(), strict=False)
    wav_S = noise(9, 5.0)
    assert torch.equal(tokens(alone, wav_S), tokens(carried, wav_S))
    assert alone.fingerprint == carried.fingerprint


@pytest.mark.parametrize("keys", [{"context_frames": 8}, {"context_frames": 120}, {"context_frames": -16}])
def test_contexts_that_cannot_be_are_named(keys: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"context_frames={keys['context_frames']} must be a multiple of 16 frames"):
        replace(CONFIG, **keys)
    if keys["context_frames"] == 8:
        assert replace(CONFIG, causal=False, **keys).build(TEXT).context_samples == 8 * 320


def test_the_aligner_hears_it_too(carried: SupervisedTokenizer, hard: SupervisedTokenizer) -> None:
    assert (TokenizerEmitter(carried).context_frames, TokenizerEmitter(hard).context_frames) == (CONTEXT, 0)


@pytest.mark.parametrize("frame_rate", RATES)
def test_presets_carry_two_blocks_at_every_rate(frame_rate: float) -> None:
    config = preset("tiny", frame_rate)
    assert config.context_frames == 2 * config.block_frames
    rule = config.tokens_only().build().rule
    hour = round(3600 * frame_rate)
    encoded = sum(window.stop - window.start for window in rule.windows(hour)) / hour
    assert 1.14 < encoded < 1.16  # what the decision page says that it costs
