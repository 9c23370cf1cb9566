"""`speechquilt study real_text`: text that no one here wrote, through the whole command, with its rejects and its
noise.

Stages: `corpus` (installed texts) -> `tokenizer` and `text_to_token`, trained on sentences of the training documents
that espeak-ng speaks -> `interleaved`, what `speechquilt interleave` makes of the held-out documents, every span read
back -> `reader`, the same spans spoken by espeak-ng. Leaves results.json and real_text.md.
Cost: about 20 minutes on two cores, estimated; docs/results-real-text.md has a shorter run.
Trap: the reader makes mistakes of its own, many on words it never heard, and they count as noise; what it makes of
espeak-ng's speech of the same spans says how many.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.config import to_dict
from speechquilt.data.interleaving import synthetic
from speechquilt.data.interleaving.speakable import unspeakable_words
from speechquilt.data.interleaving.synthetic import InterleaveConfig, InterleavePlan, split_words
from speechquilt.data.interleaving.verbalise import verbalise
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.sources.text_files import read_texts
from speechquilt.evals import noise
from speechquilt.evals.noise import NoiseMeter
from speechquilt.files import write_json
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.inspect import inspect
from speechquilt.jobs.interleave_text import InterleaveSettings, interleave_corpus
from speechquilt.recipes import defaults
from speechquilt.stages.corpus import speak
from speechquilt.stages.encode import encode_all, text_tokenizer_of
from speechquilt.stages.stage import Story, remembered
from speechquilt.stages.train_text_to_token import TextToTokenRecipe, train_text_to_token
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.studies import installed_texts, real_text_page
from speechquilt.studies.installed_texts import InstalledTextsConfig
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.espeak import EspeakTTS, EspeakTTSConfig
from speechquilt.types import Document, SpokenSpan, TextDocument, Utterance

LANGUAGES = ("en",)
SLICE_BYTES = 2**16  # of text in a task; small, since the held-out documents are few and every worker should have some
SPANS_AT_ONCE = 256  # spans that are spoken, and kept in memory, together
PAGE = "interleaved.html"

# The toy's network with more steps, a longer warm-up (open vocabulary takes longer to lock on) and twice the codes.
TOKENIZER = replace(
    defaults.TOKENIZER,
    model=replace(
        defaults.TOKENIZER.model,
        text_vocab_size=1000,
        codebook_size=512,
        vq_warmup_updates=1000,
        vq_restart_threshold=0.05,
    ),
    train=replace(defaults.TOKENIZER.train, steps=4500),
)
TEXT_TO_TOKEN = replace(
    defaults.TEXT_TO_TOKEN,
    data=TextToTokenDataConfig(rows=6, row_tokens=384),  # the longest sentence fits a row
    train=replace(defaults.TEXT_TO_TOKEN.train, steps=1200),
)
_SENTENCE_END = re.compile(r"[.!?:;][\"'”’)\]]*$")
_NEW_PARAGRAPH = re.compile(r"\s*\n\s*\n")
_SPELLED = re.compile(r"[a-z' ]+")


@dataclass(frozen=True, kw_only=True)
class SentencesConfig:
    """Which sentences of the documents are spoken, to train and measure the tokenizer and the text-to-token model."""

    train: int = 5000
    """Sentences to train on, at least 2."""
    held_out: int = 200
    """Sentences to measure on, at least 1."""
    min_words: int = 3
    """Fewest words of a sentence."""
    max_words: int = 25
    """Most words of a sentence."""
    seed: int = 0
    """Decides which sentences are drawn."""

    def __post_init__(self) -> None:
        if self.train < 2 or self.held_out < 1:
            raise ValueError(f"train={self.train} must be at least 2 and held_out={self.held_out} at least 1")
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(f"min_words={self.min_words} must be 1 to max_words={self.max_words}")


@dataclass(frozen=True, kw_only=True)
class RealTextConfig:
    """Synthetic interleaving of text that is installed on this machine."""

    run_dir: str = "runs/real_text"
    """Folder that holds the study."""
    corpus: InstalledTextsConfig = InstalledTextsConfig()
    """Which texts are read."""
    sentences: SentencesConfig = SentencesConfig()
    """Which of their sentences are spoken to train on."""
    voices: EspeakTTSConfig = EspeakTTSConfig(voices=("en-us",), words_per_minute=180)
    """Who speaks, and how."""
    tokenizer: TokenizerRecipe = TOKENIZER
    """How the speech tokenizer is trained."""
    text_to_token: TextToTokenRecipe = TEXT_TO_TOKEN
    """How the text-to-token model is trained."""
    ratio: float = 0.3
    """Share of the words that become speech, 0 to 0.5."""
    workers: int | None = None
    """Processes that interleave at the same time; None is one for each core."""

    @property
    def rule(self) -> InterleaveConfig:
        """Which words become speech; the same rule that `speechquilt interleave` follows."""
        return InterleaveConfig(ratio=self.ratio, languages=LANGUAGES)

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            study(self)


def study(config: RealTextConfig) -> Path:
    """All stages; what is complete is skipped. Writes results.json and real_text.md, returns the path of the second."""
    stages = Story(Path(config.run_dir))
    speaker = config.voices.build()
    corpus_dir = stages.stage(
        "corpus",
        config.corpus,
        lambda folder: write_corpus(config.corpus, folder),
        what="licence texts and documentation that are installed here",
    )
    train = cache(lambda: spoken_sentences(corpus_dir / "train", config.sentences, config.sentences.train, speaker))
    held_out = cache(
        lambda: spoken_sentences(corpus_dir / "held_out", config.sentences, config.sentences.held_out, speaker)
    )
    tokenizer_dir = stages.stage(
        "tokenizer",
        [config.sentences, config.voices, config.tokenizer],
        lambda folder: train_reader(config.tokenizer, train(), held_out(), folder),
        what="a speech tokenizer from sentences of the training documents, spoken by espeak-ng",
    )
    tokenizer = SupervisedTokenizer.load(tokenizer_dir)
    speaker_dir = stages.stage(
        "text_to_token",
        config.text_to_token,
        lambda folder: train_text_to_token(config.text_to_token, tokenizer, train(), held_out(), folder),
        what="a text-to-token model from the same sentences",
    )
    shards_dir = stages.stage(
        "interleaved",
        config.ratio,
        lambda folder: interleave_held_out(config, corpus_dir / "held_out", speaker_dir, tokenizer_dir, folder),
        what="speechquilt interleave on the held-out documents, every span read back",
    )
    stages.stage(
        "reader",
        {},
        lambda folder: measure_reader(shards_dir / "shards", config.rule, tokenizer, speaker),
        what="the same spans spoken by espeak-ng and read back",
    )
    return finish(config, stages)


def finish(config: RealTextConfig, stages: Story) -> Path:
    """results.json and the page, made anew every time."""
    found = {"config": to_dict(config), **stages.results, "seconds": stages.seconds}
    write_json(stages.run_dir / "results.json", found)
    page = stages.run_dir / "real_text.md"
    page.write_text(real_text_page.markdown(found), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    print(f"results  {stages.run_dir / 'results.json'}\ntables   {page}")
    print(f"samples  {stages.run_dir / 'interleaved' / PAGE}")
    return page


def write_corpus(config: InstalledTextsConfig, folder: Path) -> dict[str, Any]:
    """What is installed here as .txt files under train/ and held_out/; returns what was found and kept of each source."""
    found = installed_texts.collect(config)
    results: dict[str, Any] = {}
    for source, texts in found.items():
        results[f"corpus.{source}.found"] = texts.found
        for part, documents in (("train", texts.train), ("held_out", texts.held_out)):
            for document in documents:
                path = folder / part / f"{document.id}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(document.text.encode("utf-8", "replace"))
            results[f"corpus.{source}.{part}_documents"] = len(documents)
            results[f"corpus.{source}.{part}_words"] = sum(len(d.text.split()) for d in documents)
    train = [document for texts in found.values() for document in texts.train]
    held_out = [document for texts in found.values() for document in texts.held_out]
    return {**results, "corpus.repeated_share": installed_texts.repeated_share(train, held_out)}


def spoken_sentences(folder: Path, config: SentencesConfig, number: int, speaker: EspeakTTS) -> list[Utterance]:
    """`number` different sentences of the documents in `folder`, or as many as there are, spoken with word times.

    Raises ValueError when there are fewer than two.
    """
    documents = [document for document in read_texts(str(folder)) if isinstance(document, TextDocument)]
    written = [text for document in documents for text in sentences(document.text, config.min_words, config.max_words)]
    order = np.random.default_rng(config.seed).permutation(len(written))
    chosen: dict[str, str] = {}  # spoken form -> what is spoken
    for i in order.tolist():
        if len(chosen) == number:
            break
        spoken = verbalise(written[i])
        form = spoken_form(spoken)
        if _SPELLED.fullmatch(form) and len(form.split()) <= config.max_words:
            chosen.setdefault(form, spoken)
    if len(chosen) < 2:
        raise ValueError(f"{folder} has {len(chosen)} sentences that can be spoken; raise corpus.mib_per_source")
    return speak(speaker, list(chosen.values()), f"speak {folder.name}")


def sentences(text: str, min_words: int, max_words: int) -> Iterator[str]:
    """Runs of words that can be spoken, as written: up to the end of a sentence, of a paragraph, or a word that cannot be.

    A longer run comes in equal parts; a shorter one is left out.
    """
    words = split_words(text)
    run: list[str] = []
    for word, reason in zip(words, unspeakable_words(words, LANGUAGES)):
        if reason or _NEW_PARAGRAPH.match(word):
            yield from _parts(run, min_words, max_words)
            run = []
        if not reason:
            run.append(word.strip())
        if _SENTENCE_END.search(word.strip()):
            yield from _parts(run, min_words, max_words)
            run = []
    yield from _parts(run, min_words, max_words)


def _parts(run: Sequence[str], min_words: int, max_words: int) -> Iterator[str]:
    num_parts = math.ceil(len(run) / max_words)
    for k in range(num_parts):
        part = run[k * len(run) // num_parts : (k + 1) * len(run) // num_parts]
        if len(part) >= min_words:
            yield " ".join(part)


def train_reader(
    recipe: TokenizerRecipe, train: Sequence[Utterance], held_out: Sequence[Utterance], folder: Path
) -> dict[str, Any]:
    """The speech tokenizer and its BPE, with what they were given."""
    forms = [spoken_form(u.text) for u in train]
    texts = TextTokenizer.train(forms, recipe.model.text_vocab_size)
    held_out_forms = [spoken_form(u.text) for u in held_out]
    num_words = sum(len(form.split()) for form in held_out_forms)
    known = {word for form in forms for word in form.split()}
    unknown = sum(word not in known for form in held_out_forms for word in form.split())
    return {
        "speech.sentences": len(train),
        "speech.hours": sum(u.audio.duration_s for u in train) / 3600,
        "speech.words": sum(len(form.split()) for form in forms),
        "speech.different_words": len(known),
        "speech.held_out_unknown_words": unknown / num_words,
        "speech.text_ids_per_word": sum(len(texts.encode(form)) for form in held_out_forms) / num_words,
        **train_tokenizer(recipe, texts, train, held_out, folder),
    }


def interleave_held_out(
    config: RealTextConfig, corpus: Path, speaker_dir: Path, tokenizer_dir: Path, folder: Path
) -> dict[str, Any]:
    """What `speechquilt interleave corpus shards --tokenizer ... --noise-sample 1` and `inspect --page` do."""
    shards = folder / "shards"
    interleave_corpus(
        str(corpus),
        shards,
        speaker_dir,
        tokenizer=tokenizer_dir,
        rule=config.rule,
        settings=InterleaveSettings(slice_mib=SLICE_BYTES / 2**20, noise_sample=1.0),
        execution=Execution(workers=config.workers),
    )
    inspect(shards, tokenizer=tokenizer_dir, page=folder / PAGE)
    stats = json.loads((shards / "stats.json").read_text(encoding="utf-8"))
    manifest = json.loads((shards / "shards.json").read_text(encoding="utf-8"))
    return {
        "interleaved.documents": manifest["documents"],
        "interleaved.rejects": manifest["rejects"],
        "interleaved.tokens": manifest["tokens"],
        "interleaved.stats": stats,
    }


def measure_reader(
    shards: Path, rule: InterleaveConfig, tokenizer: SupervisedTokenizer, speaker: EspeakTTS
) -> dict[str, Any]:
    """espeak-ng speaks the spans that became speech in `shards`: word errors of the reader by kind, and how the rule for the
    length of a span (spec 1, 5.2 step 5) judges them."""
    encode = text_tokenizer_of(tokenizer).encode_run
    meter = NoiseMeter(tokenizer)
    spans = list(spoken_spans(ShardFolder(shards), rule, encode))
    refused = num_speech = num_text = 0
    for first in range(0, len(spans), SPANS_AT_ONCE):
        batch = spans[first : first + SPANS_AT_ONCE]
        audio = [u.audio for u in speak(speaker, [spoken for _, spoken in batch], "speak spans")]
        for (written, spoken), ids_T in zip(batch, encode_all(tokenizer, audio)):
            meter.add(written, spoken, ids_T)
            text_ids = len(encode(spoken))
            span = SpokenSpan(ids_T=ids_T, unit_end_T=np.zeros(len(ids_T), dtype=np.uint8))
            refused += bool(synthetic.reject_reason(span, text_ids, tokenizer.frame_rate))
            num_speech, num_text = num_speech + len(ids_T), num_text + text_ids
    return {
        "reader.noise_rates": noise.report(meter.counts()),
        "reader.refused": refused / max(1, len(spans)),
        "reader.speech_per_text_token": num_speech / max(1, num_text),
    }


def spoken_spans(
    folder: ShardFolder, rule: InterleaveConfig, encode: Callable[[str], Sequence[int]]
) -> Iterator[tuple[str, str]]:
    """The spans of the first pass that became speech, as (written, spoken)."""
    for i in range(len(folder)):
        document = folder[i]
        plan = synthetic.plan(document.id.removesuffix("/pass0"), folder.text(i), 0, rule)
        for written, spoken, became_speech in zip(plan.spans, plan.spoken_spans, accepted(plan, document, encode)):
            if became_speech:
                yield written, spoken


def accepted(plan: InterleavePlan, document: Document, encode: Callable[[str], Sequence[int]]) -> list[bool]:
    """For each span of the plan whether it is speech in the document that `assemble` made of it.

    A span that was refused has joined the text around it, so the text before a span is a segment of its own only when the
    span is speech. Raises ValueError when the document was made of another plan.
    """
    found: list[bool] = []
    run, at = "", 0

    def text_ends_here() -> bool:
        ids = list(encode(run)) if run.strip() else []
        segment = document.segments[at] if at < len(document.segments) else None
        if not ids:
            return segment is not None and segment.modality == "speech"
        return segment is not None and segment.modality == "text" and segment.ids_T.tolist() == ids

    for piece in plan.pieces:
        if piece.modality == "speech":
            found.append(text_ends_here())
            if found[-1]:
                at += 2 if run.strip() else 1
                run = ""
                continue
        run += piece.text
    if at + bool(run.strip()) != len(document.segments) or (run.strip() and not text_ends_here()):
        raise ValueError(f"{document.id} is not made of the plan with seed {plan.seed}; give the rule of its shards")
    return found
