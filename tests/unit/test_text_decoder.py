"""The attention decoder with its cache: in parts it is what it is in one pass, and greedy reading recomputes nothing."""

import pytest
import torch

from speechquilt.tokenizer.heads import TextDecoder
from speechquilt.tokenizer.loops import LOOP_IDS, repeated_ids
from speechquilt.types import IGNORE

TOKEN_S = 0.08  # 16 ids a second are 1.28 a token
PROMPTS = {"own start": ((), None), "whisper's prompt": ((3, 1, 4), 5)}


def decoder(kind: str, seed: int, max_ids: int = 18) -> TextDecoder:
    """Three layers whose answers depend on the position, the audio and the ids before."""
    prompt, end = PROMPTS[kind]
    generator = torch.Generator().manual_seed(seed)
    model = TextDecoder(16, 2, 32, 3, 9, max_ids, token_s=TOKEN_S, prompt=prompt, end=end).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 if weight.ndim == 2 else 1.0))
    return model


def recomputed(model: TextDecoder, states_TD: torch.Tensor) -> list[int]:
    """One row alone, without padding and without a cache."""
    limit = model.most_ids(len(states_TD))
    ids: list[int] = []
    while len(ids) < limit:
        logits_BLV = model(torch.tensor([[*model.prompt, *ids]]), states_TD[None], torch.tensor([len(states_TD)]))
        following = int(logits_BLV[0, -1].argmax())
        if following == model.end:
            break
        ids.append(following)
        if extra := repeated_ids(ids):
            return ids[:-extra]
    return ids


@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_is_the_plain_recomputation(kind: str) -> None:
    lengths = set()
    for seed in range(10):
        model = decoder(kind, seed)
        states_BTD = torch.randn(7, 9, 16, generator=torch.Generator().manual_seed(seed))
        num_tokens_B = torch.tensor([9, 3, 0, 1, 9, 5, 2])
        with torch.no_grad():
            read = model.greedy(states_BTD, num_tokens_B)
            expected = [recomputed(model, row_TD[:n]) for row_TD, n in zip(states_BTD, num_tokens_B.tolist())]
        assert read == expected
        lengths |= {len(row) for row in read}
    assert {0, 4, 10, 18} <= lengths, "rows are empty, loop or end by themselves, and end at their limit and max_ids"


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("cuts", [(3, 1, 1, 1, 1), (1, 4, 2), (7,)])
def test_steps_are_the_pass_over_the_whole_text(kind: str, cuts: tuple[int, ...]) -> None:
    model = decoder(kind, 1)
    generator = torch.Generator().manual_seed(2)
    ids_BL = torch.randint(0, 9, (4, sum(cuts)), generator=generator)
    states_BTD, num_tokens_B = torch.randn(4, 6, 16, generator=generator), torch.tensor([6, 1, 4, 2])
    with torch.no_grad():
        whole_BLV = model(ids_BL, states_BTD, num_tokens_B)
        state, stop = model.init_state(states_BTD, num_tokens_B), 0
        for part_BL in ids_BL.split(cuts, 1):
            logits_BV, state = model.step(part_BL, state)
            stop += part_BL.shape[1]
            assert (logits_BV - whole_BLV[:, stop - 1]).abs().max() <= 1e-5
        chosen = [2, 0]
        some_NV, _ = model.step(ids_BL[chosen, :1], state.rows(chosen))
        all_BV, _ = model.step(ids_BL[:, :1], state)
    assert (some_NV - all_BV[chosen]).abs().max() <= 1e-5
    assert whole_BLV.std() > 0.1, "a model that answers nothing would pass"


def test_reading_computes_each_vector_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the last position only; keys of the audio once, of the text one id at a time."""
    model = decoder("whisper's prompt", 4)
    seen: dict[str, list[int]] = {"text": [], "audio": [], "logits": []}
    layer = model.layers[0]
    layer.self_attn.k_proj.register_forward_hook(lambda m, x, y: seen["text"].append(y.shape[1]))
    layer.encoder_attn.k_proj.register_forward_hook(lambda m, x, y: seen["audio"].append(y.shape[1]))
    model.layer_norm.register_forward_hook(lambda m, x, y: seen["logits"].append(y[0].numel() // 16))
    with torch.no_grad():
        [read] = model.greedy(torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(4)), torch.tensor([9]))
    assert len(read) > 2
    assert seen["text"] == [3] + [1] * (len(seen["text"]) - 1)
    assert seen["audio"] == [9]
    assert set(seen["logits"]) == {1}


def test_a_text_is_bounded_by_the_seconds_of_its_audio() -> None:
    model = decoder("own start", 0, max_ids=40)
    assert [model.most_ids(n) for n in (0, 1, 10, 25, 1000)] == [0, 10, 21, 40, 40]


def looped(phrase: list[int]) -> list[int]:
    """What is left of an endless repetition of `phrase` after [7, 7]."""
    ids = [7, 7]
    for i in phrase * LOOP_IDS:
        ids.append(i)
        if extra := repeated_ids(ids):
            return ids[:-extra]
    return ids


@pytest.mark.parametrize("phrase", [[1], [1, 2], [1, 2, 3, 1, 4], list(range(8, 40))])
def test_a_loop_of_any_length_is_said_once(phrase: list[int]) -> None:
    assert looped(phrase) == [7, 7, *phrase]


@pytest.mark.parametrize("ids", [[], [1] * 11, [1, 2] * 5, [1, 2, 3, 4, 5] * 2, [*range(20), 99, *range(20)]])
def test_short_repetitions_and_those_with_something_between_stay(ids: list[int]) -> None:
    assert not any(repeated_ids(ids[:n]) for n in range(len(ids) + 1))


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_loss_is_that_of_every_next_id(kind: str) -> None:
    model = decoder(kind, 3)
    states_BTD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))
    num_tokens_B, texts = torch.tensor([6, 4]), [[7, 2, 2, 8], [6]]
    text_BL = torch.tensor([texts[0], [6, IGNORE, IGNORE, IGNORE]])
    with torch.no_grad():
        loss_B = model.loss(states_BTD, num_tokens_B, text_BL)
        for row, text in enumerate(texts):
            n = int(num_tokens_B[row])
            ids = torch.tensor([[*model.prompt, *text]])
            log_p_LV = model(ids, states_BTD[row : row + 1, :n], torch.tensor([n]))[0].log_softmax(-1)
            targets = [*text, model.end]
            expected = -sum(log_p_LV[len(model.prompt) - 1 + i, t] for i, t in enumerate(targets))
            assert loss_B[row].item() == pytest.approx(expected.item(), rel=1e-5)
