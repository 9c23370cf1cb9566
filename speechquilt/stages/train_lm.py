"""Stage 5: pre-train one speech-text language model on a mixture of shards.

With `budget="steps"` or "units" models are compared at equal global units: a patched model reads more tokens. With
"tokens" all read the same data, and a patched model steps over fewer units.
Trap: a run folder remembers its patcher and vocabulary in `run.json`, and its speech BPE in `speech_bpe.json`; a model
without them cannot be used.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from speechquilt import config
from speechquilt.data.feed.mixture import Mixture, MixtureConfig, Source
from speechquilt.data.feed.speech_bpe import BaseTokenCounts, SpeechBPE, speech_spans
from speechquilt.data.feed.splits import split
from speechquilt.data.feed.spoken_documents import as_documents
from speechquilt.data.interleaving.parallel import word_by_word, word_pieces
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder, open_shards
from speechquilt.evals.measures import Measure
from speechquilt.evals.pieced import PiecedScorer
from speechquilt.evals.scorer import Scorer
from speechquilt.evals.source_loss import HeldOut
from speechquilt.model import saving
from speechquilt.model.base_vocabulary import check_base
from speechquilt.model.flops import training_flops
from speechquilt.model.latent import LatentLM
from speechquilt.model.patcher import PatcherConfig, eval_patcher
from speechquilt.model.plain import PlainLM
from speechquilt.protocols import Loader, Patcher, SpeechTokenizer
from speechquilt.stages.budget import AtProgress, steps_for
from speechquilt.stages.held_out import note, stops
from speechquilt.stages.lm_recipe import RUN, LMRecipe, LMRun
from speechquilt.stages.lm_start import BPE_FILE, check_apart, copy_bpe, has_opening_marker, new_model
from speechquilt.stages.train_text_to_token import codebook_of
from speechquilt.stages.training_documents import text_fingerprint
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import codebook_rows
from speechquilt.train import checkpoint, distributed
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import Trainer, TrainResult
from speechquilt.types import Batch
from speechquilt.vocab import Vocab

TEXT_TOKENIZER = "text_tokenizer.json"  # in a run folder
TOKENIZER_DIR = "tokenizer"  # in a run folder: the speech tokenizer, where the run brings a copy
STORY_TOKENIZER = "../../tokenizer"  # seen from lm/NAME of a story that was made before `run.json` said it
MOST_HELD_OUT = 256  # documents of a source that are measured, however many are held out
BPE_SPANS = 100_000  # speech spans to learn pieces from (spec latent-speech-text 5)

MEASURES = (
    Measure(key="lm.<run>.parameters", kind="count", meaning="parameters of the model"),
    Measure(key="lm.<run>.steps", kind="count", meaning="training steps"),
    Measure(key="lm.<run>.units", kind="count", meaning="global units seen in training: steps of the global transformer"),
    Measure(key="lm.<run>.tokens", kind="count", meaning="tokens seen in training"),
    Measure(key="lm.<run>.speech_tokens", kind="count", meaning="speech tokens seen in training"),
    Measure(key="lm.<run>.text_tokens", kind="count", meaning="text tokens seen in training"),
    Measure(key="lm.<run>.flops", kind="amount", unit="FLOP", meaning="floating point operations of the training, those of local modules too"),
    Measure(key="lm.<run>.seconds", kind="amount", unit="s", meaning="wall time of the training"),
    Measure(key="lm.<run>.held_out_<source>", kind="amount", unit="nats", meaning="loss per token of the source's documents that were held out"),
    Measure(key="lm.<run>.patch_size", kind="amount", meaning="realised speech tokens per patch in training"),
    Measure(key="lm.<run>.text_patch_size", kind="amount", meaning="realised text tokens per unit in training; 1 by construction"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LMData:
    """What one run trains on."""

    sources: Mapping[str, Source]
    """Its sources as documents, by name."""
    run: LMRun
    """The vocabulary that they agree on."""
    bpe: SpeechBPE | None
    """What cuts their speech into pieces; None when nothing does."""
    held_out: Mapping[str, Source] = field(default_factory=dict)
    """Documents of the sources that are not trained on, by name; none when the recipe holds none out."""

    def measure(self, recipe: LMRecipe) -> HeldOut:
        """What asks for the loss on the documents held out, `MOST_HELD_OUT` of each source."""
        documents = {
            name: [
                part[i] if self.bpe is None else self.bpe.document(part[i])
                for i in range(min(len(part), MOST_HELD_OUT))
            ]
            for name, part in self.held_out.items()
        }
        return HeldOut(documents, self.run.vocab, eval_patcher(recipe.patcher), recipe.pack.tokens_per_row)

    def mixture(self, recipe: LMRecipe) -> Mixture:
        weights = {s: recipe.weights[s] for s in self.sources}
        convert = None if self.bpe is None else self.bpe.document
        max_epochs = {s: epochs for s, epochs in recipe.max_epochs.items() if s in weights}
        return MixtureConfig(weights=weights, seed=recipe.train.seed, max_epochs=max_epochs).build(
            self.sources, convert, self.run.vocab.num_laid_out
        )

    def loader(
        self,
        recipe: LMRecipe,
        mixture: Mixture,
        patcher: Patcher,
        *,
        total_batches: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Loader:
        """Packed batches whose `meta` counts base tokens."""
        seed, vocab = recipe.train.seed, self.run.vocab
        loader = recipe.pack.build(
            mixture, vocab, patcher, seed=seed, total_batches=total_batches, rank=rank, world_size=world_size
        )
        return loader if self.bpe is None else BaseTokenCounts(loader, self.bpe, vocab)


def train_lm(
    recipe: LMRecipe,
    shards: dict[str, Path],
    text_tokenizer: TextTokenizer,
    folder: Path,
    name: str,
    *,
    tokenizer_dir: Path | None = None,
    speech_tokenizer: SpeechTokenizer | None = None,
    map_shards: bool = False,
) -> dict[str, Any]:
    """Train on the sources of `shards` that have a weight; save to `folder`; return flat results (`lm.<name>.*`).

    `tokenizer_dir`: the speech tokenizer, whose place is noted for `tokenizer_folder`. `speech_tokenizer`, `map_shards`: see
    `open_data`.
    Counts in the results: `units` are what the global model steps over (with `speech_pieces`, pieces); `tokens` and
    `speech_tokens` are base tokens for every kind of run.
    Raises ValueError when the shards were made with different tokenizers, or with another than `text_tokenizer`.
    """
    if recipe.warm_start:
        check_base(Path(recipe.warm_start), text_tokenizer)
    if recipe.continue_from:
        check_apart(Path(recipe.continue_from), folder)
    data = open_data(recipe, shards, text_tokenizer, folder, map_shards, speech_tokenizer)
    patcher = recipe.patcher.build()
    train = replace(recipe.train, steps=num_steps(recipe, data, patcher))
    vocab = data.run.vocab
    model = new_model(recipe, data.run)
    model_config = model.config
    if recipe.codebook_rows:
        codebook_rows.attach_to(*speech_rows(model, vocab), codebook_of(speech_tokenizer), recipe.train.seed)
    loader = data.loader(
        recipe,
        data.mixture(recipe),
        patcher,
        total_batches=train.steps * train.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )

    def flops(batch: Batch) -> float:
        return training_flops(model_config, batch)

    trainer = Trainer(train, model, NextTokenObjective(vocab, flops), loader, folder, name=name)
    losses: dict[str, float] = {}
    held_out = data.measure(recipe)
    for step in stops(recipe.evaluate_every, train.steps, folder):
        done = trainer.train(stop_after=step)
        if data.held_out:
            losses = held_out.losses(model)
            note(folder, {"step": done.steps, **losses})
    if distributed.rank() == 0:
        if distributed.world_size() > 1:  # its own copy may be a shard of the model
            model = saving.empty(model_config)
            if recipe.codebook_rows:
                codebook_rows.attach_to(*speech_rows(model, vocab), codebook_of(speech_tokenizer))
            checkpoint.load_model(folder, model)
        codebook_rows.fold_into(speech_rows(model, vocab)[0])
        saving.save(model.eval().to("cpu"), folder)
        text_tokenizer.save(folder / TEXT_TOKENIZER)
        where = "" if tokenizer_dir is None else os.path.relpath(tokenizer_dir, folder)
        before = os.path.relpath(recipe.continue_from, folder) if recipe.continue_from else ""
        made = replace(
            data.run,
            tokenizer=where,
            continued_from=before,
            tokens_per_row=recipe.pack.tokens_per_row,
            units_per_row=recipe.pack.units_per_row,
        )
        config.save(made, folder / RUN)
    return {f"lm.{name}.{key}": value for key, value in (_results(model, done) | losses).items()}


def speech_rows(model: PlainLM | LatentLM, vocab: Vocab) -> tuple[list[nn.Embedding | nn.Linear], int]:
    """The tables that read and write speech, and the number of the first code's row in them."""
    first_id = model.config.first_local_id if isinstance(model, LatentLM) else 0
    return [model.embedding, model.head], vocab.speech_start - first_id


def _results(model: PlainLM | LatentLM, done: TrainResult) -> dict[str, Any]:
    totals = {key.removeprefix("total_"): value for key, value in done.totals.items()}
    text_tokens = totals["tokens"] - totals["speech_tokens"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": done.steps,
        "units": int(totals["units"]),
        "tokens": int(totals["tokens"]),
        "speech_tokens": int(totals["speech_tokens"]),
        "text_tokens": int(text_tokens),
        "flops": totals["flops"],
        "seconds": done.seconds,
        "patch_size": totals["speech_tokens"] / max(1.0, totals["speech_units"]),
        "text_patch_size": text_tokens / max(1.0, totals["units"] - totals["speech_units"]),
    }


def check_shards(shards: Mapping[str, Path], speech: SpeechTokenizer, text: TextTokenizer) -> None:
    """Before any work. Raises ValueError when a folder was made with another speech or text tokenizer."""
    made_with = {"speech_fingerprint": speech.fingerprint, "text_fingerprint": text_fingerprint(text)}
    for path in shards.values():
        open_shards(path).check(**made_with)


def open_data(
    recipe: LMRecipe,
    shards: dict[str, Path],
    text_tokenizer: TextTokenizer,
    folder: Path,
    map_shards: bool = False,
    speech_tokenizer: SpeechTokenizer | None = None,
) -> LMData:
    """Open the sources that have a weight; learn the speech BPE into `folder`, or read it there when it is there already.

    `map_shards` maps them into memory, for corpora that do not fit; the documents are the same. `speech_tokenizer`: what
    must have made their speech; where none of them has any, the vocabulary has room for its tokens.
    """
    opened = {s: open_shards(path, mapped=map_shards) for s, path in shards.items() if recipe.weights.get(s)}
    run = _run_of(opened, text_tokenizer, recipe.patcher, speech_tokenizer)
    run = replace(run, opening_marker=has_opening_marker(recipe))
    encode = word_by_word(text_tokenizer)
    pieces = word_pieces(text_tokenizer) if recipe.patcher.units == "pieces" else None
    sources: dict[str, Any] = {
        s: as_documents(shard, encode, seed=recipe.train.seed, source=s, piece_lengths=pieces, join=recipe.join)
        for s, shard in opened.items()
    }
    held_out: dict[str, Source] = {}
    if recipe.held_out:
        parts = {s: split(s, source, source.ids(), recipe.held_out) for s, source in sources.items()}
        sources, held_out = {s: p.train for s, p in parts.items()}, {s: p.held_out for s, p in parts.items()}
    if recipe.speech_pieces is None:
        return LMData(sources=sources, run=run, bpe=None, held_out=held_out)
    if recipe.continue_from:
        copy_bpe(Path(recipe.continue_from), folder)
    bpe = _speech_bpe(sources, run.num_speech, recipe.speech_pieces, recipe.train.seed, folder / BPE_FILE)
    run = replace(run, speech_pieces=bpe.num_pieces, bpe_fingerprint=bpe.fingerprint)
    return LMData(sources=sources, run=run, bpe=bpe, held_out=held_out)


def num_steps(recipe: LMRecipe, data: LMData, patcher: Patcher) -> int:
    """`train.steps`, or as many as the budget in units or tokens allows; equal on every rank and in every resumed run."""
    if recipe.budget == "steps":
        return recipe.train.steps
    # One mixture for all points, so that each sees other documents; no bounds, since that may take many epochs.
    mixture = data.mixture(replace(recipe, max_epochs={}))

    def loader_at(progress: float) -> Loader:
        return data.loader(recipe, mixture, AtProgress(patcher, progress), total_batches=1)

    return steps_for(recipe.budget, recipe.budget_amount, recipe.train.accumulate, loader_at)


def load_scorer(folder: Path, device: str = "cpu") -> tuple[Scorer, LMRun]:
    """A trained model ready to be asked, patched as models are tested. Speech goes in and comes out as base ids."""
    run = config.load(LMRun, folder / RUN)
    model, patcher = saving.load(folder).eval().to(device), eval_patcher(run.patcher)
    if run.speech_pieces is None:
        return Scorer(model, run.vocab, patcher, device=device), run
    bpe = SpeechBPE.load(folder / BPE_FILE)
    if bpe.fingerprint != run.bpe_fingerprint:
        raise ValueError(
            f"{folder / BPE_FILE} has fingerprint {bpe.fingerprint}, the model was trained with {run.bpe_fingerprint}; "
            "put the file of its own run back"
        )
    return PiecedScorer(model, run.vocab, patcher, bpe, device=device), run


def tokenizer_folder(lm: Path, run: LMRun) -> Path:
    """The speech tokenizer behind a trained model: inside its folder, or where its run says."""
    inside, noted = lm / TOKENIZER_DIR, lm / (run.tokenizer or STORY_TOKENIZER)
    return inside if inside.is_dir() else Path(os.path.normpath(noted))


def _speech_bpe(sources: Mapping[str, Source], num_ids: int, num_pieces: int, seed: int, path: Path) -> SpeechBPE:
    """The BPE of a run folder; a resumed run reads the one it began with."""
    if not path.is_file():
        SpeechBPE.train(speech_spans(sources, seed, BPE_SPANS), num_ids, num_pieces).save(path)
    bpe = SpeechBPE.load(path)
    if (bpe.num_ids, bpe.wanted) != (num_ids, num_pieces):
        raise ValueError(
            f"{path} was learned for {bpe.num_ids} ids and speech_pieces={bpe.wanted}, this run has {num_ids} ids and "
            f"speech_pieces={num_pieces}; choose another run folder"
        )
    return bpe


def _run_of(
    sources: dict[str, ShardFolder | SpokenFolder],
    text_tokenizer: TextTokenizer,
    patcher: PatcherConfig,
    speech_tokenizer: SpeechTokenizer | None,
) -> LMRun:
    """The vocabulary that all sources agree on, and the text tokenizer with them."""
    if not sources:
        raise ValueError("no source has both shards and a weight; name at least one in both")
    infos = {name: shards.info for name, shards in sources.items()}
    values: dict[str, Any] = {
        "num_text": text_tokenizer.size,
        "num_speech": speech_tokenizer.vocab_size if speech_tokenizer else 0,
        "text_fingerprint": text_fingerprint(text_tokenizer),
        "speech_fingerprint": speech_tokenizer.fingerprint if speech_tokenizer else "",
    }
    given = dict(values)
    for key in values:
        found = {name: getattr(info, key) for name, info in infos.items() if getattr(info, key)}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"the shards disagree on {key}: {found}; make them all with the same tokenizers before training"
            )
        values[key] = next(iter(found.values()), values[key])
    for shards in sources.values():
        shards.check(
            speech_fingerprint=given["speech_fingerprint"] or values["speech_fingerprint"],
            text_fingerprint=given["text_fingerprint"],
        )
    return LMRun(**values, patcher=patcher)
