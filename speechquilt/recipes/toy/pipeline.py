"""`speechquilt story toy`: the whole pipeline on the micro-world, from nothing to a report.

Cost of the default (`scale=1`): about 25 minutes on two CPU cores. Expected result: docs/results.md.
`scale=N` makes the same story larger: N times the world and its corpus, and N times the training steps of every model,
so about N times the time; scale=4 is an evening on two cores.
Trap: nothing here may be tuned on the test items. Settings were chosen on training loss and held-out sentences.
"""

import dataclasses
import json
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from speechquilt import audio
from speechquilt.data.interleaving.synthetic import InterleaveConfig, InterleaveStats
from speechquilt.data.sources.micro_world import MicroWorld, MicroWorldConfig
from speechquilt.decoder import speech_decoder
from speechquilt.evals import results
from speechquilt.evals.measures import Measure
from speechquilt.files import write_json
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.recipes import defaults
from speechquilt.recipes.toy.questions import Voicer, fact_tasks, question_tasks, story_tasks
from speechquilt.reports import charts
from speechquilt.stages import workers
from speechquilt.stages.corpus import Corpus, MicroCorpusConfig, micro_world_corpus, speak
from speechquilt.stages.encode import encode_all, encode_utterances, text_tokenizer_of
from speechquilt.stages.heard_sound import heard_sound
from speechquilt.stages.run_facts import run_facts
from speechquilt.stages.sound_pieces import in_memory
from speechquilt.stages.stage import MARK, Story, remembered
from speechquilt.stages.train_decoder import DecoderRecipe, train_decoder
from speechquilt.stages.train_lm import LMRecipe, load_scorer, train_lm
from speechquilt.stages.train_text_to_token import TextToTokenRecipe, train_text_to_token
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.stages.training_documents import (
    INSTRUCTIONS,
    SOURCES,
    interleaved_documents,
    pair_documents,
    shard_info,
    speech_documents,
    spoken_texts,
    text_documents,
    text_segment,
    write_documents,
    write_spoken,
)
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import network
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.trainer import TrainConfig
from speechquilt.tts.espeak import EspeakTTS, EspeakTTSConfig
from speechquilt.types import Waveform

INTERLEAVED = ("interleaved", "parallel")  # what the run without interleaving does not see
STAGES = ("world", "tokenizer", "text_to_token", "shards")  # before any language model, in order
MEASURES = (Measure(key="run.seed", kind="count", meaning="seed of the run"),)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One language model of the comparison. Everything else is the same for all of them."""

    kind: str
    """"plain" steps over every token, "latent" over patches."""
    patcher: PatcherConfig
    """How speech tokens are grouped into patches; of kind none for a plain model."""
    interleaved: bool = True
    """Whether it reads interleaved documents; without them the other sources fill up."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Every number of the toy story."""

    run_dir: str = "runs/toy"
    """Folder that holds the story; started again in it, the story goes on where it stopped."""
    scale: int = 1
    """Times as large a world and corpus, and times as many training steps, as the other settings say; at least 1."""
    world: MicroWorldConfig = MicroWorldConfig()
    """Which micro-world."""
    voices: EspeakTTSConfig = EspeakTTSConfig()
    """Who speaks, and how."""
    corpus: MicroCorpusConfig = MicroCorpusConfig()
    """How much of the world is written and spoken."""
    tokenizer: TokenizerRecipe = defaults.TOKENIZER
    """How the speech tokenizer is trained."""
    text_to_token: TextToTokenRecipe = defaults.TEXT_TO_TOKEN
    """How the text-to-token model is trained."""
    interleave: InterleaveConfig = InterleaveConfig()
    """Which words of the texts become speech."""
    interleave_passes: int = 4
    """How often each text is interleaved, with other words spoken each time."""
    lm: LMRecipe = defaults.LM
    """How every language model is trained; model is that of the latent ones, and each of runs sets its own patcher."""
    plain: PlainLMConfig = defaults.PLAIN
    """Sizes of the plain language models."""
    runs: dict[str, RunConfig] = field(
        default_factory=lambda: {
            "baseline": RunConfig(kind="plain", patcher=PatcherConfig(kind="none")),
            "static": RunConfig(kind="latent", patcher=PatcherConfig(kind="static", patch_size=defaults.PATCH_SIZE)),
            "curriculum": RunConfig(
                kind="latent", patcher=PatcherConfig(kind="curriculum", patch_size=defaults.PATCH_SIZE)
            ),
            "no_interleaving": RunConfig(
                kind="latent",
                patcher=PatcherConfig(kind="curriculum", patch_size=defaults.PATCH_SIZE),
                interleaved=False,
            ),
        }
    )
    """The language models to compare, by name."""
    decoder: DecoderRecipe = defaults.DECODER
    """How the speech decoder is trained: in all voices, then in the first."""
    num_heard: int = 100
    """Held-out sentences that are made again from their tokens and read."""
    num_stories: int = 100
    """Test stories of each of the two kinds (topic, hard) that the models choose endings for."""

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            story(self)


def scaled(config: ToyConfig) -> ToyConfig:
    """`scale` carried out: a world, a corpus and runs that many times as large."""
    n = config.scale
    if n < 1:
        raise ValueError(f"scale={n} must be at least 1; it makes the story larger")

    def longer(train: TrainConfig) -> TrainConfig:
        return dataclasses.replace(train, steps=n * train.steps, warmup_steps=n * train.warmup_steps)

    sizes = ("sentences", "held_out", "story_documents", "fact_documents")
    corpus = {name: n * getattr(config.corpus, name) for name in sizes}
    return dataclasses.replace(
        config,
        scale=1,
        world=dataclasses.replace(config.world, size=n * config.world.size),
        corpus=dataclasses.replace(config.corpus, **corpus),
        tokenizer=dataclasses.replace(config.tokenizer, train=longer(config.tokenizer.train)),
        text_to_token=dataclasses.replace(config.text_to_token, train=longer(config.text_to_token.train)),
        lm=dataclasses.replace(config.lm, train=longer(config.lm.train)),
        decoder=dataclasses.replace(
            config.decoder,
            first=longer(config.decoder.first) if config.decoder.first else None,
            train=longer(config.decoder.train),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What language models are trained on: finished folders."""

    fingerprint: str
    """Of all stages that made them."""
    tokenizer_dir: Path
    """The speech tokenizer."""
    text_to_token_dir: Path
    """The text-to-token model."""
    shards: dict[str, Path]
    """The folder of each source, by name."""


def story(config: ToyConfig) -> Path:
    """Run all stages; returns the path of report.html. What is complete is skipped, what was interrupted continues."""
    charts.require()  # the report's, before the work and not after it
    full = scaled(config)
    stages = Story(Path(full.run_dir))
    made = prepare(full, stages)
    jobs = [(full, name, made) for name in full.runs]
    stages.stage(
        "lm",
        [lm_recipe(full, run) for run in full.runs.values()],
        lambda folder: dict(ChainMap(*workers.run_all(train_and_evaluate, jobs))),
        what=f"{len(jobs)} speech-text language models, {workers.num_workers(len(jobs))} at a time, each trained and asked",
    )
    stages.stage(
        "decoder",
        [full.decoder, full.num_heard],
        lambda folder: make_decoder(full, made, folder),
        what="a speech decoder: tokens become sound, block by block",
    )
    return finish(config, stages, made)


def prepare(full: ToyConfig, stages: Story) -> Prepared:
    """Everything up to the shards; `full` is what `scaled` gave."""
    world, speaker = full.world.build(), full.voices.build()
    corpus = cache(partial(micro_world_corpus, world, speaker, full.corpus))  # spoken when the first stage needs it

    stages.stage(
        "world",
        [full.world, full.voices, full.corpus],
        lambda folder: make_world(world, corpus(), folder),
        what=f"a micro-world of {len(world.words)} words and {len(world.facts)} facts, spoken by espeak-ng",
    )
    tokenizer_dir = stages.stage(
        "tokenizer",
        full.tokenizer,
        lambda folder: train_tokenizer(
            full.tokenizer,
            TextTokenizer.train(_all_texts(corpus()), full.tokenizer.model.text_vocab_size),
            corpus().sentences,
            corpus().held_out,
            folder,
        ),
        what="a supervised speech tokenizer: VQ inside a streaming ASR encoder",
    )
    tokenizer = SupervisedTokenizer.load(tokenizer_dir)
    speaker_dir = stages.stage(
        "text_to_token",
        full.text_to_token,
        lambda folder: train_text_to_token(
            full.text_to_token, tokenizer, corpus().sentences, corpus().held_out, folder
        ),
        what="a text-to-token model: text in, speech tokens with word ends out",
    )
    stages.stage(
        "shards",
        [full.interleave, full.interleave_passes],
        lambda folder: make_shards(full, corpus(), tokenizer, speaker_dir, folder),
        what="Parquet shards: text, speech, ASR and TTS pairs, synthetic interleaved, recordings to interleave",
    )
    return _prepared(stages.run_dir, stages.fingerprint)


def finished(full: ToyConfig, run_dir: Path) -> Prepared:
    """The stages of a finished story as they are, whatever settings or version made them; nothing is written.

    Raises FileNotFoundError when one is missing or not complete, ValueError when its world is not the one of `full`.
    """
    for name in STAGES:
        if not (run_dir / name / MARK).is_file():
            raise FileNotFoundError(
                f"{run_dir / name} is not a finished stage; run `speechquilt story toy --run-dir {run_dir}`"
            )
    if (run_dir / "world" / "world.txt").read_text() != full.world.build().describe():
        raise ValueError(
            f"{run_dir} tells of another world than story.world={full.world}; give the settings it was made with"
        )
    return _prepared(run_dir, json.loads((run_dir / STAGES[-1] / MARK).read_text())["fingerprint"])


def _prepared(run_dir: Path, fingerprint: str) -> Prepared:
    return Prepared(
        fingerprint=fingerprint,
        tokenizer_dir=run_dir / "tokenizer",
        text_to_token_dir=run_dir / "text_to_token",
        shards={source: run_dir / "shards" / source for source in SOURCES},
    )


def train_and_evaluate(config: ToyConfig, name: str, made: Prepared) -> dict[str, Any]:
    """Two stages per language model; the runs are siblings after the shards, none depends on another."""
    stages = Story(Path(config.run_dir), made.fingerprint)
    tokenizer = SupervisedTokenizer.load(made.tokenizer_dir)
    run = config.runs[name]
    recipe = lm_recipe(config, run)
    lm_dir = stages.stage(
        f"lm/{name}",
        recipe,
        lambda folder: train_lm(
            recipe, made.shards, text_tokenizer_of(tokenizer), folder, name, tokenizer_dir=made.tokenizer_dir
        ),
        what=f"a speech-text language model: {describe_run(run)}",
    )
    stages.stage(
        f"evals/{name}",
        config.num_stories,
        lambda folder: evaluate(
            lm_dir, config.world.build(), config.voices.build(), tokenizer, config.num_stories, folder, name
        ),
        what=f"story endings, facts and free answers of {name}",
    )
    return stages.results


def lm_recipe(config: ToyConfig, run: RunConfig) -> LMRecipe:
    """The run's model, patcher and mixture; without interleaving the other sources keep their proportions."""
    weights = {s: w for s, w in config.lm.weights.items() if run.interleaved or s not in INTERLEAVED}
    model = config.plain if run.kind == "plain" else config.lm.model
    return dataclasses.replace(config.lm, model=model, patcher=run.patcher, weights=weights)


def describe_run(run: RunConfig) -> str:
    what = "every token a step" if run.kind == "plain" else f"latent patches, {run.patcher.kind}"
    return what if run.interleaved else f"{what}, no interleaved data"


def make_world(world: MicroWorld, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """A page to read and the texts by use; the speech is not stored, espeak-ng makes it again in seconds."""
    (folder / "world.txt").write_text(world.describe())
    write_json(
        folder / "texts.json",
        {
            "sentences": [u.text for u in corpus.sentences],
            "held_out": [u.text for u in corpus.held_out],
            "spoken": [u.text for u in corpus.spoken],
            "texts": {t.id: t.text for t in corpus.texts},
        },
    )
    return {}


def make_shards(
    config: ToyConfig, corpus: Corpus, tokenizer: SupervisedTokenizer, speaker_dir: Path, folder: Path
) -> dict[str, Any]:
    """All sources of the mixture; a finished one is kept when the stage was interrupted."""
    text_tokenizer = text_tokenizer_of(tokenizer)
    loaded = network.load(speaker_dir)
    engine = config.text_to_token.engine.build(loaded.model, loaded.tokenizer)
    sentences, spoken = (
        encode_utterances(tokenizer, [replace(u, id=f"{u.id}/{i}") for i, u in enumerate(utterances)])
        for utterances in (corpus.sentences, corpus.spoken)
    )
    stats = InterleaveStats()
    documents = {
        "text": text_documents(corpus.texts, text_tokenizer),
        "speech": speech_documents(spoken),
        "asr": pair_documents("asr", sentences, text_tokenizer),
        "tts": pair_documents("tts", sentences, text_tokenizer),
        "interleaved": interleaved_documents(
            corpus.to_interleave, engine, text_tokenizer, config.interleave_passes, config.interleave, stats
        ),
    }
    vocab = loaded.model.vocab
    found: dict[str, Any] = {}
    for source in SOURCES:
        info = shard_info(vocab, text_tokenizer, tokenizer.fingerprint, recipe="toy", source=source)
        if source == "parallel":
            recordings = spoken_texts(spoken[: corpus.num_parallel])
            counts = write_spoken(folder / source, info, recordings)
        else:
            counts = write_documents(folder / source, info, documents[source])
        found |= {f"shards.{source}.{key}": n for key, n in counts.items()}
    return {**found, "shards.interleaved.ratio": stats.ratio}


def make_decoder(config: ToyConfig, made: Prepared, folder: Path) -> dict[str, Any]:
    """Trained on the tokenizer's sentences, the last run on those of the first voice; held-out sentences are heard."""
    tokenizer, speaker = SupervisedTokenizer.load(made.tokenizer_dir), config.voices.build()
    corpus = micro_world_corpus(config.world.build(), speaker, config.corpus)
    speech = in_memory(corpus.sentences, encode_all(tokenizer, [u.audio for u in corpus.sentences]))
    num_voices = len(speaker.voices)  # which speak in turn
    one_voice = speech.only(range(0, len(corpus.sentences), num_voices))
    found = train_decoder(config.decoder, tokenizer, speech, folder, one_voice=one_voice)
    held_out = corpus.held_out[: config.num_heard]
    return {
        **found,
        **heard_sound(
            speech_decoder.load(folder),
            held_out,
            encode_all(tokenizer, [u.audio for u in held_out]),
            {"own": partial(read_sound, tokenizer)},
            tokenizer.read_back,
            same_voice=[i % num_voices == 0 for i in range(len(held_out))],
        ),
    }


def read_sound(tokenizer: SupervisedTokenizer, waves: Sequence[Waveform]) -> list[str]:
    """Sound -> tokens -> text, by the tokenizer's own reader."""
    return tokenizer.read_back(encode_all(tokenizer, [audio.resample(wav, tokenizer.sample_rate) for wav in waves]))


def evaluate(
    lm_dir: Path,
    world: MicroWorld,
    speaker: EspeakTTS,
    tokenizer: SupervisedTokenizer,
    num_stories: int,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Held-out loss and all tasks of one model; details per item go to `details.json`."""
    scorer, _ = load_scorer(lm_dir)
    voicer = Voicer(speaker, tokenizer, text_tokenizer_of(tokenizer))
    tasks: dict[str, Any] = {
        **story_tasks(world, voicer, num_stories),
        **fact_tasks(world, voicer),
        **question_tasks(world, voicer),
    }
    flat: dict[str, Any] = {}
    details = {}
    for key, task in tasks.items():
        details[key] = task.run(scorer)
        flat |= results.task_results(f"lm.{name}.{key}", details[key])
    write_json(folder / "details.json", details)
    stories = [s.text for s in world.stories(2 * num_stories, "test")]
    spoken = encode_utterances(tokenizer, speak(speaker, stories, "speak test stories"))
    flat[f"lm.{name}.speech_loss"] = scorer.mean_loss([t.segment() for t in spoken])
    flat[f"lm.{name}.text_loss"] = scorer.mean_loss(
        [text_segment(text_tokenizer_of(tokenizer), text) for text in stories]
    )
    return flat


def finish(config: ToyConfig, stages: Story, made: Prepared) -> Path:
    """results.json and report.html from what the stages found; made anew every time, it takes seconds."""
    from speechquilt.recipes.toy import report_data
    from speechquilt.recipes.toy.fact_transfer import fact_transfer
    from speechquilt.recipes.toy.schema import SCHEMA

    flat = {
        **run_facts("toy", config, stages),
        "run.seed": config.world.seed,
        **stages.results,
        **fact_transfer(stages.run_dir),
    }
    results.write_results(stages.run_dir / "results.json", flat, SCHEMA)
    full, tokenizer = scaled(config), SupervisedTokenizer.load(made.tokenizer_dir)
    report = report_data.write(config, stages, flat, full.world.build(), full.voices.build(), tokenizer, made.shards)
    print(report_data.table(flat))
    print(
        f"\nresults  {stages.run_dir / 'results.json'}\nreport   {report}\nnext     open the report; README.md, 'your own data'"
    )
    return report


def _all_texts(corpus: Corpus) -> list[str]:
    """What the text tokenizer learns its words from; held-out sentences are not among them."""
    instructions = list(INSTRUCTIONS.values())
    return [u.text for u in corpus.sentences] + [t.text for t in corpus.texts] + instructions * 2
