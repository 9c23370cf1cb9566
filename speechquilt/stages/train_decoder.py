"""Train a speech decoder: what its flow learns from recordings and their tokens (spec 1, 3.2), with a vocoder beside it.

First all voices, then one voice, in which the decoder then speaks: without a speaker's vector it would have to guess whose
voice a token is meant in.
Trap: the decoder belongs to one tokenizer's tokens; its folder holds that tokenizer's fingerprint.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from speechquilt.decoder.flow import FlowConfig, FlowDecoder
from speechquilt.decoder.phase import PhaseVocoderConfig
from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.decoder.vocoder_folder import OwnVocoder
from speechquilt.evals.measures import Measure
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.sound_pieces import PieceLoader, PiecesConfig, TokenSound, with_statistics
from speechquilt.train import checkpoint, distributed
from speechquilt.train.objectives.velocity import flow_objective
from speechquilt.train.trainer import TrainConfig, Trainer

ALL_VOICES = "all_voices"  # folder of the first run, inside the decoder's

MEASURES = (
    Measure(key="decoder.steps", kind="count", meaning="training steps of the decoder's flow, both runs together"),
    Measure(key="decoder.parameters", kind="count", meaning="parameters of the decoder's flow"),
    Measure(key="decoder.hours", kind="amount", unit="h", meaning="speech that the decoder's last run learned from"),
    Measure(key="decoder.left_out", kind="count", meaning="recordings that turned out to be broken while it learned"),
)


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """How a speech decoder is trained."""

    flow: FlowConfig
    """Tokens to mel; what it says of the tokenizer (codebook_size, token_rate, tokenizer) and of the mel's scale is taken from the
    data."""
    pieces: PiecesConfig = PiecesConfig()
    """How recordings are cut for both runs; pieces are truncated in the second alone."""
    first: TrainConfig | None = None
    """A run before it on all voices, with whole pieces; its seed should be another one. None: no such run."""
    train: TrainConfig
    """The run on the one voice that the decoder shall have, or on all where there is no such."""
    phases: PhaseVocoderConfig = PhaseVocoderConfig()
    """What makes sound of the mel where no vocoder is given; its mel is the flow's. It needs no training."""


def train_decoder(
    recipe: DecoderRecipe,
    tokenizer: SpeechTokenizer,
    all_voices: TokenSound,
    folder: Path,
    *,
    one_voice: TokenSound | None = None,
    vocoder: OwnVocoder | None = None,
) -> dict[str, Any]:
    """Train, save a `SpeechDecoder` to `folder`, return flat results (`decoder.*`). Goes on from where it stopped.

    Under torchrun every rank gets the same recordings, and rank 0 writes.
    """
    flow = replace(
        recipe.flow,
        codebook_size=tokenizer.vocab_size,
        token_rate=tokenizer.frame_rate,
        tokenizer=tokenizer.fingerprint,
    )
    speech = all_voices if one_voice is None else one_voice
    # All rows, whatever the rank: the mel's scale must be the same on every one.
    flow = with_statistics(flow, PieceLoader(speech, replace(recipe.pieces, threads=0), flow, seed=recipe.train.seed))
    model = new_flow(flow, recipe.train.seed)
    if recipe.first and checkpoint.latest(folder) is None:
        whole = replace(recipe, pieces=replace(recipe.pieces, truncated=0.0))
        _run(whole, recipe.first, model, all_voices, folder / ALL_VOICES, "decoder, all voices")
        if distributed.world_size() > 1:  # its own copy may be a shard of the model
            model = new_flow(flow, recipe.train.seed)
            checkpoint.load_model(folder / ALL_VOICES, model)
    left_out = _run(recipe, recipe.train, model, speech, folder, "decoder")
    if distributed.world_size() > 1:
        model = new_flow(flow, recipe.train.seed)
        checkpoint.load_model(folder, model)
    if distributed.rank() == 0:
        made = vocoder or replace(recipe.phases, mel=flow.mel).build()
        SpeechDecoder(model.eval().to("cpu"), made).save(folder)
    return {
        "decoder.steps": recipe.train.steps + (recipe.first.steps if recipe.first else 0),
        "decoder.parameters": sum(p.numel() for p in model.parameters()),
        "decoder.hours": sum(map(len, speech.tokens)) / flow.token_rate / 3600,
        "decoder.left_out": left_out,
    }


def new_flow(config: FlowConfig, seed: int) -> FlowDecoder:
    """With weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build()


def _run(
    recipe: DecoderRecipe, train: TrainConfig, model: FlowDecoder, speech: TokenSound, folder: Path, name: str
) -> int:
    """One run; returns how many recordings were left out."""
    loader = _loader(recipe, train, model.config, speech)
    try:
        model.train()
        Trainer(train, model, flow_objective, loader, folder, name=name).train()
    finally:
        loader.close()
    return len(loader.rejects)


def _loader(recipe: DecoderRecipe, train: TrainConfig, flow: FlowConfig, speech: TokenSound) -> PieceLoader:
    return PieceLoader(
        speech,
        recipe.pieces,
        flow,
        seed=train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
