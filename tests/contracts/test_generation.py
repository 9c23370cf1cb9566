"""The decode loop's contract: greedy == the slow way by `forward`, alone == in a batch, streamed == whole, limits and constraints.

The slow way knows nothing of the loop: it lays out prompt and answer, runs `forward` on all of it, and takes the best id that
may stand there.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.speech_bpe import SpeechBPE
from speechquilt.model import patcher as patchers
from speechquilt.model.generation import Generated, GenerationConfig, GenerationEngine, Token, choose
from speechquilt.protocols import LanguageModel, Patcher
from speechquilt.types import IGNORE, Batch, LaidOut, Modality, Segment
from speechquilt.vocab import Special, Vocab
from tests.contracts.test_language_model import CASES, CAUSAL
from tests.dummies import VOCAB

Prompt = tuple[Segment, ...]
BARE = replace(VOCAB, opening_marker=False)
every = pytest.mark.parametrize("name", CAUSAL)
some = pytest.mark.parametrize("name", ["plain", "latent, static 4", "bypass, static 4"])


def segment(modality: Modality, *ids: int) -> Segment:
    return Segment(modality=modality, ids_T=np.array(ids, dtype=np.int32))


def made(name: str, seed: int = 1) -> tuple[Any, Patcher | None]:
    """Far from uniform, so that the best id is no matter of rounding; markers likelier than by chance, so that spans change."""
    config, patcher = CASES[name]
    model = config.build(seed)
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval(), patcher


def engine(name: str, seed: int = 1, vocab: Vocab = VOCAB, **changes: Any) -> GenerationEngine:
    model, patcher = made(name, seed)
    return GenerationEngine(model=model, vocab=vocab, patcher=patcher, **changes)


def some_prompts(seed: int = 0, number: int = 4) -> list[Prompt]:
    draw, found = np.random.default_rng(seed), []
    for k in range(number):
        parts = [segment("text", *draw.integers(0, 20, 1 + k)), segment("speech", *draw.integers(0, 12, 2 * k))]
        found.append(tuple(parts[:: draw.choice([1, -1])]))
    return [*found, ()]


def logits_after(model: LanguageModel, patcher: Patcher | None, vocab: Vocab, ids: list[int]) -> torch.Tensor:
    ids_T = np.array(ids)
    laid_out = LaidOut(
        id="",
        source="",
        ids_T=ids_T,
        is_speech_T=np.asarray(vocab.is_speech(ids_T)),
        loss_T=np.ones(len(ids), dtype=bool),
        unit_end_T=None,
    )
    booleans = None if patcher is None else [torch.from_numpy(x)[None] for x in patcher(laid_out, 0.5)]
    batch = Batch(
        ids_BT=torch.tensor([ids]),
        labels_BT=torch.full((1, len(ids)), IGNORE),
        doc_BT=torch.zeros(1, len(ids), dtype=torch.long),
        opens_BT=booleans and booleans[0],
        closes_BT=booleans and booleans[1],
    )
    with torch.no_grad():
        return model.forward(batch)[0, -1]


def may_follow(vocab: Vocab, spans: list[tuple[Modality | None, list[int]]], answer: str) -> list[int]:
    """Ids that may stand behind these spans, by the words of `GenerationConfig.answer`."""
    now = spans[-1][0]
    own = {"text": range(vocab.num_text), "speech": range(vocab.speech_start, vocab.speech_start + vocab.num_speech)}
    found = [vocab.eos, *(own[now] if now else [])]
    if answer == "any":
        found += [vocab.marker(m) for m in ("text", "speech") if m != now]
    elif now is None:
        found += [vocab.marker(answer)]  # type: ignore[arg-type]
    return found


def slow_greedy(of: GenerationEngine, prompt: Prompt, answer: str, max_tokens: int) -> Generated:
    """By `forward`, one token after the other, without a state."""
    vocab, ids = of.vocab, [of.vocab.bos]
    spans: list[tuple[Modality | None, list[int]]] = [(None if vocab.opening_marker else "text", [])]
    for part in prompt:
        if part.modality != spans[-1][0]:
            ids.append(vocab.marker(part.modality))
            spans = [(part.modality, [])]
        ids += vocab.to_model(part.modality, part.ids_T).tolist()
    if answer != "any" and spans[-1][0] != answer:
        ids.append(vocab.marker(answer))  # type: ignore[arg-type]
        spans = [(answer, [])]  # type: ignore[list-item]
    count, ended = 0, "limit"
    while count < max_tokens:
        logits_V = logits_after(of.model, of.patcher, vocab, ids)
        best = max(may_follow(vocab, spans, answer), key=lambda i: float(logits_V[i]))
        if best == vocab.eos:
            ended = "eos"
            break
        ids.append(best)
        count += 1
        if vocab.is_text(best):
            spans[-1][1].append(best)
        elif vocab.is_speech(best):
            spans[-1][1].append(best - vocab.speech_start)
        else:
            spans.append(("text" if best == vocab.marker("text") else "speech", []))
    return Generated(
        segments=tuple(segment(m, *found) for m, found in spans if m and found),
        ended=ended,  # type: ignore[arg-type]
        num_tokens=count,
        global_steps=0,
    )


def plain_data(found: Generated) -> tuple[Any, ...]:
    return [(s.modality, s.ids_T.tolist()) for s in found.segments], found.ended, found.num_tokens


def drained(tokens: Any) -> tuple[list[Token], Generated]:
    """What a stream yields, and what it is worth in the end."""
    found = []
    while True:
        try:
            found.append(next(tokens))
        except StopIteration as stop:
            return found, stop.value


@every
@pytest.mark.parametrize("answer", ["any", "text", "speech"])
def test_greedy_is_the_best_of_forward_at_every_token(name: str, answer: str) -> None:
    """Ragged prompts of both modalities and none in one call."""
    changes = 0
    for seed, vocab in ((1, VOCAB), (2, BARE)):
        of, asked = engine(name, seed, vocab, max_rows=3), some_prompts(seed)
        config = GenerationConfig(answer=answer, max_tokens=14)  # type: ignore[arg-type]
        for prompt, found in zip(asked, of.generate(asked, config), strict=True):
            assert plain_data(found) == plain_data(slow_greedy(of, prompt, answer, 14))
            changes += len(found.segments) > 1
    assert changes or answer != "any"


@some
def test_sampled_rows_are_what_they_are_alone_and_streamed(name: str) -> None:
    asked, of = some_prompts(number=6), engine(name, max_rows=3)
    config = GenerationConfig(max_tokens=20, temperature=1.5, top_p=0.9, seed=5)
    together = [plain_data(found) for found in of.generate(asked, config)]
    assert [plain_data(found) for found in of.generate(asked, config)] == together
    assert [plain_data(found) for found in of.generate(asked, replace(config, seed=6))] != together
    for i, prompt in enumerate(asked):
        assert plain_data(of.generate([prompt], config, numbers=[i])[0]) == together[i]
        tokens, whole = drained(of.stream(prompt, config, number=i))
        assert plain_data(whole) == together[i]
        assert tokens == [Token(k, s.modality) for s in whole.segments for k in s.ids_T.tolist()]
    twins = of.generate([asked[0]] * 4, config)
    assert len({str(plain_data(found)) for found in twins}) > 1


@some
def test_a_longer_limit_goes_on_from_a_shorter_one(name: str) -> None:
    asked, of = some_prompts(number=5), engine(name)
    long = of.generate(asked, GenerationConfig(max_tokens=24, temperature=1.0, seed=2))
    for limit in (1, 7):
        short = of.generate(asked, GenerationConfig(max_tokens=limit, temperature=1.0, seed=2))
        for part, whole in zip(short, long, strict=True):
            for modality in ("text", "speech"):
                ids = part.ids(modality).tolist()
                assert whole.ids(modality).tolist()[: len(ids)] == ids
            assert part.num_tokens == min(limit, whole.num_tokens)
            assert part.ended == ("limit" if whole.num_tokens >= limit else "eos")


class Drunk:
    """Any logits at all, from a generator: what a constraint has to hold against."""

    def __init__(self, seed: int, size: int, loved: list[int]) -> None:
        self.draw, self.size, self.loved = torch.Generator().manual_seed(seed), size, loved

    def forward(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def init_state(self, num_rows: int, max_tokens: int) -> int:
        return max_tokens

    def step(self, ids_B: Any, opens_B: Any, closes_B: Any, state: int, active_B: Any = None) -> Any:
        assert state > 0, "stepped past max_tokens"
        logits_BV = 3 * torch.randn(len(ids_B), self.size, generator=self.draw)
        logits_BV[:, self.loved] += 2
        return logits_BV, state - 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    answer=st.sampled_from(["any", "text", "speech"]),
    one_span=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    bare=st.booleans(),
    speaks=st.booleans(),
)
def test_no_constraint_is_ever_violated(
    seed: int, answer: Any, one_span: bool, temperature: float, bare: bool, speaks: bool
) -> None:
    """Against a model that loves padding, BOS, markers and the ids that only fill the vocabulary up."""
    vocab = Vocab(num_text=20, num_speech=12 if speaks else 0, opening_marker=not bare)
    loved = [*(vocab.special(s) for s in Special if s != Special.EOS), *range(vocab.speech_start + 12, vocab.size)]
    of = GenerationEngine(model=Drunk(seed, vocab.size, loved), vocab=vocab, patcher=patchers.StaticPatcher(3))
    asked = [(), (segment("text", 1, 2),), *([(segment("speech", 3),)] if speaks else [])]
    config = GenerationConfig(
        answer=answer, one_span=one_span, temperature=temperature, max_tokens=9, seed=seed, top_p=0.95
    )
    if answer == "speech" and not speaks:
        with pytest.raises(ValueError, match="has no speech tokens; ask for text"):
            of.generate(asked, config)
        return
    for found in of.generate(asked, config):
        kinds = [s.modality for s in found.segments]
        assert set(kinds) <= ({"text", "speech"} if answer == "any" else {answer})
        assert len(kinds) <= 1 or not one_span
        assert all(0 <= i < vocab.num_text for i in found.ids("text"))
        assert all(0 <= i < vocab.num_speech for i in found.ids("speech"))
        spoken = len(found.ids("text")) + len(found.ids("speech"))
        assert spoken <= found.num_tokens <= 9
        assert found.num_tokens - spoken <= (9 if speaks else 1) * (answer == "any")  # markers
        assert (found.ended == "limit") == (found.num_tokens == 9)
        assert found.ended in (("eos", "limit", "marker") if one_span else ("eos", "limit"))


@pytest.mark.parametrize("name", [n for n in CAUSAL if n.startswith(("latent", "bypass"))])
def test_the_steps_of_the_global_model_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed units of the prompt and those counted are all that the global transformer ever saw of a row."""
    seen = 0
    of = engine(name)
    run = type(of.model.global_).step  # type: ignore[attr-defined]

    def spy(stack: Any, x_BD: Any, state: Any, rows_B: Any) -> Any:
        nonlocal seen
        seen += int(rows_B.sum())
        return run(stack, x_BD, state, rows_B)

    monkeypatch.setattr(type(of.model.global_), "step", spy)  # type: ignore[attr-defined]
    fewer = 0
    for prompt in some_prompts(3, 6)[:-1]:
        for answer in ("any", "speech"):
            seen = 0
            config = GenerationConfig(answer=answer, max_tokens=13, temperature=1.0)  # type: ignore[arg-type]
            (found,) = of.generate([prompt], config)
            total, seen = seen, 0
            (nothing,) = of.generate([prompt], replace(config, max_tokens=1))  # reads the prompt alone
            assert nothing.global_steps == 0
            assert total == seen + found.global_steps
            fewer += found.num_tokens - found.global_steps
    if "static 4" in name:
        assert fewer > 20


def test_a_row_ends_where_those_of_training_did() -> None:
    prompt = (segment("text", 1, 2, 3),)  # with BOS and marker 5 tokens
    config = GenerationConfig(answer="speech", max_tokens=40)
    free = engine("latent, static 4")
    free.model.head.weight.data[VOCAB.eos] = 0  # type: ignore[attr-defined]
    (long,) = free.generate([prompt], config)
    assert (long.num_tokens, long.ended) == (40, "limit")
    (found,) = replace(free, row_tokens=20).generate([prompt], config)
    assert (found.num_tokens, found.ended) == (14, "row")  # and the marker of speech
    assert found.ids("speech").tolist() == long.ids("speech").tolist()[:14]
    (found,) = replace(free, row_units=9).generate([prompt], config)
    assert (found.num_tokens, found.ended) == (12, "row")  # 6 units of the prompt, 3 whole patches
    with pytest.raises(ValueError, match="the prompt has 6 tokens, the model was trained on rows of 6"):
        replace(free, row_tokens=6).generate([prompt], config)
    with pytest.raises(ValueError, match="the prompt has 6 units"):
        replace(free, row_units=6).generate([prompt], config)


def test_a_model_in_pieces_gives_ids_of_the_tokenizer() -> None:
    draw = np.random.default_rng(0)
    bpe = SpeechBPE.train([np.tile(draw.integers(0, 5, 3), 4) for _ in range(40)], 5, 12)
    assert bpe.num_pieces == 12
    of, whole = engine("plain"), replace(engine("plain"), pieces=bpe)
    for seed in range(4):
        prompt = (segment("speech", *draw.integers(0, 5, 9)),)
        config = GenerationConfig(max_tokens=9, temperature=1.0, seed=seed)
        (pieced,) = of.generate([(bpe.segment(prompt[0]),)], config)
        (found,) = whole.generate([prompt], config)
        assert found.num_tokens <= 9
        base = bpe.decode(pieced.ids("speech")).tolist()
        assert found.ids("speech").tolist() == base[: len(found.ids("speech"))]
        assert found.ended != "limit" or found.num_tokens == 9
        tokens, streamed = drained(whole.stream(prompt, config))
        assert plain_data(streamed) == plain_data(found)
        assert [t.id for t in tokens if t.modality == "speech"] == found.ids("speech").tolist()


rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12).map(lambda x: torch.tensor([x]))


def chances(logits_NV: torch.Tensor, number: int = 3000, **how: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    config = GenerationConfig(**how)
    counts_V = torch.zeros(logits_NV.shape[1])
    for _ in range(number):
        counts_V[choose(logits_NV, config, [draw])[0]] += 1
    return counts_V / number


@settings(max_examples=100, deadline=None)
@given(logits_NV=rows, seed=st.integers(0, 1000), small=st.sampled_from([1e-9, 1e-40, 1e-300]))
def test_little_temperature_and_little_top_p_are_greedy(logits_NV: torch.Tensor, seed: int, small: float) -> None:
    best = float(logits_NV.max())
    for how in ({"temperature": small}, {"temperature": 2.0, "top_p": 1e-9}, {"temperature": 0.0, "top_p": 0.3}):
        (i,) = choose(logits_NV, GenerationConfig(**how), [torch.Generator().manual_seed(seed)])  # type: ignore[arg-type]
        assert best - float(logits_NV[0, i]) < 1e-6


@settings(max_examples=100, deadline=None)
@given(logits_NV=rows, seed=st.integers(0, 1000), top_p=st.floats(0.05, 0.95))
def test_top_p_keeps_the_fewest_that_reach_it(logits_NV: torch.Tensor, seed: int, top_p: float) -> None:
    probs = logits_NV[0].double().softmax(-1)
    (i,) = choose(logits_NV, GenerationConfig(temperature=1.0, top_p=top_p), [torch.Generator().manual_seed(seed)])
    likelier = float(probs[probs > probs[i] + 1e-6].sum())  # what stands before it must not have been enough
    assert likelier < top_p + 1e-6


def test_draws_have_the_chances_that_they_should() -> None:
    logits_NV = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    for temperature in (0.5, 1.0, 2.0):
        wanted_V = (logits_NV[0] / temperature).softmax(-1)
        assert (chances(logits_NV, temperature=temperature) - wanted_V).abs().max() < 0.03
    kept_V = logits_NV[0].softmax(-1)
    assert 0.6 < kept_V[2] < 0.7 < kept_V[[0, 2]].sum()
    wanted_V = torch.tensor([kept_V[0], 0, kept_V[2], 0]) / kept_V[[0, 2]].sum()
    assert (chances(logits_NV, temperature=1.0, top_p=0.7) - wanted_V).abs().max() < 0.03
    whole = [
        choose(logits_NV, GenerationConfig(temperature=1.0, top_p=p), [torch.Generator()]) for p in (1.0, 1 - 1e-9)
    ]
    assert whole[0] == whole[1]


def test_a_stream_leaves_gradients_and_training_mode_alone() -> None:
    of = engine("plain")
    of.model.train()  # type: ignore[attr-defined]
    stream: Iterator[Token] = of.stream((segment("text", 1),), GenerationConfig(answer="text", max_tokens=5))
    modes = []
    for _ in stream:
        modes.append((torch.is_grad_enabled(), of.model.training))  # type: ignore[attr-defined]
    assert modes
    assert all(mode == (True, True) for mode in modes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer": "song"}, "answer='song' must be any, text or speech"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, r"temperature=-1.0 not negative"),
        ({"temperature": float("nan")}, r"temperature=nan not negative"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must lie in \(0, 1\]"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**wrong)


def test_bad_models_are_named() -> None:
    of = engine("plain")
    with pytest.raises(ValueError, match="generate with a static patcher"):
        replace(of, patcher=patchers.AlignedPatcher()).generate([()], GenerationConfig())
    of.model.head.weight.data.fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not finite"):
        of.generate([()], GenerationConfig())
