"""The toy story's report: which promises were kept, the tables, the curves, samples and sound.

`python -m speechquilt.recipes.toy.report_data results.json` checks that every promised number is there (continuous
integration does).
Trap: a promise lives here, with its bound, and nowhere else. Nothing may lower a bound to pass.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import audio, config
from speechquilt.data.feed.spoken_documents import as_documents
from speechquilt.data.shards.spoken import open_shards
from speechquilt.data.sources.micro_world import MicroWorld
from speechquilt.evals import results
from speechquilt.evals.intervals import paired_difference
from speechquilt.model.patcher import PatcherConfig
from speechquilt.recipes import defaults
from speechquilt.recipes.toy.questions import OPTIONS, PAIRS
from speechquilt.reports.figures import Curve, Score, UtteranceView
from speechquilt.reports.report import Audio, ReportData, Sample, SampleRun, Stage, Table, Verdict, write_report
from speechquilt.stages.encode import encode_utterances, text_tokenizer_of
from speechquilt.stages.stage import Story
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.metrics import read_metrics
from speechquilt.tts import EspeakTTS
from speechquilt.types import Document, Segment
from speechquilt.vocab import Vocab

WITH, WITHOUT = "curriculum", "no_interleaving"  # the two runs that differ in interleaving alone
WRITTEN_ONLY = ("text", "interleaved")  # groups of facts that no recording contains
GROUP_NAMES = {"text": "facts only ever written", "interleaved": "facts written, their text interleaved"}
MEASURES = {"transfer_qa": "answered freely", "transfer": "choice of four"}
COMPARED = ("baseline", "static", "curriculum")
ARROWS = {pair: f"{pair[0]}→{pair[1]}" for pair in PAIRS}
NUM_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One line of the report's head: a result key, its bound in words, and whether a set of results keeps it."""

    name: str
    key: str
    target: str
    kept: Callable[[Mapping[str, Any]], bool]
    percent: bool = True


def _at_most(key: str, bound: float) -> Callable[[Mapping[str, Any]], bool]:
    return lambda flat: flat[key] <= bound


def _above_chance(prefix: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda flat: flat[f"{prefix}.low"] > flat[f"{prefix}.chance"]


PROMISES = (
    Promise(
        name="Tokenizer: word error rate of held-out sentences",
        key="tokenizer.wer",
        target="≤ 5 %",
        kept=_at_most("tokenizer.wer", 0.05),
    ),
    Promise(
        name="Tokenizer: codebook in use",
        key="tokenizer.codebook_used",
        target="≥ 25 %",
        kept=lambda flat: flat["tokenizer.codebook_used"] >= 0.25,
    ),
    Promise(
        name="Tokenizer: streaming gives the same tokens",
        key="tokenizer.streaming_equals_offline",
        target="yes",
        kept=lambda flat: flat["tokenizer.streaming_equals_offline"] is True,
        percent=False,
    ),
    Promise(
        name="Text-to-token: word error rate of held-out sentences",
        key="text_to_token.wer",
        target="≤ 10 %",
        kept=_at_most("text_to_token.wer", 0.10),
    ),
    Promise(
        name="Text-to-token: word error rate of spans of 1-10 words",
        key="text_to_token.wer_spans_1_10",
        target="≤ 10 %",
        kept=_at_most("text_to_token.wer_spans_1_10", 0.10),
    ),
    *(
        Promise(
            name=f"Story endings {ARROWS[pair]} above chance, {run} LST",
            key=f"lm.{run}.story.topic.{pair}.accuracy",
            target="interval above 50 %",
            kept=_above_chance(f"lm.{run}.story.topic.{pair}"),
        )
        for run in ("static", "curriculum")
        for pair in ("TT", "SS")
    ),
    *(
        Promise(
            name=f"Interleaving helps to answer spoken questions, {GROUP_NAMES[group]}, {ARROWS[pair]}",
            key=f"facts.transfer_qa.{group}.{pair}.difference",
            target="interval above 0",
            kept=lambda flat, key=f"facts.transfer_qa.{group}.{pair}.low": flat[key] > 0,  # type: ignore[misc]
        )
        for group in WRITTEN_ONLY
        for pair in ("ST", "SS")
    ),
)


def promised_keys() -> list[str]:
    """Keys without which results.json is incomplete: the promises, and the comparison of the models."""
    compared = ("speech_loss", "text_loss", "units", "tokens", "flops", "seconds", "patch_size")
    scores = [f"story.{s}.{p}.accuracy" for s in OPTIONS for p in PAIRS]
    scores += [f"{task}.{g}.{p}.accuracy" for task in ("fact", "qa") for g in WRITTEN_ONLY for p in PAIRS]
    runs = (*COMPARED, WITHOUT)
    return [p.key for p in PROMISES] + [f"lm.{run}.{key}" for run in runs for key in (*compared, *scores)]


def fact_transfer(run_dir: Path) -> dict[str, Any]:
    """Accuracy on facts that were only written, with minus without interleaved data, on the same items."""
    details = {run: json.loads((run_dir / "evals" / run / "details.json").read_text()) for run in (WITH, WITHOUT)}
    flat: dict[str, Any] = {}
    for name, task in {"transfer_qa": "qa", "transfer": "fact"}.items():
        for group in WRITTEN_ONLY:
            for pair in PAIRS:
                a, b = (details[run][f"{task}.{group}.{pair}"] for run in (WITH, WITHOUT))
                clusters = [item["cluster"] for item in a["items"]]
                right = [[item["correct"] for item in x["items"]] for x in (a, b)]
                flat |= results.transfer_results(
                    f"facts.{name}.{group}.{pair}",
                    paired_difference(right[0], right[1], clusters),
                    a["accuracy"]["value"],
                    b["accuracy"]["value"],
                )
    return flat


def verdicts(flat: Mapping[str, Any]) -> list[Verdict]:
    return [Verdict(name=p.name, target=p.target, value=_value(flat, p), met=p.kept(flat)) for p in PROMISES]


def table(flat: Mapping[str, Any]) -> str:
    """What the terminal shows at the end."""
    lines = ["", f"{'promise':<76} {'target':<22} {'measured':<26}"]
    for v in verdicts(flat):
        lines.append(f"{v.name:<76} {v.target:<22} {v.value:<26} {'met' if v.met else 'MISSED'}")
    lines += [
        "",
        f"{'model':<18}{'units':>9}{'tokens':>10}{'GFLOP':>9}{'s':>6}{'patch':>7}{'speech loss':>13}{'text loss':>11}",
    ]
    for run in (*COMPARED, WITHOUT):
        r = {
            k: flat[f"lm.{run}.{k}"]
            for k in ("units", "tokens", "flops", "seconds", "patch_size", "speech_loss", "text_loss")
        }
        lines.append(
            f"{run:<18}{r['units']:>9}{r['tokens']:>10}{r['flops'] / 1e9:>9.0f}{r['seconds']:>6.0f}"
            f"{r['patch_size']:>7.2f}{r['speech_loss']:>13.3f}{r['text_loss']:>11.3f}"
        )
    lines += ["", f"{'fact transfer, ' + WITH + ' - ' + WITHOUT:<50}" + "".join(f"{ARROWS[p]:>24}" for p in PAIRS)]
    for group in WRITTEN_ONLY:
        for name, measure in MEASURES.items():
            cells = []
            for pair in PAIRS:
                d, low, high = (100 * flat[f"facts.{name}.{group}.{pair}.{k}"] for k in ("difference", "low", "high"))
                cells.append(f"{d:>+9.1f} [{low:.0f}, {high:.0f}]".rjust(24))
            lines.append(f"{group + ', ' + measure:<50}" + "".join(cells))
    for title, prefixes in _score_rows().items():
        lines += ["", f"{title:<34}" + "".join(f"{ARROWS[p]:>24}" for p in PAIRS)]
        for label, prefix in prefixes:
            cells = []
            for pair in PAIRS:
                a, low, high = (flat[f"{prefix}.{pair}.{k}"] for k in ("accuracy", "low", "high"))
                cells.append(f"{100 * a:>9.1f} [{100 * low:.0f}, {100 * high:.0f}]".rjust(24))
            lines.append(f"{label:<34}" + "".join(cells))
    return "\n".join(lines)


def write(
    settings: Any,
    story: Story,
    flat: Mapping[str, Any],
    world: MicroWorld,
    speaker: EspeakTTS,
    tokenizer: SupervisedTokenizer,
    shards: Mapping[str, Path],
) -> Path:
    """report.html in the run folder."""
    kept = [v.met for v in verdicts(flat)]
    data = ReportData(
        title="SpeechQuilt: the whole story on a micro-world",
        lead=(
            f"{sum(kept)} of {len(kept)} promises kept. {len(world.words)} words, {len(world.facts)} facts, "
            f"{len(speaker.voices)} voices; every model trained from nothing in {flat['run.seconds'] / 60:.0f} minutes "
            f"on {flat['run.cores']} cores ({flat['run.device']})."
        ),
        verdicts=verdicts(flat),
        stages=_stages(story, flat),
        curves=[_curve(story.run_dir / "lm" / run, run) for run in (*COMPARED, WITHOUT)],
        curves_note="Training loss per token. Static and curriculum read more tokens than the baseline per global unit.",
        utterance=_utterance(world, speaker, tokenizer),
        utterance_note="A held-out sentence: log-mel, espeak-ng's word times, speech tokens, and how each patcher groups them.",
        samples=_samples(shards, tokenizer),
        samples_note="Training documents. Speech runs show what the tokenizer's ASR head reads in the tokens.",
        table_sections=_tables(flat),
        audios=_audios(world, speaker, tokenizer),
        audios_note="Held-out sentences as the tokenizer hears them. Below: what its tokens alone are read back as.",
        facts=_facts(settings, flat),
    )
    return write_report(story.run_dir / "report.html", data)


def _value(flat: Mapping[str, Any], promise: Promise) -> str:
    value = flat[promise.key]
    if not promise.percent:
        return "yes" if value else "no"
    prefix = promise.key.rpartition(".")[0]
    text = f"{100 * value:.1f} %"
    if promise.key.endswith((".accuracy", ".difference")):
        text += f" [{100 * flat[f'{prefix}.low']:.0f}, {100 * flat[f'{prefix}.high']:.0f}], n={flat[f'{prefix}.n']}"
    return text


def _score_rows() -> dict[str, list[tuple[str, str]]]:
    runs = (*COMPARED, WITHOUT)
    return {
        "story endings": [(f"{s}, {run}", f"lm.{run}.story.{s}") for s in OPTIONS for run in runs],
        "facts, choice of four": [
            (f"{g}, {run}", f"lm.{run}.fact.{g}") for g in (*WRITTEN_ONLY, "speech", "both") for run in runs
        ],
        "facts, free answers": [
            (f"{g}, {run}", f"lm.{run}.qa.{g}") for g in (*WRITTEN_ONLY, "speech", "both") for run in runs
        ],
    }


def _tables(flat: Mapping[str, Any]) -> list[tuple[str, list[Table]]]:
    def score(prefix: str) -> Score:
        keys = ("accuracy", "low", "high", "chance")
        value, low, high, chance = (flat[f"{prefix}.{k}"] for k in keys)
        return Score(value=value, low=low, high=high, chance=chance)

    models = [
        [
            run, f"{flat[f'lm.{run}.parameters'] / 1e6:.2f}", f"{flat[f'lm.{run}.units']:,}", f"{flat[f'lm.{run}.tokens']:,}",
            f"{flat[f'lm.{run}.flops'] / 1e12:.2f}", f"{flat[f'lm.{run}.seconds']:.0f}", f"{flat[f'lm.{run}.patch_size']:.2f}",
            f"{flat[f'lm.{run}.speech_loss']:.3f}", f"{flat[f'lm.{run}.text_loss']:.3f}",
        ]
        for run in (*COMPARED, WITHOUT)
    ]  # fmt: skip
    equal_units = Table(
        title="Models at equal global units",
        columns=("model", "M params", "units", "tokens", "TFLOP", "seconds", "patch", "speech loss", "text loss"),
        rows=models,
        note="Losses in nats per token on held-out stories. FLOPs count the local modules too. Patch: speech tokens per unit.",
    )
    notes = {
        "story endings": "Test stories by the likelier ending (mean log-probability per token). topic: words tell; hard: they do not.",
        "facts, choice of four": "text: only ever written. interleaved: only written, but their text went through synthetic interleaving.",
        "facts, free answers": "Greedy answers containing the right word; speech answers are read back by the tokenizer's ASR head.",
    }
    scores = [
        Table(
            title=title,
            columns=("set, model", *(ARROWS[p] for p in PAIRS)),
            rows=[[label, *(score(f"{prefix}.{p}") for p in PAIRS)] for label, prefix in prefixes],
            note=notes[title] + " Intervals: 95 %, items about one fact count once.",
        )
        for title, prefixes in _score_rows().items()
    ]
    transfer = Table(
        title="Fact transfer: with and without interleaved data",
        columns=("facts", "measure", "question, answer", "with", "without", "difference", "95 % interval"),
        rows=_transfer_rows(flat),
        note=f"{WITH} against {WITHOUT} on the same items, everything else equal; paired bootstrap over facts. No recording "
        "contains any of these facts. The first paper reports a spoken-QA score of 50.7 that falls to 2.3 without interleaving.",
    )
    keys = [k for k in flat if k.startswith(("tokenizer.", "text_to_token."))]
    parts = Table(title="Tokenizer and text-to-token model", columns=("measure", "value", "meaning"), rows=[
        [k, f"{flat[k]:.4g}" if isinstance(flat[k], float) else str(flat[k]), results.field(k).meaning] for k in keys
    ])  # fmt: skip
    return [("Language models", [equal_units, transfer, *scores]), ("Tokens", [parts])]


def _transfer_rows(flat: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for group in WRITTEN_ONLY:
        for name, measure in MEASURES.items():
            for pair in PAIRS:
                found = {
                    k: flat[f"facts.{name}.{group}.{pair}.{k}"]
                    for k in ("with", "without", "difference", "low", "high")
                }
                with_, without, difference, low, high = (f"{100 * x:.1f} %" for x in found.values())
                rows.append([group, measure, ARROWS[pair], with_, without, difference, f"{low} to {high}"])
    return rows


def _stages(story: Story, flat: Mapping[str, Any]) -> list[Stage]:
    s = story.seconds
    documents = sum(v for k, v in flat.items() if k.startswith("shards.") and k.endswith(".documents"))
    return [
        Stage(icon="world", name="Micro-world", made="stories, facts, speech", seconds=s["world"]),
        Stage(icon="tokenizer", name="Speech tokenizer", made=f"WER {100 * flat['tokenizer.wer']:.1f} % at 12.5 Hz", seconds=s["tokenizer"]),
        Stage(icon="text_to_token", name="Text-to-token", made=f"WER {100 * flat['text_to_token.wer']:.1f} %", seconds=s["text_to_token"]),
        Stage(icon="shards", name="Shards", made=f"{documents:,} documents", seconds=s["shards"]),
        Stage(icon="pretrain", name="Pre-training, evals", made=f"{len(COMPARED) + 1} models", seconds=s["lm"]),
        Stage(icon="report", name="Report", made="this page"),
    ]  # fmt: skip


def _curve(folder: Path, name: str) -> Curve:
    lines = read_metrics(folder)

    def column(key: str) -> list[float]:
        return [float("nan") if line.get(key) is None else line[key] for line in lines]

    return Curve(
        name=name,
        steps=column("step"),
        units=column("total_units"),
        flops=column("total_flops"),
        speech_loss=column("speech_loss"),
        text_loss=column("text_loss"),
    )


def _patchers() -> dict[str, Any]:
    return {kind: PatcherConfig(kind=kind, patch_size=defaults.PATCH_SIZE).build() for kind in ("static", "aligned")}


def _opens(vocab: Vocab, segment: Segment, patcher: Any) -> list[bool]:
    """Patch borders of one speech segment standing alone."""
    out = vocab.lay_out(Document(id="view", segments=(segment,), source="view"))
    return patcher(out, 0.0)[0][out.is_speech_T].tolist()


def _utterance(world: MicroWorld, speaker: EspeakTTS, tokenizer: SupervisedTokenizer) -> UtteranceView:
    spoken = speaker.speak(world.held_out_sentences(8)[6], speaker.voices[0])
    (tokens,) = encode_utterances(tokenizer, [spoken])
    wave = audio.resample(spoken.audio, tokenizer.sample_rate)
    mel_MF = audio.LogMel(num_mels=80, mode="stream")(torch.from_numpy(wave.samples_S)[None])[0].numpy()
    segment = Segment(modality="speech", ids_T=tokens.ids_T, unit_end_T=tokens.unit_end_T)
    vocab = Vocab(num_text=1, num_speech=tokenizer.vocab_size)
    return UtteranceView(
        mel_MF=mel_MF,
        duration_s=wave.duration_s,
        words=spoken.alignment,
        ids_T=tokens.ids_T.tolist(),
        frame_rate=tokenizer.frame_rate,
        patchings={name: _opens(vocab, segment, patcher) for name, patcher in _patchers().items()},
    )


def _samples(shards: Mapping[str, Path], tokenizer: SupervisedTokenizer) -> list[Sample]:
    text_tokenizer = text_tokenizer_of(tokenizer)
    vocab = Vocab(num_text=text_tokenizer.size, num_speech=tokenizer.vocab_size)
    static = _patchers()["static"]
    samples = []
    for source in ("interleaved", "parallel"):
        folder = open_shards(shards[source])
        documents = as_documents(folder, text_tokenizer.encode)
        for i in np.linspace(0, len(folder) - 1, NUM_SAMPLES // 2 + 2, dtype=int)[1:-1].tolist():
            runs = []
            for segment in documents[i].segments:
                if segment.modality == "text":
                    runs.append(SampleRun(modality="text", text=text_tokenizer.decode(segment.ids_T.tolist())))
                    continue
                runs.append(
                    SampleRun(
                        modality="speech",
                        text=tokenizer.read_back([segment.ids_T])[0],
                        ids_T=segment.ids_T.tolist(),
                        opens_T=_opens(vocab, segment, static),
                        word_end_T=() if segment.unit_end_T is None else (segment.unit_end_T > 0).tolist(),
                    )
                )
            samples.append(Sample(label=f"{source}: {folder[i].id}", runs=runs, note=folder.text(i)))
    return samples


def _audios(world: MicroWorld, speaker: EspeakTTS, tokenizer: SupervisedTokenizer) -> list[Audio]:
    texts = world.held_out_sentences(len(speaker.voices))
    spoken = [speaker.speak(text, voice) for text, voice in zip(texts, speaker.voices)]
    heard = tokenizer.read_back([t.ids_T for t in encode_utterances(tokenizer, spoken)])
    return [
        Audio(
            label=f"voice {voice}",
            wav=audio.to_wav_bytes(audio.resample(u.audio, tokenizer.sample_rate)),
            transcript=u.text,
            note=f"read back from its tokens: {text}",
        )
        for voice, u, text in zip(speaker.voices, spoken, heard)
    ]


def _facts(settings: Any, flat: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("command", "speechquilt story toy"),
        ("machine", f"{os.cpu_count()} cores, {flat['run.device']}, torch {flat['run.torch']}"),
        ("wall time", f"{flat['run.seconds']:.0f} s"),
        ("settings", json.dumps(config.to_dict(settings))),
    ]


def main(arguments: Sequence[str]) -> int:
    """Exit 1 when a promised number is missing; a missed target is printed and is no failure."""
    flat = results.read_results(Path(arguments[0]))
    missing = [key for key in promised_keys() if key not in flat]
    for key in missing:
        print(f"missing: {key}")
    for v in [] if missing else verdicts(flat):
        print(f"{'met   ' if v.met else 'MISSED'} {v.name}: {v.value} (target {v.target})")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
