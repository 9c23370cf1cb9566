"""The same stages on one's own data: a folder of audio with transcripts, and a folder of text.

Place in the pipeline: layer 4; `speechquilt story own` runs all stages, the other commands run one each.
Cost: that of `defaults`, minutes on two cores, which is right for trying things out; real data wants larger sizes and a GPU.
Trap: without word times in the metadata an utterance is one unit, so aligned and curriculum patching refuse its shards
and the text-to-token model learns whole utterances only. Use static patching, bring word times, or let `align=true` find them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from speechquilt import audio, config
from speechquilt.data.interleave import InterleaveConfig, InterleaveStats
from speechquilt.data.pack import PackConfig
from speechquilt.data.shards import is_complete
from speechquilt.data.spoken import JoinConfig
from speechquilt.evals.tasks import ChoiceItem, ChoiceTask
from speechquilt.model import presets
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.lm import PlainLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.recipes import defaults
from speechquilt.recipes import shards as shard_recipes
from speechquilt.recipes.align import align_corpus, with_words
from speechquilt.recipes.aligner import OWN as OWN_ALIGNER
from speechquilt.recipes.aligner import AlignerRecipe
from speechquilt.recipes.budget import Budget
from speechquilt.recipes.corpus import folder_corpus
from speechquilt.recipes.lm import LMRecipe, load_scorer, train_lm
from speechquilt.recipes.mixtures import shares, weights_of
from speechquilt.recipes.speech import encode_all, text_tokenizer_of
from speechquilt.recipes.speech import tokenize as tokenize_utterances
from speechquilt.recipes.stage import Story, make_folder, report, required, write_json
from speechquilt.recipes.text_to_token import TextToTokenRecipe, train_text_to_token
from speechquilt.recipes.tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import model as text_to_token_models
from speechquilt.text_to_token import presets as text_to_token_presets
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer.model import SpeechTokenizer
from speechquilt.train import distributed
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import Segment
from speechquilt.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class TextToTokenRun:
    """`speech`: the same kind of folder; `tokenizer`: run folder of the speech tokenizer; `preset`: a size of
    docs/how-to/text-to-token.md in place of `recipe.llama`."""

    speech: str = ""
    tokenizer: str = "runs/tokenizer"
    run_dir: str = "runs/text_to_token"
    preset: str = ""
    recipe: TextToTokenRecipe = defaults.TEXT_TO_TOKEN


@dataclass(frozen=True, kw_only=True)
class LMTraining:
    """`shards`: source name -> folder, for example '{"speech": "shards/speech", "text": "shards/text"}'; `weights`: share of
    tokens per source (default: the story's, for the sources given), or `mixture`: a preset of `mixtures` instead of them;
    `max_epochs`: source name -> how often it may be gone through; `join_seconds` above 0 makes one document of neighbouring
    recordings whose ids agree on the first group of `join_session`, up to that length (docs/how-to/mixtures.md); `tokenizer`: run folder of the speech tokenizer.
    `budget` "units" or "tokens" trains for `budget_amount` of them instead of `train.steps`; `speech_pieces` reads speech as
    that many BPE pieces. `preset` is a size of docs/presets.md, `text_path` the way of text in a latent model ("decoder" or
    "bypass"), `warm_start` a Hugging Face folder to start from. On many GPUs: docs/how-to/many-gpus.md.
    """

    shards: dict[str, str] = field(default_factory=dict)
    tokenizer: str = "runs/tokenizer"
    run_dir: str = "runs/lm"
    kind: Literal["plain", "latent"] = "latent"
    preset: str = "toy"
    text_path: Literal["decoder", "bypass"] = "decoder"
    warm_start: str = ""
    patcher: PatcherConfig = PatcherConfig(kind="static", patch_size=defaults.PATCH_SIZE)
    weights: dict[str, float] = field(default_factory=lambda: dict(defaults.WEIGHTS))
    mixture: str = ""
    max_epochs: dict[str, float] = field(default_factory=dict)
    join_seconds: float = 0.0
    join_session: str = JoinConfig().session
    pack: PackConfig = defaults.PACK
    train: TrainConfig = defaults.PRETRAIN
    budget: Budget = "steps"
    budget_amount: int = 0
    speech_pieces: int | None = None


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """`speech`: folder of audio with transcripts; `text`: folder or file of text (default: the transcripts). `align`: train an
    aligner on the recordings (`aligner`) and give word times to those that have none.
    """

    speech: str = ""
    text: str | None = None
    run_dir: str = "runs/own"
    align: bool = False
    aligner: AlignerRecipe = OWN_ALIGNER
    tokenizer: TokenizerRecipe = defaults.TOKENIZER
    text_to_token: TextToTokenRecipe = defaults.TEXT_TO_TOKEN
    interleave: InterleaveConfig = InterleaveConfig()
    passes: int = 1
    kind: Literal["plain", "latent"] = "latent"
    patcher: PatcherConfig = PatcherConfig(kind="static", patch_size=defaults.PATCH_SIZE)
    weights: dict[str, float] = field(default_factory=lambda: dict(defaults.WEIGHTS))
    pack: PackConfig = defaults.PACK
    pretrain: TrainConfig = defaults.PRETRAIN


def story(settings: OwnConfig) -> None:
    """All stages on a folder; ends with results.json and held-out losses."""
    stages = Story(Path(settings.run_dir))
    corpus = folder_corpus(required("speech", settings.speech), Path(settings.text) if settings.text else None)
    for reject in corpus.rejects:
        print(f"  left out {reject.id}: {reject.reason}")
    if settings.align and not all(u.alignment for u in [*corpus.sentences, *corpus.held_out]):
        whole = corpus
        aligner_dir = stages.stage(
            "aligner",
            [settings.speech, settings.aligner],
            lambda folder: align_corpus(settings.aligner, whole, folder),
            what=f"word times for {len(corpus.sentences)} recordings",
        )
        corpus = with_words(corpus, aligner_dir)
    texts = [u.text for u in corpus.sentences] + [t.text for t in corpus.texts]
    tokenizer_dir = stages.stage(
        "tokenizer",
        [settings.speech, settings.tokenizer],
        lambda folder: train_tokenizer(
            settings.tokenizer,
            TextTokenizer.train(texts, settings.tokenizer.model.text_vocab_size),
            corpus.sentences,
            corpus.held_out,
            folder,
        ),
        what=f"a speech tokenizer from {len(corpus.sentences)} recordings",
    )
    tokenizer = SpeechTokenizer.load(tokenizer_dir)
    speaker_dir = stages.stage(
        "text_to_token",
        settings.text_to_token,
        lambda folder: train_text_to_token(
            settings.text_to_token, tokenizer, corpus.sentences, corpus.held_out, folder
        ),
        what="a text-to-token model",
    )

    def make_shards(folder: Path) -> dict[str, Any]:
        _speech_shards(corpus.spoken, tokenizer, folder, corpus.rejects)
        _text_shards(corpus.texts, tokenizer, folder / "text")
        return _interleaved_shards(
            corpus.to_interleave, speaker_dir, folder / "interleaved", settings.interleave, settings.passes
        )

    shards_dir = stages.stage(
        "shards", [settings.text, settings.interleave, settings.passes], make_shards, what="Parquet shards"
    )
    recipe = LMRecipe(
        model=_model(settings.kind),
        patcher=settings.patcher,
        weights=settings.weights,
        pack=settings.pack,
        train=settings.pretrain,
    )
    # No transcripts, no pairs; no word times, nothing to interleave in parallel.
    shards = {s: shards_dir / s for s in shard_recipes.SOURCES if is_complete(shards_dir / s)}
    lm_dir = stages.stage(
        "lm/lm",
        recipe,
        lambda folder: train_lm(recipe, shards, text_tokenizer_of(tokenizer), folder, "lm"),
        what="a speech-text language model",
    )
    stages.stage(
        "evals/lm",
        {},
        lambda folder: _held_out_loss(lm_dir, corpus.held_out, tokenizer),
        what="loss on held-out recordings and their transcripts",
    )
    write_json(stages.run_dir / "results.json", stages.results)
    print(json.dumps(stages.results, indent=1))
    print(
        f"\nresults  {stages.run_dir / 'results.json'}\nmodel    {lm_dir}\nnext     speechquilt eval {lm_dir} ITEMS.jsonl"
    )


def run_text_to_token(settings: TextToTokenRun) -> None:
    """`speechquilt train text_to_token`."""
    recipe = settings.recipe
    if settings.preset:
        recipe = replace(recipe, llama=text_to_token_presets.llama(settings.preset))
    corpus = folder_corpus(required("speech", settings.speech), None)
    tokenizer = SpeechTokenizer.load(required("tokenizer", settings.tokenizer))
    make_folder(Path(settings.run_dir))
    found = train_text_to_token(recipe, tokenizer, corpus.sentences, corpus.held_out, Path(settings.run_dir))
    report(found, Path(settings.run_dir), f"speechquilt interleave TEXT SHARDS --text-to-token {settings.run_dir}")


def run_lm(settings: LMTraining) -> None:
    """`speechquilt train lm`."""
    tokenizer, shards = tokenizer_and_shards(settings.tokenizer, settings.shards)
    recipe = LMRecipe(
        model=_model(settings.kind, settings.preset, settings.text_path),
        warm_start=settings.warm_start,
        patcher=settings.patcher,
        weights=weights_of(settings.mixture, settings.weights, settings.shards),
        max_epochs=settings.max_epochs,
        join=JoinConfig(max_tokens=round(settings.join_seconds * tokenizer.frame_rate), session=settings.join_session),
        pack=settings.pack,
        train=settings.train,
        budget=settings.budget,
        budget_amount=settings.budget_amount,
        speech_pieces=settings.speech_pieces,
    )
    if distributed.rank() == 0:
        print(f"mixture  {shares(recipe.weights)}")
    folder = Path(settings.run_dir)
    make_folder(folder)
    found = train_lm(recipe, shards, text_tokenizer_of(tokenizer), folder, "lm")
    if distributed.rank() == 0:
        tokenizer.save(folder / "tokenizer")
        report(found, folder, f"speechquilt eval {settings.run_dir} ITEMS.jsonl")
    distributed.stop()


def evaluate(lm: Path, items: Path, out: Path | None) -> None:
    """`speechquilt eval`: choice items whose parts are text or audio."""
    scorer, run = load_scorer(lm)
    tokenizer_dir = lm / "tokenizer" if (lm / "tokenizer").is_dir() else lm.parent.parent / "tokenizer"
    tokenizer = SpeechTokenizer.load(tokenizer_dir)
    if tokenizer.fingerprint != run.speech_fingerprint:
        raise ValueError(
            f"{tokenizer_dir} has fingerprint {tokenizer.fingerprint}, {lm} was trained on {run.speech_fingerprint}; "
            f"put the tokenizer that made its shards into {lm / 'tokenizer'}"
        )
    task = ChoiceTask(name=items.stem, version=1, items=list(_items(items, tokenizer)))
    found = task.run(scorer)
    if out is not None:
        write_json(out, found)
    measured = found["accuracy"]
    print(f"accuracy {measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}] n={measured['n']}")
    print(f"chance   {found['chance']:.3f}\nresults  {out or 'give --out FILE to keep them'}")


def _items(path: Path, tokenizer: SpeechTokenizer) -> Iterator[ChoiceItem]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a JSONL file of items is expected, see speechquilt eval --help")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            id = str(row.get("id", number))
            yield ChoiceItem(
                id=id,
                cluster=str(row.get("cluster", id)),
                prompt=(_part(row["prompt"], path.parent, tokenizer),),
                endings=tuple(_part(part, path.parent, tokenizer) for part in row["endings"]),
                answer=row["answer"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}:{number}: {error!r}; a line is {{"prompt": PART, "endings": [PART, ...], "answer": 0}}'
            ) from error


def _part(part: dict[str, str], folder: Path, tokenizer: SpeechTokenizer) -> Segment:
    if "text" in part:
        return shard_recipes.text_segment(text_tokenizer_of(tokenizer), part["text"])
    wave = audio.resample(audio.check(audio.load(folder / part["audio"])), tokenizer.sample_rate)
    return Segment(modality="speech", ids_T=encode_all(tokenizer, [wave], what=part["audio"])[0])


def _speech_shards(utterances: Any, tokenizer: SpeechTokenizer, folder: Path, rejects: Any) -> None:
    """folder/speech, folder/asr and folder/tts from what has a transcript, folder/parallel from what has word times."""
    if not utterances:
        raise ValueError(f"nothing to tokenize: all {len(rejects)} recordings were rejected, {rejects[0].reason}")
    text_tokenizer = text_tokenizer_of(tokenizer)
    tokens = tokenize_utterances(tokenizer, utterances)
    ids = [u.id for u in utterances]
    named = [(id, t) for id, t in zip(ids, tokens) if t.text]
    vocab = Vocab(num_text=text_tokenizer.size, num_speech=tokenizer.vocab_size)
    info = shard_recipes.shard_info(vocab, text_tokenizer, tokenizer.fingerprint, stage="tokenize")
    shard_recipes.write(folder / "speech", info, [*shard_recipes.speech_documents(ids, tokens), *rejects])
    for task in ("asr", "tts") if named else ():
        documents = shard_recipes.pair_documents(task, [id for id, _ in named], [t for _, t in named], text_tokenizer)
        shard_recipes.write(folder / task, info, documents)
    if recordings := list(shard_recipes.spoken_texts([id for id, _ in named], [t for _, t in named])):
        shard_recipes.write_spoken(folder / "parallel", info, recordings)


def _text_shards(texts: Any, tokenizer: SpeechTokenizer, folder: Path) -> None:
    text_tokenizer = text_tokenizer_of(tokenizer)
    vocab = Vocab(num_text=text_tokenizer.size, num_speech=tokenizer.vocab_size)
    info = shard_recipes.shard_info(vocab, text_tokenizer, tokenizer.fingerprint, stage="text")
    shard_recipes.write(folder, info, shard_recipes.text_documents(texts, text_tokenizer))


def _interleaved_shards(
    texts: Any, speaker_dir: Path, folder: Path, settings: InterleaveConfig, passes: int
) -> dict[str, Any]:
    loaded = text_to_token_models.load(speaker_dir)
    engine = EngineConfig().build(loaded.model, loaded.tokenizer)
    stats = InterleaveStats()
    info = shard_recipes.shard_info(
        loaded.model.vocab, loaded.tokenizer, loaded.speech_fingerprint, stage="interleave", **config.to_dict(settings)
    )
    documents = shard_recipes.interleaved_documents(texts, engine, loaded.tokenizer, passes, settings, stats)
    counts = shard_recipes.write(folder, info, documents)
    found = {f"shards.interleaved.{key}": n for key, n in counts.items()}
    return {**found, "shards.interleaved.ratio": stats.ratio}


def _held_out_loss(lm_dir: Path, held_out: Any, tokenizer: SpeechTokenizer) -> dict[str, Any]:
    scorer, _ = load_scorer(lm_dir)
    speech = [shard_recipes.speech_segment(t) for t in tokenize_utterances(tokenizer, held_out)]
    text = [shard_recipes.text_segment(text_tokenizer_of(tokenizer), u.text) for u in held_out]
    return {f"lm.lm.{m}_loss": scorer.mean_loss(segments) for m, segments in (("speech", speech), ("text", text))}


def _model(
    kind: str, preset: str = "toy", text_path: Literal["decoder", "bypass"] = "decoder"
) -> PlainLMConfig | LatentLMConfig:
    return presets.plain(preset) if kind == "plain" else replace(presets.latent(preset), text_path=text_path)


def tokenizer_and_shards(tokenizer: str, shards: dict[str, str]) -> tuple[SpeechTokenizer, dict[str, Path]]:
    """What every training on shards needs. Raises ValueError when the settings do not name it."""
    if not shards:
        raise ValueError('shards is empty; name at least one, for example shards=\'{"speech": "shards/speech"}\'')
    return SpeechTokenizer.load(required("tokenizer", tokenizer)), {s: Path(path) for s, path in shards.items()}
