"""The rule that cuts long audio: cores without gap or overlap, margins as far as the clip goes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechquilt.tokenizer import windows
from speechquilt.tokenizer.windows import WindowRule, WindowState


@given(core=st.integers(1, 9), margin=st.integers(0, 12), context=st.integers(0, 8), num_tokens=st.integers(0, 60))
def test_windows_give_every_token_once_and_hear_its_surroundings(
    core: int, margin: int, context: int, num_tokens: int
) -> None:
    context = min(context, core - 1)
    rule = WindowRule(core=core, margin=margin, context=context)
    given_tokens = []
    for window in rule.windows(num_tokens):
        assert 1 <= window.last - window.first <= core
        assert window.last - max(window.first - context, 0) <= core, "no window is longer than the first"
        assert window.start == max(window.first - margin - context, 0)
        assert window.stop == min(window.last + margin, num_tokens)
        assert window.stop - window.first - 1 <= rule.lookahead_tokens
        given_tokens += range(window.first, window.last)
    assert given_tokens == list(range(num_tokens))


@given(
    core=st.integers(1, 5),
    margin=st.integers(0, 7),
    context=st.integers(0, 4),
    num_samples=st.integers(0, 90),
    cuts=st.lists(st.integers(0, 90), max_size=6),
)
def test_stream_hands_every_window_the_samples_of_its_clip(
    core: int, margin: int, context: int, num_samples: int, cuts: list[int]
) -> None:
    """A "token" is the sum of all that its window hears, so a wrong sample anywhere shows."""
    rule, per_token = WindowRule(core=core, margin=margin, context=min(context, core - 1)), 3
    wav_S = (torch.arange(num_samples, dtype=torch.float32) + 1) ** 2

    def encode(part_S: torch.Tensor) -> torch.Tensor:
        return part_S.sum().long() * 100 + torch.arange(-(-len(part_S) // per_token))

    expected = [
        encode(wav_S[w.start * per_token : w.stop * per_token])[w.first - w.start : w.last - w.start]
        for w in rule.windows(-(-num_samples // per_token))
    ]
    edges, state, ids = [0, *sorted(min(c, num_samples) for c in cuts), num_samples], WindowState(), []
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        final = i == len(edges) - 2
        args = (wav_S[start:stop], state, final, torch.device("cpu"))
        ids_T, state = windows.step(rule, per_token, encode, *args)
        ids.append(ids_T)
        assert len(state.wav_S) <= (core + 2 * margin) * per_token
    assert torch.equal(torch.cat(ids), torch.cat([torch.zeros(0, dtype=torch.long), *expected]))


def test_rules_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="core=0"):
        WindowRule(core=0)
    with pytest.raises(ValueError, match="margin=-1"):
        WindowRule(core=1, margin=-1)
    with pytest.raises(ValueError, match="context=4 must be at least 0 and less than core=4"):
        WindowRule(core=4, context=4)
