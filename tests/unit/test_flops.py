"""FLOPs: equal to what torch counts once the pairs a dense kernel wastes are taken off, and blind to padding."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speechquilt.model.flops import real_tokens, sizes, training_flops
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.lm import PlainLMConfig
from speechquilt.model.patcher import StaticPatcher
from speechquilt.model.presets import toy_latent, toy_plain
from speechquilt.nn.llama import LlamaConfig
from tests.dummies import VOCAB, make_batch, random_laid_out

GLOBAL = LlamaConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=48)
PLAIN = PlainLMConfig(vocab_size=VOCAB.size, llama=GLOBAL)


def latent(queries: int = 2) -> LatentLMConfig:
    return LatentLMConfig(
        vocab_size=VOCAB.size,
        global_=GLOBAL,
        local_width=16,
        encoder_layers=1,
        decoder_layers=3,
        local_heads=2,
        local_ffn=24,
        queries=queries,
    )


@pytest.mark.parametrize("config", [PLAIN, latent(), latent(queries=3)], ids=["plain", "latent", "projected"])
def test_equals_what_torch_counts(config: PlainLMConfig | LatentLMConfig) -> None:
    """Two differences are ours on purpose: torch counts masked pairs, and not the unit encoder's segment attention."""
    batch = make_batch([[random_laid_out(3, num_segments=6)]], StaticPatcher(4))
    model = config.build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.forward(batch).sum().backward()
    size = sizes(batch, None, None, None)
    T, U = size.tokens, size.units
    if isinstance(config, PlainLMConfig):
        masked = 4 * 32 * 2 * (T * T - size.token_pairs)
    else:
        k, d = config.queries, config.local_width
        masked = 4 * 32 * 2 * (U * U - size.unit_pairs) + 4 * d * 4 * (T * T - size.token_pairs)
        masked += 4 * d * k * (3 * (T * U - size.visible_pairs) - T)
    # Within half a percent: torch leaves out nothing else of note.
    assert training_flops(config, batch) + 3 * masked == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("config", [PLAIN, latent()], ids=["plain", "latent"])
def test_packing_and_padding_cost_nothing(config: PlainLMConfig | LatentLMConfig) -> None:
    docs = [random_laid_out(seed) for seed in range(4)]
    patcher = StaticPatcher(4)
    separate = sum(training_flops(config, make_batch([[d]], patcher)) for d in docs)
    packed = make_batch([docs[:3], docs[3:]], patcher)
    assert training_flops(config, packed) == separate
    assert int(real_tokens(packed).sum()) == sum(len(d.ids_T) for d in docs)


def test_windows_bound_the_pairs() -> None:
    batch = make_batch([[random_laid_out(3, num_segments=6)]])
    T = batch.ids_BT.shape[1]
    size = sizes(batch, 5, None, None)
    assert size.token_pairs == 5 * T - 10
    assert size.unit_pairs == size.visible_pairs == T * (T + 1) // 2


def test_presets_share_the_global_transformer() -> None:
    plain, latent_ = toy_plain(VOCAB.size), toy_latent(VOCAB.size)
    assert plain.llama == latent_.global_
    for config in (plain, latent_):
        logits_BTV = config.build().forward(make_batch([[random_laid_out(1)]], StaticPatcher(4)))
        assert torch.isfinite(logits_BTV).all()
