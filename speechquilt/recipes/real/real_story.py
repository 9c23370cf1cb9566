"""`speechquilt story real`: from Whisper, a text model and speech of free voices to a speech-text model of open vocabulary.

Cost of the default (`scale` 1): about two hours and three quarters on two CPU cores, by stage in `sizes`. Started again it
goes on where it stopped, wherever it was killed.
Trap: sentences held out for measuring must be in no text that a language model reads; the texts are made after the corpus,
without them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechquilt.data.feed.spoken_parts import SpokenParts
from speechquilt.data.interleaving.synthetic import InterleaveConfig
from speechquilt.data.sources.clips import TABLE, read_clips
from speechquilt.data.sources.joined_speech import JoinedSpeechConfig
from speechquilt.data.sources.speech_corpora import Entry, FolderCorpus
from speechquilt.data.sources.speech_rows import list_audio
from speechquilt.data.sources.wordnet import example_sentences
from speechquilt.evals.results import write_results
from speechquilt.files import replacing
from speechquilt.jobs import bulk
from speechquilt.jobs.encode_text import encode_corpus
from speechquilt.jobs.interleave_text import InterleaveSettings, interleave_corpus
from speechquilt.jobs.tokenize_audio import tokenize_folder
from speechquilt.nn.hub import local_folder
from speechquilt.recipes.real import given, promises, sizes, speaker
from speechquilt.recipes.real.given import Needed
from speechquilt.recipes.real.real_evals import Made, RealEvalsConfig, evaluate, recordings
from speechquilt.recipes.real.real_texts import RealTextsConfig, write_texts
from speechquilt.recipes.real.sizes import shrunk, shrunk_run
from speechquilt.recipes.real.speaker import SpeakerVoiceConfig
from speechquilt.reports import charts
from speechquilt.stages.encode import load_text_tokenizer
from speechquilt.stages.run_facts import run_facts
from speechquilt.stages.spoken_corpus import HELD_OUT, TRAIN, SpokenCorpusConfig, speak_corpus
from speechquilt.stages.stage import Story, remembered
from speechquilt.stages.train_lm import LMRecipe, train_lm
from speechquilt.stages.train_reader import ReaderRecipe, train_reader
from speechquilt.stages.train_text_to_token import TextToTokenRecipe, train_on_shards
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.stages.whisper_reader import WhisperReader
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.kokoro import MODEL, KokoroTTSConfig
from speechquilt.tts.voices import VoiceBankConfig
from speechquilt.types import Utterance

SHARDS = "shards"  # in the folder of a stage
SLICE_MIB = 1 / 16  # of text in a task: few texts, and every worker should have some


@dataclass(frozen=True, kw_only=True)
class RealConfig:
    """Every number of the real story."""

    run_dir: str = "runs/real"
    """Folder that holds the story; started again in it, the story goes on where it stopped."""
    scale: float = 1.0
    """Share of the work: sentences, steps, texts and items are so many times those of the other settings; above 0. 1 is an
    evening on two cores, 0.05 some ten minutes that show every stage and teach little. Below 1 the codebook shrinks too,
    since every code needs its sounds."""
    whisper: str = sizes.WHISPER
    """Folder of the Whisper that the speech tokenizer starts from, or hub:NAME of one."""
    language: str | None = None
    """Language in the prompt of that Whisper, such as en; none for its English-only checkpoints."""
    base: str = sizes.BASE
    """Folder of the Llama, Qwen2 or Qwen3 that both language models start from, or hub:NAME of one."""
    corpus: SpokenCorpusConfig = sizes.CORPUS
    """Who speaks, and how much."""
    rows: JoinedSpeechConfig = sizes.ROWS
    """How sentences are joined to train the speech tokenizer."""
    tokenizer: TokenizerRecipe = sizes.TOKENIZER
    """How the speech tokenizer is trained; its start is whisper."""
    reader: ReaderRecipe = sizes.READER
    """How what stands above the codebook learns to read pieces of recordings, with the tokens as they are."""
    spoken: int = 3000
    """Most recordings of the corpus that become documents for the language models; an hour is 45,000 tokens."""
    voice: SpeakerVoiceConfig = SpeakerVoiceConfig()
    """Which voice the text-to-token model learns from, and how much of it."""
    text_ids: int = speaker.TEXT_IDS
    """Most ids of the text tokenizer that the text-to-token model reads with, which is its own and small."""
    text_to_token: TextToTokenRecipe = speaker.TEXT_TO_TOKEN
    """How the text-to-token model is trained; its engine speaks the texts too."""
    texts: RealTextsConfig = RealTextsConfig()
    """Which texts the language models read, and how much of them."""
    interleave: InterleaveConfig = InterleaveConfig(languages=("en",))
    """Which words of the texts become speech."""
    noise_sample: float = 0.1
    """Share of the spoken spans that are read back to measure the noise, 0 to 1."""
    plain: LMRecipe = sizes.PLAIN
    """How the plain language model is trained; its warm start is base."""
    latent: LMRecipe = sizes.LATENT
    """How the latent language model is trained; its warm start is base."""
    clips: str = ".cache/clips"
    """Folder of the five human recordings of `make clips`; without it nobody says whether people are understood."""
    natural: KokoroTTSConfig = KokoroTTSConfig(voices=("jm_kumo",))
    """A natural voice that says held-out sentences for measuring; without its folder it says nothing."""
    evals: RealEvalsConfig = RealEvalsConfig()
    """What is measured, and on how much."""

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be above 0; 1 is the whole story, 0.05 a short one")

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            story(self)


def carried_out(config: RealConfig) -> RealConfig:
    """`scale`, `whisper`, `language` and `base` put where they act: the settings that the stages follow."""
    k = config.scale
    first = config.tokenizer.first
    codes = shrunk(config.tokenizer.model.codebook_size, min(k, 1.0), sizes.LEAST_CODES)
    return replace(
        config,
        scale=1.0,
        corpus=sizes.shrunk_corpus(config.corpus, k),
        tokenizer=replace(
            config.tokenizer,
            model=replace(config.tokenizer.model, codebook_size=codes),
            first=None if first is None else shrunk_run(first, k),
            train=shrunk_run(config.tokenizer.train, k),
            start=config.whisper,
            language=config.language,
        ),
        reader=replace(config.reader, train=shrunk_run(config.reader.train, k)),
        spoken=shrunk(config.spoken, k, sizes.LEAST_SENTENCES),
        voice=replace(config.voice, sentences=shrunk(config.voice.sentences, k, sizes.LEAST_SENTENCES)),
        text_to_token=replace(config.text_to_token, train=shrunk_run(config.text_to_token.train, k)),
        texts=config.texts.shrunk(k),
        plain=replace(config.plain, train=shrunk_run(config.plain.train, k), warm_start=config.base),
        latent=replace(config.latent, train=shrunk_run(config.latent.train, k), warm_start=config.base),
        evals=config.evals.shrunk(k),
    )


def story(config: RealConfig) -> Path:
    """Run all stages; returns the path of report.html. What is complete is skipped, what was interrupted continues.

    Raises FileNotFoundError naming everything that has to be fetched first.
    """
    charts.require()  # the report's, before the work and not after it
    full = carried_out(config)
    given.check(_needed(full))
    if _speaks(full.natural):
        full.natural.build()  # says now what it lacks
    stages = Story(Path(full.run_dir))
    corpus = _corpus(full, stages)
    tokenizer = _tokenizer(full, stages, corpus)
    tokens = stages.stage(
        "tokens",
        [full.base, full.spoken],
        lambda folder: _tokens(full, corpus, tokenizer, folder),
        what="the recordings as speech tokens: documents, pairs, and spoken texts to interleave",
    )
    tokenizer = stages.stage(
        "reader",
        full.reader,
        partial(_reader, full, tokenizer, tokens),
        what="the same tokenizer, whose reader has learned to read pieces of recordings",
    )
    voice = stages.stage(
        "voice",
        full.voice,
        lambda folder: _voice(full, tokenizer, folder),
        what=f"sentences of the corpus by one voice, {full.voice.voice}, as speech tokens",
    )
    text_to_token = stages.stage(
        "text_to_token",
        [full.text_ids, full.text_to_token],
        lambda folder: _text_to_token(full, tokenizer, voice / SHARDS / "parallel", folder),
        what="a text-to-token model: text in, speech tokens with word ends out",
    )
    texts = stages.stage(
        "texts",
        full.texts,
        lambda folder: write_texts(full.texts, held_out_sentences(corpus), folder),
        what="texts to read, without the sentences that are measured on",
    )
    interleaved = stages.stage(
        "interleaved",
        [full.interleave, full.noise_sample],
        lambda folder: _interleaved(full, texts, text_to_token, tokenizer, folder),
        what="the texts with some of their words spoken by the text-to-token model",
    )
    text = stages.stage(
        "text",
        {},
        lambda folder: _text(full, texts, tokenizer, folder),
        what="the texts as they are",
    )
    shards = {
        "text": text / SHARDS,
        "interleaved": interleaved / SHARDS,
        **{source: tokens / SHARDS / source for source in ("speech", "asr", "tts", "parallel")},
    }
    runs = {"plain": full.plain, "latent": full.latent}
    for name, recipe in runs.items():
        _language_model(stages, name, recipe, shards, tokenizer)
    stages.stage(
        "evals",
        [full.evals, full.natural],
        lambda folder: evaluate(full.evals, _made(full, stages.run_dir, runs)),
        what="word errors by voice and by length of span, text kept, and speech that is understood",
    )
    return _finish(config, stages)


def _needed(full: RealConfig) -> list[Needed]:
    """A file of each thing that is used, the last stages' too."""
    weights, texts = "run `make weights`, or give a Hugging Face folder by", "run `make texts`"
    files = ("config.json", "tokenizer.json", "preprocessor_config.json")
    return [
        *(Needed("Whisper", local_folder(full.whisper) / name, f"{weights} --whisper") for name in files),
        *(Needed("the text model", local_folder(full.base) / name, f"{weights} --base") for name in files[:2]),
        *(
            Needed("texts", Path(full.texts.folder) / name, texts)
            for name in ("wordnet/data.noun", "bible/verses", "fortunes")
        ),
    ]


def _corpus(full: RealConfig, stages: Story) -> Path:
    return stages.stage(
        "corpus",
        full.corpus,
        lambda folder: _speak(full, full.corpus, folder),
        what=f"example sentences of a dictionary in {len(full.corpus.voices)} voices",
    )


def _speak(full: RealConfig, settings: SpokenCorpusConfig, folder: Path) -> dict[str, Any]:
    sentences = example_sentences(Path(full.texts.folder) / "wordnet")
    return speak_corpus(sentences, folder, settings, workers=len(os.sched_getaffinity(0)))


def _tokenizer(full: RealConfig, stages: Story, corpus: Path) -> Path:
    def make(folder: Path) -> dict[str, Any]:
        rows = full.rows.build(FolderCorpus(corpus / TRAIN))
        return train_tokenizer(
            full.tokenizer, None, rows, recordings(corpus / HELD_OUT)[: full.evals.sentences], folder
        )

    return stages.stage(
        "tokenizer",
        [full.rows, full.tokenizer],
        make,
        what="a supervised speech tokenizer from Whisper",
    )


def held_out_sentences(corpus: Path) -> set[str]:
    """Spoken forms of all sentences that are measured on; the unseen voice says the same."""
    recordings = FolderCorpus(corpus / HELD_OUT)
    entries = [recordings.entry(i) for i in range(len(recordings))]
    return {spoken_form(entry.text) for entry in entries if isinstance(entry, Entry)}


def _tokens(full: RealConfig, corpus: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Pairs are spelled with the ids of the base, which is to learn from them."""
    table = folder / "recordings.jsonl"
    with replacing(table) as file:
        for row in islice(list_audio(corpus / TRAIN), full.spoken):
            where = os.path.relpath(corpus / TRAIN / row["path"], folder)
            file.write((json.dumps({**row, "path": where}, ensure_ascii=False) + "\n").encode())
    tokenize_folder(table, folder / SHARDS, tokenizer, text_tokenizer=Path(full.base))
    return _counted("speech", folder / SHARDS / "speech")


def _reader(full: RealConfig, tokenizer: Path, tokens: Path, folder: Path) -> dict[str, Any]:
    return train_reader(full.reader, tokenizer, SpokenParts.open([tokens / SHARDS / "parallel"]), folder)


def _voice(full: RealConfig, tokenizer: Path, folder: Path) -> dict[str, Any]:
    _speak(full, full.voice.corpus(full.corpus), folder / "corpus")
    tokenize_folder(folder / "corpus" / TRAIN, folder / SHARDS, tokenizer)
    return {}


def _text_to_token(full: RealConfig, tokenizer: Path, spoken: Path, folder: Path) -> dict[str, Any]:
    texts = TextTokenizer.train((spoken_form(item.text) for item in SpokenParts.open([spoken])), full.text_ids)
    ear = SupervisedTokenizer.load(tokenizer)
    return train_on_shards(full.text_to_token, ear, [spoken], folder, text_tokenizer=texts)


def _interleaved(full: RealConfig, texts: Path, text_to_token: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    interleave_corpus(
        str(texts / "train"),
        folder / SHARDS,
        text_to_token,
        tokenizer=tokenizer,
        text_tokenizer=Path(full.base),
        rule=full.interleave,
        settings=InterleaveSettings(
            slice_mib=SLICE_MIB,
            noise_sample=full.noise_sample,
            temperature=full.text_to_token.engine.temperature,
            top_p=full.text_to_token.engine.top_p,
        ),
    )
    stats = json.loads((folder / SHARDS / bulk.STATS).read_text(encoding="utf-8"))
    noise = {
        f"interleaved.noise.{kind}.{key}": value
        for kind, rate in stats["noise_rates"].items()
        for key, value in rate.items()
    }
    return {**_counted("interleaved", folder / SHARDS), "shards.interleaved.ratio": stats["ratio"], **noise}


def _text(full: RealConfig, texts: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    encode_corpus(str(texts / "train"), folder / SHARDS, Path(full.base), tokenizer)
    return _counted("text", folder / SHARDS)


def _counted(source: str, shards: Path) -> dict[str, Any]:
    """What a finished folder of shards says that it holds."""
    manifest = json.loads((shards / "shards.json").read_text(encoding="utf-8"))
    counts = {f"{modality}_tokens": n for modality, n in manifest["tokens"].items()}
    counts |= {"documents": manifest["documents"], "rejects": sum(manifest["rejects"].values())}
    return {f"shards.{source}.{key}": n for key, n in counts.items()}


def _language_model(stages: Story, name: str, recipe: LMRecipe, shards: dict[str, Path], tokenizer: Path) -> None:
    texts = load_text_tokenizer(Path(recipe.warm_start))
    stages.stage(
        f"lm/{name}",
        recipe,
        lambda folder: train_lm(
            recipe,
            shards,
            texts,
            folder,
            name,
            tokenizer_dir=tokenizer,
            speech_tokenizer=SupervisedTokenizer.load(tokenizer),
        ),
        what=f"a speech-text language model from {Path(recipe.warm_start).name}: {name}",
    )


def _made(full: RealConfig, run_dir: Path, runs: dict[str, LMRecipe]) -> Made:
    """What is measured, and who else is heard."""
    return Made(
        run_dir=run_dir,
        whisper=WhisperReader(Path(full.whisper), full.language),
        speaker=VoiceBankConfig(voices=full.corpus.voices, flite_folder=full.corpus.flite_folder).build(),
        engine=full.text_to_token.engine,
        rule=full.interleave,
        runs=runs,
        guests=_guests(full, recordings(run_dir / "corpus" / HELD_OUT)[: full.evals.floor]),
    )


def _guests(full: RealConfig, held_out: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Speakers from outside the corpus, as far as they were fetched; Kokoro takes about as long as it speaks."""
    guests, clips, natural = {}, Path(full.clips), full.natural
    if (clips / TABLE).is_file():
        guests["human"] = read_clips(clips)
    if _speaks(natural):
        voices, kokoro = cycle(natural.voices), natural.build()
        said = tqdm(held_out, desc="kokoro speaks", unit="sentence", mininterval=5.0)
        guests["kokoro"] = [kokoro.speak(u.text, voice) for u, voice in zip(said, voices)]
    return guests


def _speaks(natural: KokoroTTSConfig) -> bool:
    """Whether its folder was fetched."""
    return (Path(natural.folder) / MODEL).is_file()


def _finish(config: RealConfig, stages: Story) -> Path:
    """results.json and report.html from what the stages found; made anew every time, it takes seconds."""
    from speechquilt.recipes.real import real_page

    flat = {
        **run_facts("real", config, stages),
        "run.scale": config.scale,
        **stages.results,
    }
    results = write_results(stages.run_dir / "results.json", flat, promises.SCHEMA)
    report = real_page.write(config, stages, flat, Path(config.base))
    print(f"\nresults  {results}\nreport   {report}\nnext     open the report")
    return report
