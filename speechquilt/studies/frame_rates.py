"""How much of the words survives at 50, 25, 12.5 and 6.25 tokens per second? One tokenizer per rate on the micro-world.

The study leaves results.json, frame_rates.md (the paper's numbers beside ours) and frame_rates.svg in `run_dir`.
Cost: four trainings of the toy tokenizer's length, one core each, as many at a time as there are cores. Result:
docs/results.md.
Trap: every rate has the same network, steps, data and codebook unless `codebook_sizes` says otherwise, so bit rate and
frame rate change together. And a sentence with more text ids than tokens cannot be learnt with CTC: the lower the rate,
the more recordings are left out, which the table counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechquilt.config import to_dict
from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.files import write_json
from speechquilt.recipes import defaults
from speechquilt.reports import charts
from speechquilt.stages import workers
from speechquilt.stages.corpus import join, speak
from speechquilt.stages.stage import Story, remembered
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.studies.rate_figure import RatePoint, rate_svg
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.tokenizer.encoder import EncoderSizes
from speechquilt.tokenizer.whisper_sizes import RATES
from speechquilt.tts.espeak import EspeakTTSConfig

PAPER_WER = {50.0: (1.85, 3.78), 25.0: (1.94, 4.16), 12.5: (2.10, 4.90), 6.25: None}  # % on LibriSpeech (spec 1, 2.7)


@dataclass(frozen=True, kw_only=True)
class FrameRatesConfig:
    """Tokenizers of several frame rates, everything else the same."""

    run_dir: str = "runs/frame_rates"
    """Folder that holds the study."""
    rates: tuple[float, ...] = (50.0, 25.0, 12.5, 6.25)
    """Speech tokens per second to compare: each one of 50, 25, 12.5 and 6.25, none twice."""
    codebook_sizes: tuple[int, ...] = (256, 256, 256, 256)
    """Codes at each of the rates, in the same order; more codes keep more of the speech."""
    world: MicroWorldConfig = MicroWorldConfig()
    """Which micro-world."""
    voices: EspeakTTSConfig = EspeakTTSConfig()
    """Who speaks, and how."""
    sentences: int = 8000
    """Different sentences to train on."""
    max_joined: int = 5
    """Most sentences in one training recording; 1 to this many are joined."""
    held_out: int = 200
    """Sentences that are spoken one by one to measure on."""
    tokenizer: TokenizerRecipe = replace(defaults.TOKENIZER, train=replace(defaults.TOKENIZER.train, num_threads=1))
    """How each tokenizer is trained; pooling and codebook size are set for its rate."""

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.codebook_sizes) or not self.rates or len(set(self.rates)) < len(self.rates):
            raise ValueError(
                f"rates={self.rates} must differ, with one of codebook_sizes={self.codebook_sizes} for each"
            )
        for rate in self.rates:
            if rate not in RATES:
                raise ValueError(f"rates={self.rates}: {rate} must be one of {', '.join(map(str, RATES))} Hz")

    def recipe(self, rate: float) -> TokenizerRecipe:
        """The same training with another pooling; block and window in whole tokens of every rate."""
        sizes: EncoderSizes = self.tokenizer.model
        whole = {key: getattr(sizes, key) - getattr(sizes, key) % 8 for key in ("block_frames", "max_frames")}
        codebook_size = self.codebook_sizes[self.rates.index(rate)]
        model = replace(self.tokenizer.model, pooling=RATES[rate].pooling, codebook_size=codebook_size, **whole)
        return replace(self.tokenizer, model=model)

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            study(self)


def study(config: FrameRatesConfig) -> Path:
    """Train what is missing, write the three files, return the path of frame_rates.md."""
    charts.require()  # before hours of training
    stages = Story(Path(config.run_dir))
    jobs = [(config, rate) for rate in config.rates]
    stages.stage(
        "rates",
        replace(config, run_dir=""),
        lambda folder: _merged(workers.run_all(train_rate, jobs)),
        what=f"{len(jobs)} tokenizers, {workers.num_workers(len(jobs))} at a time",
    )
    points = [_point(stages.results, rate) for rate in config.rates]
    rows = [_row(stages.results, point) for point in points]
    write_json(stages.run_dir / "results.json", {"config": to_dict(config), "rates": rows})
    (stages.run_dir / "frame_rates.svg").write_text(rate_svg(points))
    table = stages.run_dir / "frame_rates.md"
    table.write_text(_markdown(rows))
    print(table.read_text())
    return table


def train_rate(config: FrameRatesConfig, rate: float) -> dict[str, Any]:
    """One tokenizer, as a stage of its own: what is complete is skipped, what was interrupted continues."""
    stages = Story(Path(config.run_dir) / "rates" / name_of(rate))
    recipe = config.recipe(rate)

    def make(folder: Path) -> dict[str, Any]:
        world, speaker = config.world.build(), config.voices.build()
        train = speak(
            speaker, join(world.sentences(config.sentences), config.max_joined, seed=0), f"speak, {rate:g} Hz"
        )
        held_out = speak(speaker, world.held_out_sentences(config.held_out), f"held-out, {rate:g} Hz")
        texts = TextTokenizer.train([spoken_form(u.text) for u in train], recipe.model.text_vocab_size)
        return train_tokenizer(recipe, texts, train, held_out, folder)

    spoken = [config.world, config.voices, config.sentences, config.max_joined, config.held_out]
    stages.stage("tokenizer", [spoken, recipe], make, what=f"a tokenizer of {rate:g} tokens per second")
    return {f"{name_of(rate)}.{key}": value for key, value in stages.results.items()}


def name_of(rate: float) -> str:
    """Folder and key of a rate, without a point: 6.25 -> "6_25hz"."""
    return f"{rate:g}hz".replace(".", "_")


def _merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for found in results for key, value in found.items()}


def _point(results: dict[str, Any], rate: float) -> RatePoint:
    def of(key: str) -> Any:
        return results[f"{name_of(rate)}.tokenizer.{key}"]

    return RatePoint(frame_rate=rate, bit_rate=rate * math.log2(of("codebook_size")), wer=of("wer"))


def _row(results: dict[str, Any], point: RatePoint) -> dict[str, Any]:
    prefix = f"{name_of(point.frame_rate)}.tokenizer."
    keys = ("codebook_size", "wer", "wer_attention", "cer", "codebook_used", "perplexity", "left_out", "wer_n", "steps")
    found = {key: results[prefix + key] for key in keys}
    return {"frame_rate": point.frame_rate, "bit_rate": point.bit_rate, **found, "paper": _paper(point.frame_rate)}


def _paper(rate: float) -> dict[str, Any]:
    """What the paper trained and measured at this rate; WER None where its table has a misprint."""
    codes, rates = RATES[rate].codebook_size, PAPER_WER[rate]
    clean, other = rates or (None, None)
    return {"codebook_size": codes, "bit_rate": rate * math.log2(codes), "wer_clean": clean, "wer_other": other}


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| Hz | codes | bit/s | WER | WER, attention | CER | codes used | left out | paper: bit/s | WER clean | WER other |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        paper = row["paper"]
        cells = [
            f"{row['frame_rate']:g}",
            str(row["codebook_size"]),
            f"{row['bit_rate']:.0f}",
            *(f"{100 * row[key]:.2f} %" for key in ("wer", "wer_attention", "cer")),
            f"{100 * row['codebook_used']:.0f} %",
            str(row["left_out"]),
            f"{paper['bit_rate']:.0f}",
            *("?" if paper[key] is None else f"{paper[key]:.2f} %" for key in ("wer_clean", "wer_other")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    n = rows[0]["wer_n"]
    lines += [
        "",
        f"Ours: {n} held-out sentences of the micro-world by espeak-ng, tokens read back by the CTC head (or the attention "
        f"head) after {rows[0]['steps']} steps. The paper's: LibriSpeech, after fine-tuning whisper-large-v3; other data and "
        "another model, so only the trend compares.",
    ]
    return "\n".join(lines) + "\n"
