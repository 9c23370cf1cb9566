"""The Llama stack: step and extend equal forward, rows are independent, windows and documents cut attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.nn.attention import attend, causal_mask
from speechquilt.nn.llama import LlamaConfig, LlamaStack, init_weights


def stack(window: int | None = None, kv_heads: int = 2) -> LlamaStack:
    return LlamaConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=kv_heads, ffn_width=48, window=window).build(
        seed=1
    )


def random_x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(model: LlamaStack, x_BTD: torch.Tensor) -> torch.Tensor:
    return model(x_BTD, model.mask(torch.zeros(x_BTD.shape[:2], dtype=torch.int64)))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_rows_stepping_at_different_times_equal_forward(window: int | None, kv_heads: int) -> None:
    model, x_BTD = stack(window, kv_heads), random_x(5, 9, 32)
    expected = causal(model, x_BTD)
    generator = torch.Generator().manual_seed(2)
    state, done_B = model.init_state(5, 9), torch.zeros(5, dtype=torch.int64)
    while (done_B < 9).any():
        active_B = (torch.rand(5, generator=generator) < 0.6) & (done_B < 9)
        y_BD, state = model.step(x_BTD[torch.arange(5), done_B.clamp(max=8)], state, active_B)
        assert (y_BD[~active_B] == 0).all()
        rows = active_B.nonzero()[:, 0]
        torch.testing.assert_close(y_BD[rows], expected[rows, done_B[rows]], atol=2e-5, rtol=1e-4)
        done_B += active_B


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
@torch.no_grad()
def test_ragged_extension_equals_forward(chunks: list[list[int]], windowed: bool) -> None:
    model, x_BTD = stack(3 if windowed else None), random_x(3, 16, 32)
    expected = causal(model, x_BTD)
    state, done = model.init_state(3, 16), [0, 0, 0]
    for chunk in chunks:
        x_new = torch.stack([x_BTD[b, torch.arange(d, d + 4).clamp(max=15)] for b, d in enumerate(done)])
        y_BTD, state = model.extend(x_new, torch.tensor(chunk), state)
        for b, n in enumerate(chunk):
            torch.testing.assert_close(y_BTD[b, :n], expected[b, done[b] : done[b] + n], atol=2e-5, rtol=1e-4)
            assert (y_BTD[b, n:] == 0).all()
            done[b] += n
        assert state.length_B.tolist() == done


@torch.no_grad()
def test_reset_row_starts_anew_and_leaves_the_others() -> None:
    model, x_BTD = stack(), random_x(2, 6, 32)
    expected = causal(model, x_BTD)
    state = model.init_state(2, 6)
    for t in range(3):
        _, state = model.step(x_BTD[:, t], state)
    state = state.reset(torch.tensor([True, False]))
    for t in range(3):
        y_BD, state = model.step(torch.stack([x_BTD[0, t], x_BTD[1, t + 3]]), state)
    torch.testing.assert_close(y_BD, torch.stack([expected[0, 2], expected[1, 5]]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_outgrown_cache_is_an_error_that_says_so() -> None:
    model = stack()
    state = model.init_state(1, 1)
    _, state = model.step(random_x(1, 32), state)
    with pytest.raises(ValueError, match="max_tokens=1"):
        model.step(random_x(1, 32), state)
    y_BD, _ = model.step(random_x(1, 32), state, torch.tensor([False]))  # a full row may wait
    assert (y_BD == 0).all()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8), st.booleans())
@torch.no_grad()
def test_steps_that_look_at_nothing_equal_forward(steps: list[list[bool]], windowed: bool) -> None:
    """Rows that do not grow ride along and leave no trace; the host's count may be more than the longest row."""
    model, x_BTD = stack(3 if windowed else None), random_x(3, 9, 32)
    expected = causal(model, x_BTD)
    state, done = model.init_state(3, 9), [0, 0, 0]
    for step, grows in enumerate(steps):
        x_new = torch.stack([x_BTD[b, d] if grows[b] else torch.full((32,), 7.0) for b, d in enumerate(done)])
        y_BTD, state = model.extend(x_new[:, None], torch.tensor(grows).long(), state, longest=step + 1)
        for b, d in enumerate(done):
            if grows[b]:
                torch.testing.assert_close(y_BTD[b, 0], expected[b, d], atol=2e-5, rtol=1e-4)
                done[b] += 1
    assert state.length_B.tolist() == done
    with pytest.raises(ValueError, match="max_tokens=9"):
        model.extend(x_BTD[:, :1], torch.ones(3, dtype=torch.int64), state, longest=10)


@torch.no_grad()
def test_moved_rows_go_on_where_they_were() -> None:
    model, x_BTD = stack(), random_x(4, 6, 32)
    expected = causal(model, x_BTD)
    state = model.init_state(4, 6)
    for t in range(3):
        _, state = model.step(x_BTD[:, t], state, torch.tensor([True, True, True, t < 2]))
    state = state.moved([3], [0], 3)  # row 0 is dropped
    y_BD, state = model.step(torch.stack([x_BTD[3, 2], x_BTD[1, 3], x_BTD[2, 3]]), state)
    torch.testing.assert_close(
        y_BD, torch.stack([expected[3, 2], expected[1, 3], expected[2, 3]]), atol=2e-5, rtol=1e-4
    )
    assert state.length_B.tolist() == [3, 4, 4]


def test_causal_mask_by_hand() -> None:
    mask = causal_mask(torch.tensor([[0, 0, 0, 1]]), window=2)[0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_attend_is_softmax_attention_and_zero_where_nothing_is_seen(kv_heads: int, queries: int) -> None:
    q, k, v = random_x(2, 4, queries, 8), random_x(2, kv_heads, 5, 8, seed=1), random_x(2, kv_heads, 5, 8, seed=2)
    q.requires_grad_()
    mask = torch.rand(2, queries, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, 0] = False
    k4, v4 = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    scores = (q @ k4.transpose(-1, -2) / 8**0.5).masked_fill(~mask[:, None], -torch.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ v4
    out = attend(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_init_is_seeded_truncated_and_scaled() -> None:
    a, b = stack().state_dict(), stack().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    num_blocks = stack().config.num_layers
    for name, weight in a.items():
        if weight.ndim == 2:
            std = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= (2 * num_blocks) ** -0.5
            assert weight.abs().max() <= 3 * std, name
            assert 0.9 * std < weight.std() < 1.05 * std, name


def test_config_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="num_heads=5"):
        LlamaConfig(width=32, num_layers=1, num_heads=5, num_kv_heads=5, ffn_width=8)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        LlamaConfig(width=32, num_layers=1, num_heads=4, num_kv_heads=3, ffn_width=8)


def test_embeddings_start_as_large_as_what_the_first_block_writes() -> None:
    embedding = torch.nn.Embedding(200, 64)
    init_weights(torch.nn.ModuleList([stack(), embedding]), torch.Generator().manual_seed(0))
    assert 0.95 < embedding.weight.std() < 1.05
