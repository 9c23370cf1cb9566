"""The toy story's page: what happened, one utterance, samples and sound, then promises, curves and tables.

`python -m speechquilt.recipes.toy.report_data results.json` checks that every promised number is there (continuous
integration does).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechquilt import config
from speechquilt.data.sources.micro_world import MicroWorld
from speechquilt.evals.measures import ARROWS
from speechquilt.evals.results import read_results
from speechquilt.recipes import defaults
from speechquilt.recipes.story_parts import curve, samples, utterance_view
from speechquilt.recipes.toy import sounds
from speechquilt.recipes.toy.fact_transfer import WITH, WITHOUT
from speechquilt.recipes.toy.questions import OPTIONS, PAIRS, WRITTEN_ONLY
from speechquilt.recipes.toy.schema import SCHEMA
from speechquilt.reports.charts import Point, UtteranceView
from speechquilt.reports.result_tables import result_tables, score_charts
from speechquilt.reports.story_page import (
    IntervalChart,
    Sample,
    Stage,
    StoryPage,
    write_story_page,
)
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.stage import Story
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.espeak import EspeakTTS

HOW_ASKED = {"transfer_qa": "answered freely", "transfer": "choice of four"}
COMPARED = ("baseline", "static", "curriculum")
ORDER = (*COMPARED, WITHOUT, *OPTIONS, *WRITTEN_ONLY, "speech", "both", *PAIRS)  # of rows and columns
TITLES = {  # of the tables, by family of measures; "" is shown elsewhere on the page
    "run": "",
    "stage.<stage>": "",
    "lm.<run>": "Language models at equal global units",
    "facts.transfer_qa.<group>.<pair>": f"Fact transfer, answered freely: {WITH} minus {WITHOUT}",
    "facts.transfer.<group>.<pair>": f"Fact transfer, choice of four: {WITH} minus {WITHOUT}",
    "lm.<run>.story.<set>.<pair>": "Story endings",
    "lm.<run>.fact.<group>.<pair>": "Facts, choice of four",
    "lm.<run>.qa.<group>.<pair>": "Facts, free answers",
    "tokenizer": "Speech tokenizer",
    "text_to_token": "Text-to-token model",
    "shards.<source>": "Training documents, by source",
    "decoder": "Speech decoder",
    "decoder.heard.<by>.<what>": "What the speech decoder says, read",
}


def needed_keys() -> list[str]:
    """Keys without which results.json is incomplete: the promises, and the comparison of the models."""
    compared = ("speech_loss", "text_loss", "units", "tokens", "flops", "seconds", "patch_size")
    scores = [f"story.{s}.{p}.accuracy" for s in OPTIONS for p in PAIRS]
    scores += [f"{task}.{g}.{p}.accuracy" for task in ("fact", "qa") for g in WRITTEN_ONLY for p in PAIRS]
    runs = (*COMPARED, WITHOUT)
    return SCHEMA.promised_keys() + [f"lm.{run}.{key}" for run in runs for key in (*compared, *scores)]


def table(flat: Mapping[str, Any]) -> str:
    """What the terminal shows at the end."""
    lines = ["", f"{'promise':<76} {'target':<22} {'measured':<26}"]
    for v in SCHEMA.verdicts(flat):
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
        for name, measure in HOW_ASKED.items():
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
    tables = result_tables(SCHEMA, flat, TITLES, ORDER)
    page = StoryPage(
        title="SpeechQuilt: the whole story on a micro-world",
        sentences=_sentences(flat, world, speaker),
        headline=_headline(flat),
        utterance=_utterance(world, speaker, tokenizer),
        utterance_note="A held-out sentence: log-mel, espeak-ng's word times, speech tokens, and how each patcher groups them.",
        samples=_samples(shards, tokenizer),
        samples_note="Training documents. Speech runs show what the tokenizer's ASR head reads in the tokens.",
        audios=sounds.players(story.run_dir, world, speaker, tokenizer),
        audios_note="What goes in, and what comes out: a held-out sentence in each voice, the same made again from its tokens in "
        "the decoder's one voice, a new sentence by the text-to-token model, and a spoken answer of a language model. Below: what "
        "the tokens alone are read back as.",
        verdicts=SCHEMA.verdicts(flat),
        curves=[curve(story.run_dir / "lm" / run, run.replace("_", " ")) for run in (*COMPARED, WITHOUT)],
        curves_note="Training loss per token. Static and curriculum read more tokens than the baseline per global unit.",
        scores=score_charts(SCHEMA, flat, ORDER),
        scores_note="S→T: asked in speech, answered in text; the others alike. Stories: the words alone tell the right ending in the "
        "set topic, and do not in hard. Facts: the group text is only ever written, interleaved is written and its text "
        "interleaved, speech is only spoken, both is both. Items about one fact or story count once.",
        table_sections=[("Tables", tables)],
        stages=_stages(story, flat),
        facts=_facts(settings, flat),
    )
    return write_story_page(story.run_dir / "report.html", page)


def _sentences(flat: Mapping[str, Any], world: MicroWorld, speaker: EspeakTTS) -> list[str]:
    """What happened, in three."""
    verdicts = SCHEMA.verdicts(flat)
    kept = sum(v.met for v in verdicts)
    errors, spoken_errors = (100 * flat[f"{part}.wer"] for part in ("tokenizer", "text_to_token"))

    def right(run: str, pair: str) -> str:
        return f"{100 * flat[f'lm.{run}.qa.interleaved.{pair}.accuracy']:.0f} %"

    return [
        f"In {flat['run.seconds'] / 60:.0f} minutes on {flat['run.cores']} cores, SpeechQuilt learned to turn speech into "
        f"tokens ({errors:.1f} % word errors when read back) and text into the same tokens ({spoken_errors:.1f} %), and "
        f"trained four speech-text language models, all from nothing, on an invented world of "
        f"{len(world.words)} words, {len(world.facts)} facts and {len(speaker.voices)} voices.",
        f"Asked aloud about facts that no recording contains but whose text was interleaved with speech, the model answers "
        f"{right(WITH, 'ST')} correctly in text and {right(WITH, 'SS')} in speech; trained without interleaved data, the "
        f"same model answers {right(WITHOUT, 'ST')} and {right(WITHOUT, 'SS')}.",
        f"{kept} of {len(verdicts)} promised results were met"
        + (f", and {len(verdicts) - kept} missed" if kept < len(verdicts) else "")
        + ".",
    ]


def _headline(flat: Mapping[str, Any]) -> IntervalChart:
    """Spoken questions with and without interleaved data in training."""
    groups = {"interleaved": "facts whose text was interleaved", "text": "facts in plain text only"}
    answers = {"ST": "answer in text", "SS": "answer in speech"}
    points = []
    for group, facts in groups.items():
        for pair, answer in answers.items():
            for run, series in ((WITH, "with interleaved data"), (WITHOUT, "without")):
                value, low, high = (flat[f"lm.{run}.qa.{group}.{pair}.{key}"] for key in ("accuracy", "low", "high"))
                points.append(Point(row=f"{facts}, {answer}", series=series, value=value, low=low, high=high))
    note = "Free answers with the right word, with 95 % intervals. Both models are the same but for interleaved data in training."
    title = "Spoken questions about facts that no recording contains"
    return IntervalChart(title=title, points=points, note=note, paints=("speech", "muted"))


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


def _stages(story: Story, flat: Mapping[str, Any]) -> list[Stage]:
    s = story.seconds
    documents = sum(v for k, v in flat.items() if k.startswith("shards.") and k.endswith(".documents"))
    return [
        Stage(name="Micro-world", made="stories, facts, speech", seconds=s["world"]),
        Stage(name="Speech tokenizer", made=f"WER {100 * flat['tokenizer.wer']:.1f} % at 12.5 Hz", seconds=s["tokenizer"]),
        Stage(name="Text-to-token", made=f"WER {100 * flat['text_to_token.wer']:.1f} %", seconds=s["text_to_token"]),
        Stage(name="Shards", made=f"{documents:,} documents", seconds=s["shards"]),
        Stage(name="Pre-training, evals", made=f"{len(COMPARED) + 1} models", seconds=s["lm"]),
        Stage(name="Speech decoder", made=f"WER {100 * flat['decoder.heard.own.sound.wer']:.1f} % of its sound", seconds=s["decoder"]),
        Stage(name="Report", made="this page"),
    ]  # fmt: skip


def _utterance(world: MicroWorld, speaker: EspeakTTS, tokenizer: SupervisedTokenizer) -> UtteranceView:
    spoken = speaker.speak(world.held_out_sentences(8)[6], speaker.voices[0])
    return utterance_view(spoken, tokenizer, defaults.PATCH_SIZE)


def _samples(shards: Mapping[str, Path], tokenizer: SupervisedTokenizer) -> list[Sample]:
    shown = {source: shards[source] for source in ("interleaved", "parallel")}
    return samples(shown, tokenizer, text_tokenizer_of(tokenizer), defaults.PATCH_SIZE)


def _facts(settings: Any, flat: Mapping[str, Any]) -> list[tuple[str, str]]:
    run = [m for m in SCHEMA.measures if m.key.startswith("run.") and m.key in flat]
    return [
        ("command", "speechquilt story toy"),
        *((m.key.removeprefix("run."), m.shown(flat[m.key])) for m in run),
        ("settings", json.dumps(config.to_dict(settings))),
    ]


def main(arguments: Sequence[str]) -> int:
    """Exit 1 when a promised number is missing; a missed target is printed and is no failure."""
    flat = read_results(Path(arguments[0]), SCHEMA)
    missing = [key for key in needed_keys() if key not in flat]
    for key in missing:
        print(f"missing: {key}")
    for v in [] if missing else SCHEMA.verdicts(flat):
        print(f"{'met   ' if v.met else 'MISSED'} {v.name}: {v.value} (target {v.target})")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
