"""One rule, two back ends: the dense mask of SDPA and the block mask of FlexAttention give the same attention.

On CPU FlexAttention runs uncompiled: it evaluates the rule everywhere and has no gradients. So the table of blocks, which
the kernels go by, is compared by itself; the test at the end compares kernels and gradients and needs CUDA.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from speechquilt.model.latent import LatentLMConfig, LocalStream, cross_rule, unit_docs
from speechquilt.model.patcher import StaticPatcher
from speechquilt.nn.attention import (
    Mask,
    MaskBackend,
    MaskRule,
    PlainCausal,
    attend,
    build_mask,
    causal_mask,
    causal_rule,
    mask_backend,
)
from speechquilt.nn.llama import LlamaConfig
from tests.dummies import VOCAB, make_batch, random_laid_out

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BLOCK = 128  # FlexAttention's block of queries and keys; lengths on both sides of it
HEADS, HEAD_WIDTH = 4, 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_docs(num_rows: int, num_tokens: int, seed: int, mean_length: int = 20) -> torch.Tensor:
    """`doc_BT`: documents of random lengths, other ones in each row."""
    begins_BT = torch.rand(num_rows, num_tokens, generator=seeded(seed)) < 1 / mean_length
    return begins_BT.long().cumsum(1)


def decoder_rule(doc_BT: torch.Tensor, seed: int, window: int, queries: int) -> tuple[MaskRule, int]:
    """What the patch decoder reads, with random units -> the rule and the number of keys."""
    draws_BT = torch.rand(doc_BT.shape, generator=seeded(seed)).to(doc_BT.device)
    begins_BT = torch.cat([torch.ones_like(doc_BT[:, :1]), doc_BT.diff(dim=1)], dim=1) > 0
    unit_BT = (begins_BT | (draws_BT < 0.4)).long().cumsum(1) - 1
    stream = LocalStream(
        index_BL=None, ids_BL=doc_BT, doc_BL=doc_BT, unit_BL=unit_BT, visible_BL=unit_BT + (draws_BT > 0.7).long()
    )
    num_units = int(unit_BT.max()) + 1
    return cross_rule(stream, unit_docs(doc_BT, unit_BT, num_units), queries, window), num_units * queries


def table_rule(seen_BTS: torch.Tensor) -> MaskRule:
    return lambda b, h, q, kv: seen_BTS[b, q, kv]


def build(rule: MaskRule, backend: MaskBackend, sizes: tuple[int, int, int], device: str = "cpu") -> Mask:
    with mask_backend(backend):
        return build_mask(rule, num_rows=sizes[0], num_queries=sizes[1], num_keys=sizes[2], device=device)


def random_qkv(sizes: tuple[int, int, int], kv_heads: int, seed: int) -> tuple[torch.Tensor, ...]:
    B, T, S = sizes
    shapes = ((B, HEADS, T, HEAD_WIDTH), (B, kv_heads, S, HEAD_WIDTH), (B, kv_heads, S, HEAD_WIDTH))
    generator = seeded(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@torch.no_grad()
def assert_back_ends_agree(rule: MaskRule, sizes: tuple[int, int, int], kv_heads: int = HEADS, seed: int = 0) -> None:
    q, k, v = random_qkv(sizes, kv_heads, seed)
    block, dense = build(rule, "flex", sizes), build(rule, "dense", sizes)
    assert isinstance(block, BlockMask)
    assert isinstance(dense, torch.Tensor)
    out = attend(q, k, v, block)
    torch.testing.assert_close(out, attend(q, k, v, dense), atol=1e-5, rtol=1e-4)
    assert_blocks_cover(block, dense)
    blind_BT = ~dense.any(-1)
    assert (out.transpose(1, 2)[blind_BT] == 0).all()


def assert_blocks_cover(block: BlockMask, dense_BTS: torch.Tensor) -> None:
    """A kernel computes exactly the blocks in which some query sees some key, unmasked where all see all."""
    B, T, S = dense_BTS.shape
    padded = torch.nn.functional.pad(dense_BTS, (0, -S % BLOCK, 0, -T % BLOCK))
    tiles = padded.view(B, -(-T // BLOCK), BLOCK, -(-S // BLOCK), BLOCK).transpose(2, 3).flatten(3)
    assert torch.equal(block.to_dense()[:, 0].bool(), tiles.any(-1))
    assert torch.equal(block.full_kv_num_blocks[:, 0], tiles.all(-1).sum(-1))


lengths = st.one_of(st.integers(1, 40), st.integers(BLOCK - 2, BLOCK + 2), st.integers(2 * BLOCK - 1, 2 * BLOCK + 40))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), lengths, st.sampled_from([None, 1, 7, 130]), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_causal_masks_agree(num_rows: int, num_tokens: int, window: int | None, kv_heads: int, seed: int) -> None:
    rule = causal_rule(random_docs(num_rows, num_tokens, seed), window)
    assert_back_ends_agree(rule, (num_rows, num_tokens, num_tokens), kv_heads, seed)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), lengths, st.sampled_from([1, 3, 200]), st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_decoder_cross_masks_agree(num_rows: int, num_tokens: int, window: int, queries: int, seed: int) -> None:
    rule, num_keys = decoder_rule(random_docs(num_rows, num_tokens, seed), seed, window, queries)
    assert_back_ends_agree(rule, (num_rows, num_tokens, num_keys), seed=seed)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), lengths, lengths, st.sampled_from([0.0, 0.02, 0.5, 1.0]), st.sampled_from([1, 2, 4]))
def test_random_masks_agree(num_rows: int, num_queries: int, num_keys: int, density: float, kv_heads: int) -> None:
    seen_BTS = torch.rand(num_rows, num_queries, num_keys, generator=seeded(num_keys)) < density
    seen_BTS[0, num_queries // 2] = False  # a query that sees nothing
    assert_back_ends_agree(table_rule(seen_BTS), (num_rows, num_queries, num_keys), kv_heads)


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_a_whole_stack_agrees(window: int | None) -> None:
    stack = LlamaConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=96, window=window).build()
    x_BTD, doc_BT = torch.randn(2, BLOCK + 9, 64, generator=seeded(0)), random_docs(2, BLOCK + 9, 1)
    expected = stack(x_BTD, stack.mask(doc_BT))
    with mask_backend("flex"):
        mask = stack.mask(doc_BT)
    assert isinstance(mask, BlockMask)
    torch.testing.assert_close(stack(x_BTD, mask), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text_path", ["decoder", "bypass"])
@torch.no_grad()
def test_a_whole_latent_model_agrees(text_path: str) -> None:
    stack = LlamaConfig(width=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=48)
    model = LatentLMConfig(
        vocab_size=VOCAB.size,
        num_text=VOCAB.num_text,
        global_=stack,
        local_width=16,
        encoder_layers=1,
        decoder_layers=1,
        local_heads=1,
        local_ffn=24,
        window=9,
        text_path=text_path,
    ).build()
    batch = make_batch([[random_laid_out(3 * row + i) for i in range(3)] for row in range(2)], StaticPatcher(3))
    expected = model(batch)
    with mask_backend("flex"):
        torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-4)


def test_forcing_a_back_end_ends_with_its_block() -> None:
    doc_BT = torch.tensor([[0, 0, 1]])
    with mask_backend("flex"):
        assert isinstance(causal_mask(doc_BT), BlockMask)
        with mask_backend("dense"):
            assert isinstance(causal_mask(doc_BT), torch.Tensor)
        with pytest.raises(RuntimeError, match="inside"), mask_backend("dense"):
            raise RuntimeError("inside")
        assert isinstance(causal_mask(doc_BT), BlockMask)
    assert isinstance(causal_mask(doc_BT), torch.Tensor)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_document_per_row_needs_no_tensor(num_tokens: int, kv_heads: int) -> None:
    """Rows may be numbered differently; a window as long as the row hides nothing."""
    sizes, doc_BT = (2, num_tokens, num_tokens), torch.tensor([[0], [5]]).expand(2, num_tokens)
    results = []
    for mask in (causal_mask(doc_BT), causal_mask(doc_BT, num_tokens), build(causal_rule(doc_BT), "dense", sizes)):
        inputs = [x.requires_grad_() for x in random_qkv(sizes, kv_heads, 0)]
        out = attend(*inputs, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        assert isinstance(mask, PlainCausal) == (len(results) < 3)
    for by_name, by_window, dense in zip(*results):
        torch.testing.assert_close(by_name, dense, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(by_window, dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("doc_T", "window"), [([0, 0, 0, 1], None), ([0, 0, 0, 0], 3), ([0, 1, 1, 1], 4)])
def test_a_document_edge_or_a_short_window_needs_the_tensor(doc_T: list[int], window: int | None) -> None:
    assert isinstance(causal_mask(torch.tensor([[0, 0, 0, 0], doc_T]), window), torch.Tensor)


class NoSync(TorchDispatchMode):
    """Fails at an operation for which the host must wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func.overloadpacket.__name__ in self.WAITS:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["flex", "dense"])
def test_building_a_mask_never_waits_for_the_device(backend: MaskBackend) -> None:
    doc_BT = random_docs(2, 150, 0)
    cross, num_keys = decoder_rule(doc_BT, 0, 4, 2)
    with NoSync():
        for rule, keys in ((causal_rule(doc_BT), 150), (causal_rule(doc_BT, 9), 150), (cross, num_keys)):
            build(rule, backend, (2, 150, keys))


def test_the_sync_detector_detects() -> None:
    with pytest.raises(AssertionError, match="makes the host wait"), NoSync():
        int(torch.ones(()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is compiled, and has gradients, on CUDA only")
@pytest.mark.parametrize("kind", ["causal", "windowed", "cross", "random"])
def test_compiled_kernels_agree_on_cuda_gradients_included(kind: str) -> None:
    for num_tokens in (300, 333):  # the second length is compiled with dynamic shapes
        doc_BT = random_docs(2, num_tokens, 0).cuda()
        rule, num_keys = causal_rule(doc_BT, 40 if kind == "windowed" else None), num_tokens
        if kind == "cross":
            rule, num_keys = decoder_rule(doc_BT, 0, 30, 2)
        elif kind == "random":
            rule = table_rule(torch.rand(2, num_tokens, num_keys, generator=seeded(0)).cuda() < 0.1)
        sizes = (2, num_tokens, num_keys)
        gradients = []
        for backend in ("flex", "dense"):
            inputs = [x.cuda().requires_grad_() for x in random_qkv(sizes, 2, 0)]
            out = attend(*inputs, build(rule, backend, sizes, "cuda"))
            gradients.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        for flex, dense in zip(*gradients):
            torch.testing.assert_close(flex, dense, atol=2e-3, rtol=2e-3)
