"""The engine over completions, run by a second real backend: transformers' `generate` on the saved folder, behind vLLM's seam."""

from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessor

from speechquilt.text_to_token import vllm_engine
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.text_to_token.network import save
from speechquilt.text_to_token.vllm_engine import Call, CompletionEngine
from tests.contracts.test_text_to_token import (
    CONFIG,
    SENTENCES,
    TOKENIZER,
    TextToTokenDataConfig,
    biased,
    engine,
    one_thread,  # noqa: F401, a fixture
    same,
    spoken,
    train,
)

TEXTS = ["red", "dog runs here", "Zebra, blue cat!", "", "there there there", "?!", " ".join(SENTENCES[3])]


@pytest.fixture(scope="module")
def half_trained():
    """Knows a little: its answers have silences, ends and some runaways."""
    data = TextToTokenDataConfig(rows=2, row_tokens=128, spans_per_utterance=1)
    return train(data.build([spoken(s) for s in SENTENCES], TOKENIZER, CONFIG.vocab), steps=25)


class Allowed(LogitsProcessor):
    def __init__(self, ids) -> None:
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, self.ids, scores[:, self.ids])


class Transformers:
    """`Complete` by `LlamaForCausalLM.generate`, prompt by prompt; `calls` is what was asked."""

    def __init__(self, folder) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.calls: list[Call] = []

    def __call__(self, prompts, calls):
        self.calls += calls
        return [self.one(prompt, call) for prompt, call in zip(prompts, calls)]

    def one(self, prompt, call):
        torch.manual_seed(call.seed)
        sampling = {"do_sample": True, "temperature": call.temperature, "top_p": call.top_p, "top_k": 0}
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            logits_processor=[Allowed(call.allowed)],
            eos_token_id=call.stop,
            min_new_tokens=call.min_tokens,
            max_new_tokens=call.max_tokens,
            pad_token_id=CONFIG.vocab.pad,
            **(sampling if call.temperature else {"do_sample": False}),
        )
        return out[0, len(prompt) :].tolist()


def completions(folder, model, cue="word", **change):
    save(folder, model, TOKENIZER, speech_fingerprint="abc123")
    return CompletionEngine(Transformers(folder), CONFIG.vocab, TOKENIZER, cue, EngineConfig(**change))


@pytest.mark.parametrize("weights", ["half trained", "always speech", "always WORD_END"])
def test_greedy_answers_are_those_of_our_engine(tmp_path, half_trained, weights):
    model = half_trained if weights == "half trained" else biased({"always speech": "speech"}.get(weights, "word_end"))
    change = {"temperature": 0, "max_retries": 1, "cap_per_token": 6}
    theirs = completions(tmp_path, model, **change).generate(TEXTS, range(len(TEXTS)))
    ours = engine(model, **change).generate(TEXTS, range(len(TEXTS)))
    assert all(map(same, theirs, ours)), [(a, b) for a, b in zip(theirs, ours) if not same(a, b)]
    assert {s.reject for s in ours} >= {"empty text", "nothing speakable"}
    if weights == "always speech":
        assert [s.reject for s in ours].count("length cap") == 5  # a cap is met in the same place too


def test_sampled_answers_belong_to_their_request(tmp_path, half_trained):
    speaker = completions(tmp_path, half_trained, temperature=1.5, top_p=1.0, max_retries=1, cap_per_token=6)
    texts = TEXTS[:3]
    together = speaker.generate(texts, [7, 8, 9])
    assert all(map(same, together[::-1], speaker.generate(texts[::-1], [9, 8, 7])))
    assert not same(together[1], speaker.generate([texts[1]], [88])[0])
    seeds = [call.seed for call in speaker.complete.calls]
    assert len(set(seeds)) > len(seeds) / 4  # each completion its own


def test_what_a_backend_may_not_do_is_an_error(tmp_path):
    def mute(prompts, calls):
        return [[] for _ in prompts]

    def wrong(prompts, calls):
        return [[CONFIG.vocab.word_end] for _ in prompts]

    for complete, error in ((mute, "came back empty"), (wrong, "not legal")):
        speaker = CompletionEngine(complete, CONFIG.vocab, TOKENIZER, "word")
        with pytest.raises((RuntimeError, ValueError), match=error):
            speaker.generate(["red"], [0])
    with pytest.raises(ValueError, match="1 texts and 2 seeds"):
        speaker.generate(["red"], [0, 1])


@pytest.mark.skipif(find_spec("vllm") is not None, reason="only where vLLM is missing")
def test_without_vllm_the_extra_is_named(tmp_path, half_trained):
    save(tmp_path, half_trained, TOKENIZER, speech_fingerprint="abc123")
    with pytest.raises(ImportError, match=r"speechquilt\[vllm\]"):
        vllm_engine.load_vllm(tmp_path)
