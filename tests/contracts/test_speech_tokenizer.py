"""What every SpeechTokenizer keeps: streaming == offline, bounded look-ahead, a row alone == the row in a batch.

Ours in its variants, the released GLM-4-Voice layout and HuBERT units go through the same tests.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speechquilt import protocols
from speechquilt.tokenizer import load, streaming
from speechquilt.tokenizer.token_encoder import TokenEncoder
from tests.contracts.tiny_tokenizer import build, spread_codes
from tests.parity import tiny_tokenizers
from tests.parity.tiny_tokenizers import noise

# derandomize: a token whose two nearest codes are equally near to the last bit may go either way; no luck in CI.
SETTINGS = {"deadline": None, "derandomize": True}


def glm4_voice(folder: Path) -> Any:
    """Windows of 2.4 s."""
    config = tiny_tokenizers.GLM4_CONFIG
    tokenizer = load(
        tiny_tokenizers.write_glm4_voice(folder, config, tiny_tokenizers.glm4_voice_weights(config, seed=1))
    )
    assert isinstance(tokenizer, TokenEncoder)
    return spread_codes(tokenizer)


def hubert(folder: Path, **changes: Any) -> Any:
    """Windows of 1.6 s with margins of 0.4 s."""
    tiny_tokenizers.hubert(folder, **changes)
    return load(folder)


# Windows of 2.4 s and blocks of 0.32 s that do not divide them: all edges occur in a few seconds of audio.
KINDS: dict[str, Callable[[Path], Any]] = {
    "ours": lambda folder: build(),
    "ours, context": lambda folder: build(context_frames=48),  # 0.96 s, three blocks
    "ours, 6.25 Hz": lambda folder: build(pooling=8, width=48),
    "ours, Whisper's features": lambda folder: build(features="whisper"),
    "ours, full attention": lambda folder: build(causal=False),
    "ours, context, full attention": lambda folder: build(causal=False, context_frames=44),
    "GLM-4-Voice": glm4_voice,
    "HuBERT": hubert,
    "HuBERT, normalised": lambda folder: hubert(folder, units={"normalize": True}, do_stable_layer_norm=True),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def token_samples(tokenizer: Any) -> int:
    return round(tokenizer.sample_rate / tokenizer.frame_rate)


def alone(tokenizer: Any, wav_S: torch.Tensor) -> torch.Tensor:
    ids_BT, num_tokens_B = tokenizer.encode(wav_S[None], torch.tensor([len(wav_S)]))
    assert num_tokens_B.tolist() == [-(-len(wav_S) // token_samples(tokenizer))]
    return ids_BT[0]


def streamed(tokenizer: Any, wav_S: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Tokens of the pieces between `cuts`; the audio of the last piece comes with `final`."""
    state = tokenizer.init_state()
    edges = [0, *sorted(c % (len(wav_S) + 1) for c in cuts), len(wav_S)]
    ids = []
    for i in range(len(edges) - 1):
        ids_T, state = tokenizer.step(wav_S[edges[i] : edges[i + 1]], state, final=i == len(edges) - 2)
        ids.append(ids_T)
    again_T, _ = tokenizer.step(wav_S, state, final=True)
    assert torch.equal(again_T, torch.cat(ids)), "after `final` the state is a fresh one"
    return torch.cat(ids)


def test_implements_the_protocol(tokenizer: Any) -> None:
    assert isinstance(tokenizer, protocols.SpeechTokenizer)
    assert tokenizer.frame_rate * token_samples(tokenizer) == 16000
    ids_T = alone(tokenizer, noise(0, 3.0))
    assert ids_T.dtype == torch.long
    assert len(ids_T.unique()) > 5, "the test model must not give one token for everything"
    assert ids_T.min() >= 0
    assert ids_T.max() < tokenizer.vocab_size


@settings(max_examples=20, **SETTINGS)
@given(
    seed=st.integers(0, 50),
    seconds=st.floats(0.001, 6.0),
    cuts=st.lists(st.integers(0, 100_000), max_size=12),
)
def test_streaming_equals_offline_for_every_chunking(
    tokenizer: Any, seed: int, seconds: float, cuts: list[int]
) -> None:
    wav_S = noise(seed, max(seconds, 1 / 16000))
    assert torch.equal(streamed(tokenizer, wav_S, cuts), alone(tokenizer, wav_S))


def test_streaming_one_sample_at_a_time(tokenizer: Any) -> None:
    wav_S = noise(3, 0.5)
    assert torch.equal(streamed(tokenizer, wav_S, list(range(len(wav_S)))), alone(tokenizer, wav_S))


def test_streaming_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting the left context of a block changes tokens; the comparison must see it."""
    monkeypatch.setattr(streaming, "CONTEXT_FRAMES", 0)
    model, wav_S = build(), noise(4, 2.0)
    assert not torch.equal(streamed(model, wav_S, []), alone(model, wav_S))


def test_a_token_leaves_when_its_look_ahead_is_there(tokenizer: Any) -> None:
    wav_S, state, given, got = noise(5, 6.0), tokenizer.init_state(), 0, 0
    for chunk_S in wav_S.split(1111):
        ids_T, state = tokenizer.step(chunk_S, state)
        given, got = given + len(chunk_S), got + len(ids_T)
        certain = given - round(tokenizer.lookahead_s * 16000)
        assert got >= certain // token_samples(tokenizer)
        assert got <= given // token_samples(tokenizer)
    assert got > 0


def test_state_is_bounded_and_not_changed_in_place(tokenizer: Any) -> None:
    state, largest = tokenizer.init_state(), 0
    for i in range(40):
        before = state.wav_S.clone()
        _, after = tokenizer.step(noise(i, 0.21), state)
        assert torch.equal(state.wav_S, before)
        state = after
        largest = max(largest, len(state.wav_S), *(k.shape[2] * 320 for k, _ in getattr(state, "past", ())))
    assert largest <= 2.4 * 16000


@settings(max_examples=12, **SETTINGS)
@given(seed=st.integers(0, 50), token=st.integers(0, 120))
def test_a_token_depends_on_nothing_beyond_the_look_ahead(tokenizer: Any, seed: int, token: int) -> None:
    wav_S = noise(seed, 5.0)
    token = min(token, len(alone(tokenizer, wav_S)) - 1)
    known = (token + 1) * token_samples(tokenizer) + round(tokenizer.lookahead_s * 16000)
    changed_S = torch.cat([wav_S[:known], noise(seed + 100, 5.0)[known:]])
    assert torch.equal(alone(tokenizer, wav_S)[: token + 1], alone(tokenizer, changed_S)[: token + 1])


@pytest.mark.parametrize("leak", [{"causal": False}, {"features": "whisper"}], ids=["attention", "features"])
def test_a_model_that_leaks_is_caught(leak: dict[str, Any]) -> None:
    """Whatever sees the whole window declares it; under the block's look-ahead it must fail."""
    model, honest = build(**leak), build()
    quiet_S = 0.01 * noise(6, 2.3)
    known = model.token_samples + round(honest.lookahead_s * 16000)
    changed_S = torch.cat([quiet_S[:known], noise(106, 2.3)[known:]])
    with torch.no_grad():
        before, _ = model._pooled(quiet_S[None], torch.tensor([len(quiet_S)]))
        after, _ = model._pooled(changed_S[None], torch.tensor([len(quiet_S)]))
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3
    assert model.lookahead_s > honest.lookahead_s


@settings(max_examples=10, **SETTINGS)
@given(lengths=st.lists(st.floats(0.01, 5.5), min_size=2, max_size=4), seed=st.integers(0, 50))
def test_a_row_alone_is_the_row_in_a_batch(tokenizer: Any, lengths: list[float], seed: int) -> None:
    wavs = [noise(seed + i, seconds) for i, seconds in enumerate(lengths)]
    num_samples_B = torch.tensor([len(w) for w in wavs])
    wav_BS = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=0.9)  # padding is not silence
    ids_BT, num_tokens_B = tokenizer.encode(wav_BS, num_samples_B)
    for b, wav_S in enumerate(wavs):
        assert torch.equal(ids_BT[b, : num_tokens_B[b]], alone(tokenizer, wav_S))
        assert not ids_BT[b, num_tokens_B[b] :].any()


def test_bad_audio_says_what_is_wrong(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="empty audio"):
        tokenizer.encode(torch.zeros(1, 0), torch.tensor([0]))
    with pytest.raises(ValueError, match="empty audio"):
        tokenizer.encode(torch.zeros(2, 400), torch.tensor([400, 0]))
    with pytest.raises(ValueError, match="NaN"):
        tokenizer.encode(torch.tensor([[0.1, float("nan")]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="finite"):
        tokenizer.step(torch.tensor([float("inf")]), tokenizer.init_state())
    with pytest.raises(ValueError, match="holds 2"):
        tokenizer.encode(torch.zeros(1, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="int16"):
        tokenizer.encode(torch.zeros(1, 2, dtype=torch.int16), torch.tensor([2]))


def test_nothing_streamed_is_no_token(tokenizer: Any) -> None:
    ids_T, _ = tokenizer.step(torch.zeros(0), tokenizer.init_state(), final=True)
    assert ids_T.tolist() == []


def test_digital_silence_and_a_single_sample_have_tokens(tokenizer: Any) -> None:
    """Silence has no loudest bin and no variance."""
    for wav_S in (torch.zeros(20_000), torch.ones(1)):
        ids_T = alone(tokenizer, wav_S)
        assert torch.equal(streamed(tokenizer, wav_S, [7]), ids_T)


@pytest.mark.parametrize("kind", ["ours", "GLM-4-Voice", "HuBERT"])
def test_a_folder_gives_the_same_tokens_and_fingerprint_twice_and_not_after_a_change(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind](tmp_path)
    if kind == "ours":
        made.save(tmp_path)
    first, second, wav_S = load(tmp_path), load(tmp_path), noise(11, 2.0)
    assert torch.equal(alone(first, wav_S), alone(second, wav_S))
    assert first.fingerprint == second.fingerprint
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if re.search(r"encoder\.layers\.0\.(self_attn|attention)\.q_proj\.bias", n))
    save_file(weights | {name: weights[name] + 1e-3}, path, metadata={"format": "pt"})
    assert load(tmp_path).fingerprint != first.fingerprint
