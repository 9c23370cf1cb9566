"""The same stages on one's own data: a folder of audio with transcripts, and a folder of text.

Trap: without word times in the metadata an utterance is one unit, so aligned and curriculum patching refuse its shards
and the text-to-token model learns whole utterances only. Use static patching, bring word times, or let `--align` find them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from speechquilt import config
from speechquilt.data.interleaving.synthetic import InterleaveConfig, InterleaveStats
from speechquilt.data.shards.parquet import is_complete
from speechquilt.evals import scorer
from speechquilt.evals.results import Schema, write_results
from speechquilt.model.patcher import PatcherConfig
from speechquilt.recipes import defaults
from speechquilt.stages import (
    align_corpus,
    train_aligner,
    train_lm,
    train_text_to_token,
    train_tokenizer,
    training_documents,
)
from speechquilt.stages.corpus import Corpus, folder_corpus
from speechquilt.stages.encode import encode_utterances, text_tokenizer_of
from speechquilt.stages.stage import Story, remembered, required
from speechquilt.stages.train_aligner import OWN_ALIGNER, AlignerRecipe
from speechquilt.stages.train_lm import LMRecipe, load_scorer
from speechquilt.stages.train_text_to_token import TextToTokenRecipe
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.stages.training_documents import (
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
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Reject, TextDocument, Utterance
from speechquilt.vocab import Vocab

SCHEMA = Schema(
    (
        *align_corpus.MEASURES,
        *train_aligner.MEASURES,
        *train_tokenizer.MEASURES,
        *train_text_to_token.MEASURES,
        *training_documents.MEASURES,
        *train_lm.MEASURES,
        *scorer.MEASURES,
    )
)


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """All stages on your own data: a speech tokenizer, a text-to-token model, shards, a language model and held-out losses.

    The default sizes are for minutes on two cores, which is right for trying things out; real data wants larger ones.
    """

    STARTS = ("kind",)

    kind: Literal["latent", "plain"] = "latent"
    """Of the language model: latent has patches, plain takes one step of the large model per token."""
    speech: str = ""
    """Folder of audio with transcripts; one recording in twenty is held out."""
    text: str | None = None
    """Folder or file of text; none: the transcripts."""
    run_dir: str = "runs/own"
    """Folder of the run."""
    align: bool = False
    """Train an aligner on the recordings, and give word times to those that have none."""
    aligner: AlignerRecipe = OWN_ALIGNER
    """The aligner."""
    tokenizer: TokenizerRecipe = defaults.TOKENIZER
    """The speech tokenizer."""
    text_to_token: TextToTokenRecipe = defaults.TEXT_TO_TOKEN
    """The text-to-token model."""
    interleave: InterleaveConfig = InterleaveConfig()
    """Which words of the texts become speech."""
    passes: int = 1
    """Times through the texts, with other spans spoken each time."""
    lm: LMRecipe = defaults.LM
    """The language model."""

    @classmethod
    def starting_from(cls, kind: Literal["latent", "plain"] = "latent") -> "OwnConfig":
        """The model of that kind, without patches when it is plain."""
        if kind == "latent":
            return cls()
        return cls(kind=kind, lm=replace(defaults.LM, model=defaults.PLAIN, patcher=PatcherConfig(kind="none")))

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            story(self)


def story(settings: OwnConfig) -> None:
    """All stages on a folder; ends with results.json and held-out losses."""
    stages = Story(Path(settings.run_dir))
    corpus = _corpus(settings, stages)
    tokenizer = _tokenizer(settings, stages, corpus)
    shards_dir = _shards(settings, stages, corpus, tokenizer)
    lm_dir = _language_model(settings, stages, shards_dir, tokenizer)
    stages.stage(
        "evals/lm",
        {},
        lambda folder: _held_out_loss(lm_dir, corpus.held_out, tokenizer),
        what="loss on held-out recordings and their transcripts",
    )
    write_results(stages.run_dir / "results.json", stages.results, SCHEMA)
    print(json.dumps(stages.results, indent=1))
    print(
        f"\nresults  {stages.run_dir / 'results.json'}\nmodel    {lm_dir}\nnext     speechquilt eval {lm_dir} ITEMS.jsonl"
    )


def _corpus(settings: OwnConfig, stages: Story) -> Corpus:
    """What the folders hold, with word times from an aligner of its own when that is asked for and any are missing."""
    corpus = folder_corpus(required("speech", settings.speech), Path(settings.text) if settings.text else None)
    for reject in corpus.rejects:
        print(f"  left out {reject.id}: {reject.detail or reject.reason}")
    if not settings.align or all(u.alignment for u in [*corpus.sentences, *corpus.held_out]):
        return corpus
    aligner_dir = stages.stage(
        "aligner",
        [settings.speech, settings.aligner],
        lambda folder: align_corpus.align_corpus(settings.aligner, corpus, folder),
        what=f"word times for {len(corpus.sentences)} recordings",
    )
    return align_corpus.aligned_corpus(corpus, aligner_dir)


def _tokenizer(settings: OwnConfig, stages: Story, corpus: Corpus) -> SupervisedTokenizer:
    texts = [u.text for u in corpus.sentences] + [t.text for t in corpus.texts]
    folder = stages.stage(
        "tokenizer",
        [settings.speech, settings.tokenizer],
        lambda folder: train_tokenizer.train_tokenizer(
            settings.tokenizer,
            TextTokenizer.train(texts, settings.tokenizer.model.text_vocab_size),
            corpus.sentences,
            corpus.held_out,
            folder,
        ),
        what=f"a speech tokenizer from {len(corpus.sentences)} recordings",
    )
    return SupervisedTokenizer.load(folder)


def _shards(settings: OwnConfig, stages: Story, corpus: Corpus, tokenizer: SupervisedTokenizer) -> Path:
    """A text-to-token model, and all shards: of speech, of text, and interleaved by that model."""
    speaker_dir = stages.stage(
        "text_to_token",
        settings.text_to_token,
        lambda folder: train_text_to_token.train_text_to_token(
            settings.text_to_token, tokenizer, corpus.sentences, corpus.held_out, folder
        ),
        what="a text-to-token model",
    )

    def make(folder: Path) -> dict[str, Any]:
        speech_shards(corpus.spoken, tokenizer, folder, corpus.rejects)
        _text_shards(corpus.texts, tokenizer, folder / "text")
        return _interleaved_shards(
            corpus.to_interleave, speaker_dir, folder / "interleaved", settings.interleave, settings.passes
        )

    made_of = [settings.text, settings.interleave, settings.passes]
    return stages.stage("shards", made_of, make, what="Parquet shards")


def _language_model(settings: OwnConfig, stages: Story, shards_dir: Path, tokenizer: SupervisedTokenizer) -> Path:
    # No transcripts, no pairs; no word times, nothing to interleave in parallel.
    shards = {s: shards_dir / s for s in SOURCES if is_complete(shards_dir / s)}
    return stages.stage(
        "lm/lm",
        settings.lm,
        lambda folder: train_lm.train_lm(
            settings.lm,
            shards,
            text_tokenizer_of(tokenizer),
            folder,
            "lm",
            tokenizer_dir=stages.run_dir / "tokenizer",
        ),
        what="a speech-text language model",
    )


def speech_shards(
    utterances: Sequence[Utterance], tokenizer: SupervisedTokenizer, folder: Path, rejects: Sequence[Reject]
) -> None:
    """folder/speech, folder/asr and folder/tts from what has a transcript, folder/parallel from what has word times."""
    if not utterances:
        raise ValueError(f"nothing to tokenize: all {len(rejects)} recordings were rejected, {rejects[0].reason}")
    text_tokenizer = text_tokenizer_of(tokenizer)
    tokens = encode_utterances(tokenizer, utterances)
    named = [t for t in tokens if t.text]
    vocab = Vocab(num_text=text_tokenizer.size, num_speech=tokenizer.vocab_size)
    info = shard_info(vocab, text_tokenizer, tokenizer.fingerprint, stage="tokenize")
    write_documents(folder / "speech", info, [*speech_documents(tokens), *rejects])
    for task in ("asr", "tts") if named else ():
        documents = pair_documents(task, named, text_tokenizer)
        write_documents(folder / task, info, documents)
    if recordings := list(spoken_texts(named)):
        write_spoken(folder / "parallel", info, recordings)


def _text_shards(texts: Sequence[TextDocument], tokenizer: SupervisedTokenizer, folder: Path) -> None:
    text_tokenizer = text_tokenizer_of(tokenizer)
    vocab = Vocab(num_text=text_tokenizer.size, num_speech=tokenizer.vocab_size)
    info = shard_info(vocab, text_tokenizer, tokenizer.fingerprint, stage="text")
    write_documents(folder, info, text_documents(texts, text_tokenizer))


def _interleaved_shards(
    texts: Sequence[TextDocument], speaker_dir: Path, folder: Path, settings: InterleaveConfig, passes: int
) -> dict[str, Any]:
    loaded = network.load(speaker_dir)
    engine = EngineConfig().build(loaded.model, loaded.tokenizer)
    stats = InterleaveStats()
    info = shard_info(
        loaded.model.vocab, loaded.tokenizer, loaded.speech_fingerprint, stage="interleave", **config.to_dict(settings)
    )
    documents = interleaved_documents(texts, engine, loaded.tokenizer, passes, settings, stats)
    counts = write_documents(folder, info, documents)
    found = {f"shards.interleaved.{key}": n for key, n in counts.items()}
    return {**found, "shards.interleaved.ratio": stats.ratio}


def _held_out_loss(lm_dir: Path, held_out: Sequence[Utterance], tokenizer: SupervisedTokenizer) -> dict[str, Any]:
    asked, _ = load_scorer(lm_dir)
    speech = [t.segment() for t in encode_utterances(tokenizer, held_out)]
    text = [text_segment(text_tokenizer_of(tokenizer), u.text) for u in held_out]
    return {f"lm.lm.{m}_loss": asked.mean_loss(segments) for m, segments in (("speech", speech), ("text", text))}
