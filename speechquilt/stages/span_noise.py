"""Noise of interleaved text by where the text comes from: generated spans read back, beside real speech of the same spans.

Spans are planned as interleaving plans them. `evals.noise` says the same of a corpus by what is written (numbers, names, code), from
the job's own sample.
Trap: a span that interleaving would refuse stays text there, so it counts here for neither; a model that refuses what it cannot say
looks better, and `refused` says how much it refuses.
"""

from collections.abc import Mapping, Sequence

from speechquilt import audio
from speechquilt.data.interleaving import synthetic
from speechquilt.data.interleaving.synthetic import InterleaveConfig
from speechquilt.evals.error_rates import error_rate, rate_measures, rate_results
from speechquilt.evals.measures import Chart, Measure, Promise, Value, at_most
from speechquilt.protocols import TextToSpeech
from speechquilt.stages.encode import encode_all
from speechquilt.stages.training_documents import speak_spans
from speechquilt.text_to_token.generate import TextToTokenEngine
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import TextDocument, Waveform

GENERATED, SPOKEN = "generated", "spoken"
TEXTS = {"wordnet": "dictionary", "bible": "Bible", "fortunes": "fortunes"}
LIMIT = 0.25
MEASURES = (
    *rate_measures(
        "noise.<text>.<by>",
        "spans of real text read back",
        promise=Promise(
            name="Noise of interleaved text, <text>",
            bound=at_most(LIMIT),
            where={"text": tuple(TEXTS), "by": (GENERATED,)},
            words=TEXTS,
        ),
        chart=Chart(title="Spans of real text read back wrong", series="by", words=TEXTS),
    ),
    Measure(key="noise.<text>.refused", kind="share", meaning="share of the spans that interleaving would have left as text"),
)  # fmt: skip


def measure_noise(
    kinds: Mapping[str, Sequence[TextDocument]],
    engine: TextToTokenEngine,
    speaker: TextToSpeech,
    tokenizer: SupervisedTokenizer,
    rule: InterleaveConfig,
    most: int,
) -> dict[str, Value]:
    """`noise.<text>.*` of each kind of text, over at most `most` spans of its first documents; `speaker` says them in its voices in
    turn. A kind without spans is left out."""
    found: dict[str, Value] = {}
    for kind, documents in kinds.items():
        plans, num_spans = [], 0
        for document in documents:
            if num_spans >= most:
                break
            plans.append(synthetic.plan(document.id, document.text, 0, rule))
            num_spans += len(plans[-1].spans)
        texts = [spoken for plan in plans for spoken in plan.spoken_spans][:most]
        spans = [span for of_plan in speak_spans(plans, engine) for span in of_plan][:most]
        kept = [
            (text, span.ids_T)
            for text, span in zip(texts, spans)
            if not synthetic.reject_reason(span, len(engine.tokenizer.encode(text)), engine.frame_rate)
        ]
        if texts:
            found[f"noise.{kind}.refused"] = 1 - len(kept) / len(texts)
        if not kept:
            continue
        said = [text for text, _ in kept]
        tokens = {
            GENERATED: [ids_T for _, ids_T in kept],
            SPOKEN: encode_all(tokenizer, spoken_waves(said, speaker, tokenizer.sample_rate)),
        }
        for by, ids in tokens.items():
            found |= rate_results(f"noise.{kind}.{by}", error_rate(zip(said, tokenizer.read_back(ids))))
    return found


def spoken_waves(texts: Sequence[str], speaker: TextToSpeech, sample_rate: int) -> list[Waveform]:
    """Each text once, the voices in turn."""
    voices = speaker.voices
    return [
        audio.resample(speaker.speak(text, voices[i % len(voices)]).audio, sample_rate) for i, text in enumerate(texts)
    ]
