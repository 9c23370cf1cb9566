"""One contract for every `LanguageModel`: causal, step == forward, packed == separate, a row alone == in a batch.

Two planted faults, a leaky model and a patcher that closes short patches, prove that the causality checks can fail.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import AlignedPatcher, NoPatcher, StaticPatcher
from speechquilt.model.plain import PlainLMConfig
from speechquilt.model.saving import load, save
from speechquilt.nn.llama import LlamaConfig
from speechquilt.protocols import LanguageModel, LogitsAt, Patcher
from speechquilt.types import IGNORE, Batch, Document, LaidOut, Segment
from tests.dummies import VOCAB, make_batch, random_laid_out, with_ids

GLOBAL = LlamaConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=48)


def latent(**changes: Any) -> LatentLMConfig:
    sizes = {"local_width": 16, "encoder_layers": 1, "decoder_layers": 2, "local_heads": 2, "local_ffn": 24} | changes
    return LatentLMConfig(vocab_size=VOCAB.size, num_text=VOCAB.num_text, global_=GLOBAL, **sizes)


PLAIN = PlainLMConfig(vocab_size=VOCAB.size, llama=GLOBAL)
CASES: dict[str, tuple[PlainLMConfig | LatentLMConfig, Patcher | None]] = {
    "plain": (PLAIN, None),
    "plain, patches ignored": (PLAIN, StaticPatcher(4)),
    "latent, no patches": (latent(), None),
    "latent, none": (latent(), NoPatcher()),
    "latent, static 1": (latent(), StaticPatcher(1)),
    "latent, static 2": (latent(), StaticPatcher(2)),
    "latent, static 4": (latent(), StaticPatcher(4)),
    "latent, static 4, small window": (latent(window=5), StaticPatcher(4)),
    "latent, static 4, projected": (latent(queries=3), StaticPatcher(4)),
    "latent, aligned": (latent(), AlignedPatcher()),
    "bypass, no patches": (latent(text_path="bypass"), None),
    "bypass, static 1": (latent(text_path="bypass"), StaticPatcher(1)),
    "bypass, static 4": (latent(text_path="bypass"), StaticPatcher(4)),
    "bypass, static 4, small window": (latent(text_path="bypass", window=5), StaticPatcher(4)),
    "bypass, static 4, projected": (latent(text_path="bypass", queries=3), StaticPatcher(4)),
    "bypass, aligned": (latent(text_path="bypass"), AlignedPatcher()),
}
CAUSAL = {name: case for name, case in CASES.items() if case[1] is None or case[1].causal}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


every = pytest.mark.parametrize("name", CASES)
every_causal = pytest.mark.parametrize("name", CAUSAL)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


def check_prefix_causal(model: LanguageModel, patcher: Patcher | None, laid_out: LaidOut, seed: int) -> None:
    """Scrambling all tokens after t, modality included, leaves the logits up to t unchanged."""
    rng = np.random.default_rng(seed)
    logits_TV = model.forward(make_batch([[laid_out]], patcher))[0]
    for t in range(0, len(laid_out.ids_T) - 1, 2):
        ids_T = laid_out.ids_T.copy()
        ids_T[t + 1 :] = rng.integers(0, VOCAB.speech_start + VOCAB.num_speech, len(ids_T) - t - 1)
        # Word ends are side information and stay; elsewhere a unit follows from the ids.
        scrambled = with_ids(laid_out, ids_T) if patcher is None or patcher.causal else with_other_speech(laid_out, t)
        close(model.forward(make_batch([[scrambled]], patcher))[0, : t + 1], logits_TV[: t + 1])


def with_other_speech(laid_out: LaidOut, t: int) -> LaidOut:
    """Each token after t becomes another one of its modality."""
    ids_T, speech_T = laid_out.ids_T.copy(), laid_out.is_speech_T
    after_T = np.arange(len(ids_T)) > t
    ids_T[after_T & speech_T] = VOCAB.speech_start + (ids_T[after_T & speech_T] + 1) % VOCAB.num_speech
    ids_T[after_T & ~speech_T] = (ids_T[after_T & ~speech_T] + 1) % VOCAB.num_text
    return with_ids(laid_out, ids_T)


def check_span_end_is_not_known(model: LanguageModel, patcher: Patcher) -> None:
    """Spec 2, section 6.4: s5 gives the same logits whether `<t>` or another speech token follows."""
    speech, text = np.arange(6), np.array([3, 1])
    ends = VOCAB.lay_out(Document(id="a", segments=(segment("speech", speech), segment("text", text)), source="test"))
    goes_on = VOCAB.lay_out(
        Document(id="b", segments=(segment("speech", np.append(speech, [7, 8, 9])),), source="test")
    )
    last = 1 + 6  # BOS <s> s0..s5
    both = [model.forward(make_batch([[x]], patcher))[0, : last + 1] for x in (ends, goes_on)]
    close(both[0], both[1])


def segment(modality: str, ids_T: np.ndarray) -> Segment:
    return Segment(modality=modality, ids_T=ids_T)  # type: ignore[arg-type]


class TestLanguageModelContract:
    @every
    def test_prefixes_are_causal(self, name: str) -> None:
        config, patcher = CASES[name]
        model = config.build(seed=1)
        assert isinstance(model, LanguageModel)
        for seed in (3, 4):
            check_prefix_causal(model, patcher, random_laid_out(seed), seed)

    @every_causal
    def test_the_end_of_a_span_is_not_known_before_it(self, name: str) -> None:
        config, patcher = CASES[name]
        check_span_end_is_not_known(config.build(seed=1), patcher or NoPatcher())

    @every_causal
    def test_step_equals_forward(self, name: str) -> None:
        """Rows whose patches close at different times, starting late, pausing, and being replaced when they end."""
        config, patcher = CASES[name]
        model = config.build(seed=1)
        rows = [random_laid_out(seed) for seed in range(20, 26)]
        expected = [model.forward(make_batch([[row]], patcher))[0] for row in rows]
        generator = torch.Generator().manual_seed(0)
        check_stepping(model, patcher or NoPatcher(), rows, expected, generator)

    @every
    def test_logits_at_chosen_places_are_those_of_forward(self, name: str) -> None:
        config, patcher = CASES[name]
        model = config.build(seed=1)
        assert isinstance(model, LogitsAt)
        batch = make_batch(
            [[random_laid_out(1), random_laid_out(2)], [random_laid_out(3)], [random_laid_out(4)]], patcher
        )
        wanted_BT = (torch.rand(batch.ids_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.4) & (
            batch.labels_BT != IGNORE
        )
        close(model.logits_at(batch, wanted_BT), model.forward(batch)[wanted_BT])

    @every_causal
    def test_a_row_reset_inside_a_patch_forgets_it(self, name: str) -> None:
        """What an interrupted answer needs: no token of the broken off patch reaches the next document."""
        config, patcher = CASES[name]
        model = config.build(seed=1)
        speech = VOCAB.lay_out(Document(id="a", segments=(segment("speech", np.arange(6)),), source="test"))
        batch = make_batch([[speech]], patcher or NoPatcher())
        expected = model.forward(make_batch([[speech]], patcher))[0]
        assert batch.opens_BT is not None
        assert batch.closes_BT is not None
        state = model.init_state(1, batch.ids_BT.shape[1])
        for t in [*range(3), *range(batch.ids_BT.shape[1])]:  # BOS <s> s0, then all over
            if t == 0:
                state = state.reset(torch.tensor([True]))
            logits_BV, state = model.step(batch.ids_BT[:, t], batch.opens_BT[:, t], batch.closes_BT[:, t], state)
            close(logits_BV[0], expected[t])

    @every
    def test_packed_equals_separate_and_alone_equals_in_a_batch(self, name: str) -> None:
        config, patcher = CASES[name]
        model = config.build(seed=1)
        rows = [[random_laid_out(3 * b + i, num_segments=3) for i in range(b + 1)] for b in range(3)]
        logits_BTV = model.forward(make_batch(rows, patcher))
        assert not logits_BTV.isnan().any()
        for b, row in enumerate(rows):
            start = 0
            for laid_out in row:
                alone_TV = model.forward(make_batch([[laid_out]], patcher))[0]
                close(logits_BTV[b, start : start + len(alone_TV)], alone_TV)
                start += len(alone_TV)

    @every
    def test_static_sizes_change_nothing(self, name: str) -> None:
        """What a GPU wants, axes of one size for every batch: unused units and local slots are seen by nobody."""
        config, patcher = CASES[name]
        model = config.build(seed=1)
        batch = make_batch([[random_laid_out(7), random_laid_out(8)], [random_laid_out(9)]], patcher)
        roomy = replace(batch, num_units=batch.ids_BT.shape[1] + 5, num_local=batch.ids_BT.shape[1] + 3)
        close(model.forward(roomy), model.forward(batch))

    @every
    def test_saved_and_loaded_is_the_same(self, name: str, tmp_path: Path) -> None:
        config, patcher = CASES[name]
        model = config.build(seed=1)
        save(model, tmp_path / "new" / "model")
        loaded = load(tmp_path / "new" / "model")
        assert loaded.config == config
        batch = make_batch([[random_laid_out(7)]], patcher)
        assert torch.equal(loaded.forward(batch), model.forward(batch))

    @every_causal
    def test_half_precision_stays_near_and_steps(self, name: str) -> None:
        """A model cast to bfloat16, and autocast over float32 weights and caches."""
        config, patcher = CASES[name]
        batch = make_batch([[random_laid_out(5)]], patcher or NoPatcher())
        expected = config.build(seed=1).forward(batch)
        for model, autocast in ((config.build(seed=1).bfloat16(), False), (config.build(seed=1), True)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                torch.testing.assert_close(model.forward(batch).float(), expected, atol=0.3, rtol=0)
                state = model.init_state(1, batch.ids_BT.shape[1])
                for t in range(batch.ids_BT.shape[1]):
                    given = (x[:, t] for x in (batch.ids_BT, batch.opens_BT, batch.closes_BT) if x is not None)
                    logits_BV, state = model.step(*given, state)
                torch.testing.assert_close(logits_BV.float(), expected[:, -1], atol=0.3, rtol=0)

    @every
    def test_gradients_reach_every_weight_and_are_finite(self, name: str) -> None:
        config, patcher = CASES[name]
        model = config.build(seed=1)
        batch = make_batch([[random_laid_out(7), random_laid_out(8)], [random_laid_out(9)]], patcher)
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(model.forward(batch).flatten(0, 1), batch.labels_BT.flatten())
            loss.backward()
        for parameter_name, weight in model.named_parameters():
            assert weight.grad is not None, parameter_name
            assert weight.grad.isfinite().all(), parameter_name
            choice = parameter_name.removeprefix("unit_encoder.cross.").split(".")[0] in ("q_norm", "q_proj", "k_proj")
            if choice and parameter_name.startswith("unit_encoder") and batch.unit_BT[0, 7] == 7:
                continue  # units of one token: nothing to choose between
            assert weight.grad.abs().max() > 0, parameter_name


def check_stepping(
    model: LanguageModel,
    patcher: Patcher,
    rows: list[LaidOut],
    expected: list[torch.Tensor],
    generator: torch.Generator,
    slots: int = 3,
) -> None:
    """Continuous batching of `rows` in a few slots, each slot active at random."""
    longest = max(len(row.ids_T) for row in rows)
    state = model.init_state(slots, longest)
    waiting = list(range(len(rows)))
    current = [waiting.pop(0) for _ in range(slots)]
    patch_states, at = [patcher.init_state() for _ in range(slots)], [0] * slots
    while any(c >= 0 for c in current):
        active = [c >= 0 and bool(torch.rand((), generator=generator) < 0.7) for c in current]
        ids, opens, closes = [0] * slots, [True] * slots, [True] * slots
        for s in range(slots):
            if active[s]:
                row, t = rows[current[s]], at[s]
                ids[s] = int(row.ids_T[t])
                opens[s], closes[s], patch_states[s] = patcher.step(ids[s], bool(row.is_speech_T[t]), patch_states[s])
        logits_BV, state = model.step(
            torch.tensor(ids), torch.tensor(opens), torch.tensor(closes), state, torch.tensor(active)
        )
        done = [False] * slots
        for s in range(slots):
            if active[s]:
                close(logits_BV[s], expected[current[s]][at[s]])
                at[s] += 1
                done[s] = at[s] == len(rows[current[s]].ids_T)
        state = state.reset(torch.tensor(done))
        for s in range(slots):
            if done[s]:
                current[s] = waiting.pop(0) if waiting else -1
                patch_states[s], at[s] = patcher.init_state(), 0


def test_patches_of_one_token_are_tokens() -> None:
    """p = 1 gives U = T and the logits of the model without patches."""
    laid_out = random_laid_out(5)
    one, none = make_batch([[laid_out]], StaticPatcher(1)), make_batch([[laid_out]])
    assert one.unit_BT[0].tolist() == list(range(len(laid_out.ids_T)))
    model = latent().build()
    assert torch.equal(model.forward(one), model.forward(none))


def test_bypassed_text_is_an_ordinary_llama_over_units() -> None:
    """Text alone never touches the local modules: the plain model with the same weights gives the same text logits."""
    model = latent(text_path="bypass").build(seed=1)
    plain = PLAIN.build(seed=2)
    plain.llama.load_state_dict(model.global_.state_dict())
    with torch.no_grad():
        plain.embedding.weight[: VOCAB.speech_start] = model.text_embedding.weight
        plain.head.weight[: VOCAB.speech_start] = model.text_head.weight
    text = VOCAB.lay_out(Document(id="a", segments=(segment("text", np.arange(6)),), source="test"))
    batch = make_batch([[text]], StaticPatcher(4))
    known = slice(0, VOCAB.speech_start)
    close(model.forward(batch)[..., known], plain.forward(batch)[..., known])


def test_global_states_carry_the_prediction() -> None:
    """A model that ignores its global transformer would be causal too: here it matters, and only once visible."""
    model, laid_out = (
        latent().build(seed=1),
        VOCAB.lay_out(Document(id="a", segments=(segment("speech", np.arange(8)),), source="test")),
    )
    batch = make_batch([[laid_out]], StaticPatcher(4))
    before = model.forward(batch)
    model.from_global.weight.neg_()  # not a scale: RMSNorm would undo it
    assert ((model.forward(batch) - before).abs().amax(-1) > 1e-4).all()


class LeakyLM:
    """Adds a little of the next token's logits: what a shifted mask or a wrong `visible` would do."""

    def __init__(self) -> None:
        self.inner = PLAIN.build(seed=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        logits_BTV = self.inner.forward(batch)
        return logits_BTV + 0.01 * logits_BTV.roll(-1, dims=1)


class ClosingPatcher(StaticPatcher):
    """Closes the short last patch of a span at its last token: the closure leak."""

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        opens_T, closes_T = super().__call__(laid_out, draw, progress)
        return opens_T, closes_T | np.append(~laid_out.is_speech_T[1:], True)


def test_the_contract_catches_a_leaky_model() -> None:
    with pytest.raises(AssertionError):
        check_prefix_causal(LeakyLM(), None, random_laid_out(3), 3)  # type: ignore[arg-type]


def test_the_contract_catches_the_closure_leak() -> None:
    model, leaky = latent().build(seed=1), ClosingPatcher(4)
    with pytest.raises(AssertionError):
        check_span_end_is_not_known(model, leaky)
    laid_out = random_laid_out(20)
    with pytest.raises((AssertionError, ValueError)):
        check_stepping(
            model, leaky, [laid_out] * 3, [model.forward(make_batch([[laid_out]], leaky))[0]] * 3, torch.Generator()
        )


def test_a_token_after_a_closed_unit_must_open_one() -> None:
    model = latent().build()
    yes, no = torch.tensor([True]), torch.tensor([False])
    with pytest.raises(ValueError, match="opens=False"):
        model.step(torch.tensor([1]), no, yes, model.init_state(1, 4))


def test_a_folder_that_is_not_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    save(PLAIN.build(), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"plain"', '"plane"'))
    with pytest.raises(ValueError, match="plain"):
        load(tmp_path)
