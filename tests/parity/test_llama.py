"""Our stack with the weights of a transformers Llama, Qwen2 or Qwen3 gives its hidden states and logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechquilt.nn.hugging_face import hugging_face_config, llama_config
from speechquilt.nn.llama import LlamaConfig
from speechquilt.nn.rope import RopeScaling
from speechquilt.vocab import Vocab
from tests.parity.tiny_checkpoints import VARIANTS, VOCAB, checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hidden_states_and_logits_equal_those_of_transformers(variant: str) -> None:
    theirs = checkpoint(variant)
    ours = llama_config(theirs.config.to_dict()).build()
    ours.load_state_dict({k: v for k, v in theirs.model.state_dict().items() if not k.startswith("embed_tokens")})
    ids_BT = torch.randint(0, VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    x_BTD, mask_BTT = theirs.model.embed_tokens(ids_BT), ours.mask(torch.zeros_like(ids_BT))
    expected = theirs(ids_BT, output_hidden_states=True)
    rope = ours.config.rope(torch.arange(64)[None])
    hidden_BTD = x_BTD
    for layer, expected_BTD in zip(ours.layers, expected.hidden_states[1:-1]):  # the last one is after the norm
        hidden_BTD = layer(hidden_BTD, mask_BTT, rope)
        torch.testing.assert_close(hidden_BTD, expected_BTD, atol=1e-4, rtol=1e-4)
    final_BTD = ours(x_BTD, mask_BTT)
    torch.testing.assert_close(final_BTD, expected.hidden_states[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.lm_head(final_BTD), expected.logits, atol=1e-4, rtol=1e-4)


SCALINGS = st.builds(
    RopeScaling,
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    low_freq_factor=st.just(1.0),
    high_freq_factor=st.sampled_from([2.0, 4.0]),
    original_max_positions=st.sampled_from([64, 8192]),
)


@given(
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    head_width=st.sampled_from([8, 16]),
    theta=st.sampled_from([1e4, 5e5]),
    eps=st.sampled_from([1e-5, 1e-6]),
    extra=st.sampled_from([{}, {"qkv_bias": True}, {"qk_norm": True}]),
    scaling=st.none() | SCALINGS,
    old_layout=st.booleans(),
)
def test_a_config_survives_the_way_to_hugging_face_and_back(
    heads: tuple[int, int],
    head_width: int,
    theta: float,
    eps: float,
    extra: dict[str, bool],
    scaling: RopeScaling | None,
    old_layout: bool,
) -> None:
    config = LlamaConfig(
        width=48,
        num_layers=2,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        ffn_width=64,
        head_width=head_width,
        rope_theta=theta,
        norm_eps=eps,
        rope_scaling=scaling,
        **extra,
    )
    written = hugging_face_config(config, Vocab(num_text=40, num_speech=10))
    for key in ("rope_parameters",) if old_layout else ("rope_theta", "rope_scaling"):  # of transformers 4 or 5 alone
        del written[key]
    assert llama_config(written) == config


GOOD = hugging_face_config(
    LlamaConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=64), Vocab(num_text=40, num_speech=10)
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' must be one of llama, qwen2, qwen3"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' must be"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' must be"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "without low_freq_factor, high_freq_factor"),
        ({"use_sliding_window": True}, "use_sliding_window=True in config.json must be False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types=\['sliding_attention'\]"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in config.json must be 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size=None; a whole number is expected"),
    ],
)
def test_what_the_stack_does_not_compute_is_refused(change: dict, said: str) -> None:
    llama_config(GOOD)
    with pytest.raises(ValueError, match=said):
        llama_config(GOOD | change)


def test_a_stack_that_no_family_computes_is_not_written() -> None:
    sizes = {"width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "ffn_width": 64}
    for extra, said in (({"window": 8}, "window=8 must be null"), ({"qkv_bias": True, "qk_norm": True}, "no family")):
        with pytest.raises(ValueError, match=said):
            hugging_face_config(LlamaConfig(**sizes, **extra), Vocab(num_text=40, num_speech=10))
