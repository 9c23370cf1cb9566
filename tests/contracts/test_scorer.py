"""The scorer's contract: what is scored, joins and the patch grid, alone == in a batch, step == forward.

`SumLM` is small enough to check by hand and reads patches, documents and order, so a wrong one of them shows.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.evals.scorer import Request, Scorer
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import StaticPatcher
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.types import Batch, Segment
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=6, num_speech=9)
P = 3  # patch size of the test patcher


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waiting for a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(*ids):
    return Segment(modality="text", ids_T=np.array(ids, dtype=np.int32))


def speech(*ids):
    return Segment(modality="speech", ids_T=np.array(ids, dtype=np.int32))


class Static:
    """Patches of P speech tokens, written as the spec says it (latent-speech-text 5, 6.4)."""

    causal = True

    def __call__(self, laid_out, draw):
        pairs, state = [], self.init_state()
        for is_speech in laid_out.is_speech_T:
            opens, closes, state = self.step(0, bool(is_speech), state)
            pairs.append((opens, closes))
        return np.array([o for o, _ in pairs]), np.array([c for _, c in pairs])

    def init_state(self):
        return 0

    def step(self, token_id, is_speech, state):
        if not is_speech:
            return True, True, 0
        return state == 0, state == P - 1, (state + 1) % P


class SumLM:
    """logits[t] = W · (embedding[t] + mean over tokens of the same document in units < visible[t] of decay-weighted
    embeddings). Depends on order, unit borders, what is visible and the document, and on nothing else."""

    def __init__(self, seed=0, width=8):
        g = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(VOCAB.size, width, generator=g)
        self.out = torch.randn(width, VOCAB.size, generator=g) * 2
        self.bias = torch.zeros(VOCAB.size)
        self.bias[VOCAB.num_text : VOCAB.speech_start] = -6.0  # markers and EOS are rare, so answers are long

    def forward(self, batch: Batch):
        batch.validate()
        unit, visible, doc = batch.unit_BT, batch.visible_BT, batch.doc_BT
        rows = []
        for b in range(len(batch.ids_BT)):
            row = []
            for t in range(batch.ids_BT.shape[1]):
                same = [i for i in range(t + 1) if doc[b, i] == doc[b, t]]
                seen = [int(batch.ids_BT[b, i]) for i in same if unit[b, i] < visible[b, t]]
                row.append(self._logits(int(batch.ids_BT[b, t]), seen))
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def _logits(self, last, seen):
        h = self.embed[last]
        for k, i in enumerate(seen):
            h = h + self.embed[i] * (0.5 + 0.5 * ((k * 7) % 5)) / 3
        return h @ self.out + self.bias

    def init_state(self, num_rows, max_tokens):
        return [([], []) for _ in range(num_rows)], max_tokens

    def step(self, ids_B, opens_B, closes_B, state):
        rows, room = state
        assert room > 0, "stepped past max_tokens"
        logits, new = [], []
        for i, opens, closes, (shut, pending) in zip(ids_B.tolist(), opens_B.tolist(), closes_B.tolist(), rows):
            if opens:
                shut, pending = shut + pending, []
            pending = [*pending, i]
            if closes:
                shut, pending = shut + pending, []
            logits.append(self._logits(i, shut))
            new.append((shut, pending))
        return torch.stack(logits), (new, room - 1)


def scorer(max_rows=32, patcher=None, seed=0):
    return Scorer(SumLM(seed), VOCAB, patcher, max_rows=max_rows)


def by_hand(ids, first, last, patcher, is_speech):
    """Sum of log p(ids[t]) for first <= t < last, from the forward of exactly this row."""
    opens = closes = None
    if patcher is not None:
        state, pairs = patcher.init_state(), []
        for i, s in zip(ids, is_speech):
            o, c, state = patcher.step(i, s, state)
            pairs.append((o, c))
        opens, closes = (torch.tensor([[p[k] for p in pairs]]) for k in (0, 1))
    n = len(ids)
    batch = Batch(
        ids_BT=torch.tensor([ids]),
        labels_BT=torch.full((1, n), -100),
        doc_BT=torch.zeros(1, n, dtype=torch.long),
        opens_BT=opens,
        closes_BT=closes,
    )
    log_probs = SumLM().forward(batch)[0].log_softmax(-1)
    return float(sum(log_probs[t - 1, ids[t]] for t in range(first, last)))


@pytest.mark.parametrize("patcher", [None, Static()], ids=["tokens", "patches"])
def test_same_modality_is_one_span_and_the_grid_runs_on(patcher):
    """4 prompt + 4 ending speech tokens are patches 3, 3, 2: the grid does not restart at the ending."""
    got = scorer(patcher=patcher).log_likelihoods([Request((speech(1, 2, 3, 4),), speech(5, 6, 7, 8))])[0]
    s = VOCAB.speech_start
    ids = [VOCAB.bos, VOCAB.marker("speech"), *range(s + 1, s + 9), VOCAB.eos]
    expected = by_hand(ids, 6, 10, patcher, [False, False, *[True] * 8, False])
    assert got.num_tokens == 4
    assert got.sum == pytest.approx(expected, abs=1e-4)
    assert got.mean == pytest.approx(expected / 4, abs=1e-4)


@pytest.mark.parametrize("patcher", [None, Static()], ids=["tokens", "patches"])
def test_other_modality_opens_with_an_unscored_marker(patcher):
    got = scorer(patcher=patcher).log_likelihoods([((speech(1, 2, 3, 4),), text(5, 0))])[0]
    s = VOCAB.speech_start
    ids = [VOCAB.bos, VOCAB.marker("speech"), s + 1, s + 2, s + 3, s + 4, VOCAB.marker("text"), 5, 0, VOCAB.eos]
    expected = by_hand(ids, 7, 9, patcher, [False] * 2 + [True] * 4 + [False] * 4)
    assert got.num_tokens == 2
    assert got.sum == pytest.approx(expected, abs=1e-4)


def test_empty_prompt_and_neighbours_of_one_modality():
    one = scorer(patcher=Static()).log_likelihoods([((), text(1, 2))])[0]
    ids = [VOCAB.bos, VOCAB.marker("text"), 1, 2, VOCAB.eos]
    assert one.sum == pytest.approx(by_hand(ids, 2, 4, Static(), [False] * 5), abs=1e-4)
    split, whole = scorer(patcher=Static()).log_likelihoods(
        [((speech(1), speech(2, 3, 4)), speech(5)), ((speech(1, 2, 3, 4),), speech(5))]
    )
    assert split == whole


BARE = replace(VOCAB, opening_marker=False)


def test_text_that_opens_without_a_marker_is_scored_and_answered_without_one():
    own = Scorer(SumLM(), BARE, Static())
    one, after = own.log_likelihoods([((), text(1, 2)), ((text(3),), speech(4))])
    assert one.sum == pytest.approx(by_hand([BARE.bos, 1, 2, BARE.eos], 1, 3, Static(), [False] * 4), abs=1e-4)
    ids = [BARE.bos, 3, BARE.marker("speech"), BARE.speech_start + 4, BARE.eos]
    assert after.sum == pytest.approx(by_hand(ids, 3, 4, Static(), [False, False, False, True, False]), abs=1e-4)
    for prompt, modality in (((), "text"), ((text(3),), "text"), ((text(3),), "speech"), ((speech(1, 2),), "text")):
        (answer,) = own.generate([prompt], modality, max_tokens=6)
        assert answer.tolist() == greedy_by_forward(SumLM(), Static(), prompt, modality, 6, BARE)


segments = st.one_of(
    st.lists(st.integers(0, 5), min_size=1, max_size=5).map(lambda x: text(*x)),
    st.lists(st.integers(0, 8), min_size=1, max_size=7).map(lambda x: speech(*x)),
)
prompts = st.lists(segments, max_size=3).map(tuple)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(prompts, segments), min_size=2, max_size=6), st.integers(2, 6))
def test_alone_equals_in_a_batch(requests, max_rows):
    together = scorer(max_rows, Static()).log_likelihoods(requests)
    for request, result in zip(requests, together):
        alone = scorer(patcher=Static()).log_likelihoods([request])[0]
        assert result.num_tokens == alone.num_tokens == len(request[1].ids_T)
        assert result.sum == pytest.approx(alone.sum, abs=1e-4)


def greedy_by_forward(model, patcher, prompt, modality, max_tokens, vocab=VOCAB):
    """The slow and obvious way: lay out prompt + answer so far, run forward, take the best allowed id."""
    answer: list[int] = []
    pool = VOCAB.num_text if modality == "text" else VOCAB.num_speech
    start = 0 if modality == "text" else VOCAB.speech_start
    allowed = [*range(start, start + pool), VOCAB.marker("text"), VOCAB.marker("speech"), VOCAB.eos]
    own = Scorer(model, vocab, patcher)
    while len(answer) < max_tokens:
        tail = Segment(modality=modality, ids_T=np.array(answer, dtype=np.int32))
        laid_out = own._lay_out((*prompt, tail))
        logits = model.forward(own._batch([laid_out], [0])).detach()[0, len(laid_out.ids_T) - 2]
        best = max(allowed, key=lambda i: float(logits[i]))
        if not start <= best < start + pool:
            break
        answer.append(best - start)
    return answer


@pytest.mark.parametrize("patcher", [None, Static()], ids=["tokens", "patches"])
@pytest.mark.parametrize("modality", ["text", "speech"])
def test_greedy_by_step_equals_forward(patcher, modality):
    """Ragged prompts of both modalities in one call, several models; most answers are longer than a patch."""
    lengths = []
    for seed in range(6):
        draw = np.random.default_rng(seed)
        asked = [
            (text(*draw.integers(0, 6, 1 + k)), speech(*draw.integers(0, 9, 1 + 2 * k)))[:: draw.choice([1, -1])]
            for k in range(4)
        ]
        got = scorer(3, patcher, seed).generate([*asked, ()], modality, max_tokens=7)
        for prompt, ids_T in zip([*asked, ()], got):
            assert ids_T.tolist() == greedy_by_forward(SumLM(seed), patcher, prompt, modality, 7)
            lengths.append(len(ids_T))
    assert np.mean(lengths) > P


def tiny_llama(**sizes):
    base = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 32}
    return LlamaConfig(**(base | sizes))


def tiny_models():
    plain = PlainLMConfig(vocab_size=VOCAB.size, llama=tiny_llama()).build(1)
    latent = LatentLMConfig(
        vocab_size=VOCAB.size,
        global_=tiny_llama(),
        local_width=16,
        encoder_layers=1,
        decoder_layers=1,
        local_heads=2,
        local_ffn=32,
    ).build(1)
    for model in (plain, latent):
        for parameter in model.parameters():  # far from uniform, so that the best id is no matter of rounding
            parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return [(plain, None), (latent, StaticPatcher(3)), (latent, None)]


@pytest.mark.parametrize(("model", "patcher"), tiny_models(), ids=["plain", "latent", "latent-tokens"])
def test_real_models_keep_the_contract(model, patcher):
    """Greedy by step == greedy by forward, and a request alone == in a batch."""
    draw = np.random.default_rng(0)
    asked = [(text(*draw.integers(0, 6, 1 + k)), speech(*draw.integers(0, 9, 2 * k))) for k in range(4)]
    own = Scorer(model, VOCAB, patcher, max_rows=3)
    for modality in ("text", "speech"):
        for prompt, ids_T in zip(asked, own.generate(asked, modality, max_tokens=8)):
            assert ids_T.tolist() == greedy_by_forward(model, patcher, prompt, modality, 8)
    requests = [Request(prompt, speech(1, 2, 3, 4)) for prompt in asked]
    for request, together in zip(requests, own.log_likelihoods(requests)):
        assert together.sum == pytest.approx(own.log_likelihoods([request])[0].sum, abs=1e-3)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("vocab", [VOCAB, BARE], ids=["marker", "bare"])
def test_continuations_of_one_prompt_share_its_pass(window, vocab, monkeypatch):
    """The same numbers as whole rows one by one, and each different prompt is read once."""
    model = PlainLMConfig(vocab_size=VOCAB.size, llama=tiny_llama(window=window)).build(1)
    draw = np.random.default_rng(0)
    asked = [(), *((text(*draw.integers(0, 6, 1 + k)), speech(*draw.integers(0, 9, 3 * k))) for k in range(1, 6))]
    endings = [text(1), text(2, 3, 0), speech(4, 5, 6, 7), text(2, 3, 1, 5, 4)]
    requests = [Request(prompt, ending) for ending in endings for prompt in asked]
    own = Scorer(model, vocab, None, max_rows=4)
    laid_out = [own._lay_out((*prompt, ending)) for prompt, ending in requests]
    with torch.no_grad():
        alone = [own._in_whole_rows([row], [len(r.continuation.ids_T)])[0] for row, r in zip(laid_out, requests)]
    read = []
    extend = type(model).read_on
    monkeypatch.setattr(
        type(model),
        "read_on",
        lambda self, ids, num, *rest: (read.append(int(num.sum())), extend(self, ids, num, *rest))[1],
    )
    scored = own.log_likelihoods(requests)
    assert [s.sum for s in scored] == pytest.approx(alone, abs=1e-4)
    whole = sum(len(row.ids_T) - 1 for row in laid_out)
    prefixes = {
        row.ids_T[: -1 - s.num_tokens].tobytes(): len(row.ids_T) - 2 - s.num_tokens for row, s in zip(laid_out, scored)
    }
    assert sum(read) == sum(prefixes.values()) + sum(s.num_tokens for s in scored) < 0.6 * whole


def test_sampling_is_seeded_per_prompt():
    asked = [(text(1, 2),), (speech(1, 2, 3, 4, 5),), (text(3),)]
    draw = scorer(patcher=Static()).generate(asked, "speech", 12, temperature=2.0, seed=5)
    again = scorer(1, Static()).generate(asked, "speech", 12, temperature=2.0, seed=5)
    other = scorer(patcher=Static()).generate(asked, "speech", 12, temperature=2.0, seed=6)
    assert [x.tolist() for x in draw] == [x.tolist() for x in again]
    assert [x.tolist() for x in draw] != [x.tolist() for x in other]
    twins = scorer(patcher=Static()).generate([asked[0]] * 4, "speech", 12, temperature=2.0, seed=5)
    assert len({tuple(x.tolist()) for x in twins}) > 1


def test_answers_end_at_the_limit_and_at_a_marker():
    model = SumLM()
    model._logits = lambda last, seen: torch.nn.functional.one_hot(
        torch.tensor(VOCAB.eos if len(seen) > 6 else VOCAB.speech_start + 4), VOCAB.size
    ).float()
    own = Scorer(model, VOCAB, None)
    short, long = own.generate([(text(1, 2, 3),), ()], "speech", max_tokens=4)
    assert short.tolist() == [4]
    assert long.tolist() == [4, 4, 4, 4]
    assert own.generate([], "text", 3) == []


def test_padding_ids_and_the_other_modality_are_never_generated():
    model = SumLM()
    model._logits = lambda last, seen: torch.arange(VOCAB.size).float()  # the best id is padding of the vocabulary
    assert Scorer(model, VOCAB, None).generate([(text(1),)], "speech", 2)[0].tolist() == [8, 8]


def test_a_module_keeps_its_training_mode_and_builds_no_graph():
    class Module(torch.nn.Module):
        def forward(self, batch):
            assert not self.training
            assert not torch.is_grad_enabled()
            return SumLM().forward(batch)

    module = Module().train()
    Scorer(module, VOCAB, None).log_likelihoods([((), text(1))])
    assert module.training


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="empty continuation"):
        scorer().log_likelihoods([((text(1),), text())])
    with pytest.raises(ValueError, match="max_rows=0"):
        scorer(max_rows=0)
    with pytest.raises(ValueError, match="max_tokens=0"):
        scorer().generate([()], "text", 0)

    class Aligned(Static):
        causal = False

    with pytest.raises(ValueError, match="static patcher"):
        scorer(patcher=Aligned()).generate([()], "text", 3)
    model = SumLM()
    model.out = model.out * float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Scorer(model, VOCAB, None).log_likelihoods([((), text(1))])
