"""Sizes and schedules that two CPU cores finish in minutes: the toy story's, and where one's own data starts from.

Trap: they are chosen for a hundred words in a few voices. Real speech wants the recipes of the papers' sizes, a GPU and
a hundred times the steps; nothing but numbers changes.
"""

from dataclasses import replace

from speechquilt.data.feed.pack import PackConfig
from speechquilt.data.feed.sound_crops import CropsConfig
from speechquilt.decoder.flow import FlowConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.mel_guess import MelGuessConfig
from speechquilt.decoder.token_states import TokenStatesConfig
from speechquilt.decoder.unet import UNetConfig
from speechquilt.decoder.vocos import VocosConfig
from speechquilt.model import ladder
from speechquilt.model.patcher import PatcherConfig
from speechquilt.recipes import text_to_token_models
from speechquilt.stages.sound_pieces import PiecesConfig
from speechquilt.stages.train_decoder import DecoderRecipe
from speechquilt.stages.train_entropy import EntropyRecipe
from speechquilt.stages.train_lm import LMRecipe
from speechquilt.stages.train_text_to_token import TextToTokenRecipe
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.stages.train_vocoder import VocoderRecipe
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer.supervised import SupervisedTokenizerConfig
from speechquilt.train.trainer import TrainConfig

TOKENIZER = TokenizerRecipe(
    model=SupervisedTokenizerConfig(
        text_vocab_size=1024,
        width=160,
        ffn_width=640,
        layers_below=3,
        layers_above=2,
        decoder_layers=1,
        block_frames=40,
        max_frames=320,
        codebook_size=256,
        vq_decay=0.97,
        vq_warmup_updates=500,
        vq_restart_interval=25,
        vq_restart_threshold=0.1,
        commitment_weight=0.3,
        text_ids_per_s=4.0,
        ctc_weight=0.7,
        max_text_ids=256,
    ),
    train=TrainConfig(
        steps=2600,
        lr=2e-3,
        warmup_steps=100,
        min_lr_ratio=0.05,
        beta2=0.98,
        weight_decay=0.01,
        log_every=20,
        checkpoint_every=200,
        num_threads=2,
    ),
    batch_seconds=24.0,
)
TEXT_TO_TOKEN = TextToTokenRecipe(
    llama=text_to_token_models.llama("toy"),
    data=TextToTokenDataConfig(rows=8, row_tokens=256),
    train=TrainConfig(steps=750, lr=2e-3, warmup_steps=60, checkpoint_every=200, num_threads=2),
    engine=EngineConfig(temperature=0.7),
)
PLAIN, LATENT = ladder.plain("toy"), ladder.latent("toy")  # the vocabulary's size comes with the shards
WEIGHTS = {"text": 0.12, "interleaved": 0.35, "parallel": 0.18, "speech": 0.2, "asr": 0.075, "tts": 0.075}
PACK = PackConfig(rows=2, units_per_row=256, tokens_per_row=768)
PATCH_SIZE = 2  # 160 ms at 12.5 Hz, as long as the paper's patches of 4 at 25 Hz
PRETRAIN = TrainConfig(steps=1100, lr=3e-3, warmup_steps=60, log_every=20, checkpoint_every=300, num_threads=1)
LM = LMRecipe(
    model=LATENT,
    patcher=PatcherConfig(kind="static", patch_size=PATCH_SIZE),
    weights=WEIGHTS,
    pack=PACK,
    train=PRETRAIN,
)
"""One language model on shards; a comparison changes its model, patcher and mixture, and nothing else."""
ENTROPY = EntropyRecipe(
    model=PLAIN,
    pack=PACK,
    train=replace(PRETRAIN, steps=300, warmup_steps=30),
    patch_size=float(PATCH_SIZE),
    max_patch_size=4 * PATCH_SIZE,
)

DECODER = DecoderRecipe(
    flow=FlowConfig(
        mel=MelConfig(sample_rate=16_000, fft_samples=640),
        encoder=TokenStatesConfig(width=128, num_layers=2, num_heads=4, ffn_width=512, dropout=0.0),
        guess=MelGuessConfig(missing_std=0.3),
        unet=UNetConfig(channels=(96, 96), blocks=1, mid_levels=1, num_heads=2, head_width=32),
        speaker_width=8,
        drop_chance=0.0,  # without guidance nothing needs the unconditioned velocity
        guidance=0.0,
        euler_steps=4,
        temperature=0.3,  # the flow has not learned enough for all of its noise
    ),
    pieces=PiecesConfig(rows=4, tokens=40),
    first=TrainConfig(
        steps=700, lr=4e-3, warmup_steps=30, beta2=0.98, weight_decay=0.01, checkpoint_every=200, num_threads=2, seed=1
    ),
    train=TrainConfig(
        steps=900, lr=3e-3, warmup_steps=30, beta2=0.98, weight_decay=0.01, checkpoint_every=200, num_threads=2
    ),
)
"""Small pieces and high rates: a hundred words in one voice want many steps more than large ones."""
VOCODER = VocoderRecipe(
    vocoder=VocosConfig(width=192, ffn_width=576, num_layers=5),
    loss_mels=(
        MelConfig(num_mels=40, fft_samples=512, hop=128, high_hz=11_025.0),
        MelConfig(num_mels=100, high_hz=11_025.0),
        MelConfig(num_mels=160, fft_samples=2048, hop=512, high_hz=11_025.0),
    ),
    crops=CropsConfig(samples=8192, rows=16),
    train=TrainConfig(
        steps=2000,
        lr=2e-3,
        warmup_steps=50,
        min_lr_ratio=0.02,
        beta1=0.8,
        beta2=0.99,
        weight_decay=0.01,
        clip=20.0,
        log_every=20,
        checkpoint_every=200,
        num_threads=2,
    ),
)
"""A vocoder without discriminators: intelligible, with a buzz."""
