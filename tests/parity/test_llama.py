"""Our stack with the weights of a transformers Llama gives its logits."""

import pytest
import torch
import transformers

from speechquilt.nn.llama import LlamaConfig


@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_logits_equal_transformers_llama(kv_heads: int) -> None:
    theirs_config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        attention_bias=False,
    )
    theirs = transformers.LlamaForCausalLM(theirs_config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():  # large weights, so that a wrong rotation or norm shows
        weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim == 2 else 1.0))
    ours = LlamaConfig(width=32, num_layers=3, num_heads=4, num_kv_heads=kv_heads, ffn_width=56).build()
    weights = {k: v for k, v in theirs.model.state_dict().items() if not k.startswith("embed_tokens")}
    ours.load_state_dict(weights)
    ids_BT = torch.randint(0, 50, (2, 40), generator=generator)
    x_BTD = ours(theirs.model.embed_tokens(ids_BT), ours.mask(torch.zeros_like(ids_BT)))
    torch.testing.assert_close(theirs.lm_head(x_BTD), theirs(ids_BT).logits, atol=1e-4, rtol=1e-4)
