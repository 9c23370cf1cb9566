"""Noise of interleaved text: spans that interleaving would take, generated and spoken, kind by kind."""

import numpy as np
import pytest

from speechquilt.data.interleaving.synthetic import InterleaveConfig, plan
from speechquilt.evals.results import Schema
from speechquilt.stages.encode import encode_all
from speechquilt.stages.span_noise import MEASURES, measure_noise, spoken_waves
from speechquilt.types import SpokenSpan, TextDocument, Utterance, Waveform
from tests.contracts.tiny_tokenizer import TEXT, build
from tests.parity.tiny_tokenizers import noise

RULE = InterleaveConfig(min_words=5)
DOCUMENTS = [
    TextDocument(id=f"d{i}", text=" ".join(["the cat sat on the mat where does anna live"] * 6)) for i in range(4)
]


class Speaker:
    """A sound per text; it notes who said what."""

    voices = ("a", "b")

    def __init__(self):
        self.said = []

    def speak(self, text, voice):
        self.said.append((text, voice))
        samples_S = noise(len(text), 0.06 * len(text)).numpy()
        return Utterance(id=text, text=text, audio=Waveform(samples_S=samples_S, sample_rate=16000))


class Engine:
    """Says what the speaker says, in tokens; a text whose turn is `refused` gets too few."""

    frame_rate, tokenizer = 12.5, TEXT

    def __init__(self, speech, refused=()):
        self.speech, self.refused = speech, refused

    def generate(self, texts, seeds):
        ids = encode_all(self.speech, spoken_waves(texts, Speaker(), 16000))
        ids = [ids_T[: 0 if k in self.refused else None] for k, ids_T in enumerate(ids)]
        return [SpokenSpan(ids_T=ids_T, unit_end_T=np.zeros(len(ids_T))) for ids_T in ids]


@pytest.fixture(scope="module")
def tokenizer():
    return build(seed=3)


def test_tokens_of_real_speech_have_the_noise_of_real_speech(tokenizer):
    found = measure_noise({"bible": DOCUMENTS, "fortunes": []}, Engine(tokenizer), Speaker(), tokenizer, RULE, most=9)
    Schema(MEASURES).check(found)
    generated, spoken = (
        {k.rpartition(".")[2]: v for k, v in found.items() if k.startswith(f"noise.bible.{by}")}
        for by in ("generated", "spoken")
    )
    assert generated == spoken
    assert generated["n"] == 9
    assert found["noise.bible.refused"] == 0
    assert not [key for key in found if "fortunes" in key]
    verdicts = {v.name: v.value for v in Schema(MEASURES).verdicts(found)}
    assert verdicts["Noise of interleaved text, fortunes"] == "not measured"
    assert verdicts["Noise of interleaved text, Bible"] != "not measured"


def test_what_interleaving_refuses_counts_for_neither(tokenizer):
    speaker = Speaker()
    found = measure_noise({"bible": DOCUMENTS}, Engine(tokenizer, refused=(0, 3)), speaker, tokenizer, RULE, most=8)
    planned = [span for d in DOCUMENTS for span in plan(d.id, d.text, 0, RULE).spoken_spans][:8]
    assert [text for text, _ in speaker.said] == [text for k, text in enumerate(planned) if k not in (0, 3)]
    assert {voice for _, voice in speaker.said} == {"a", "b"}
    assert found["noise.bible.refused"] == 2 / 8
    assert found["noise.bible.generated.n"] == found["noise.bible.spoken.n"] == 6
