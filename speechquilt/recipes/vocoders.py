"""A vocoder at the size that is published, for the mel of the speech decoder (22,050 Hz, 80 bands up to 8 kHz).

Sizes, pieces, rates and weights are those of gemelo-ai/vocos's public configuration for 24 kHz; it has not been run here.
What differs, on purpose: both halves learn in one step, a warm-up, gradients clipped where they burst, bfloat16 in the
convolutions (spectra, mels and losses stay float32).
"""

from speechquilt.decoder.vocos import VocosConfig
from speechquilt.stages.cost import PaperRun
from speechquilt.stages.train_vocoder import VocoderRecipe
from speechquilt.train.objectives.vocoder_gan import GanConfig
from speechquilt.train.trainer import TrainConfig

RECIPES: dict[str, PaperRun] = {
    "vocoder_22khz": PaperRun(
        about="the decoder's mel -> 22,050 Hz: Vocos with discriminators, a million steps on one GPU",
        recipe=VocoderRecipe(
            vocoder=VocosConfig(),
            gan=GanConfig(),
            train=TrainConfig(
                steps=1_000_000,
                lr=5e-4,
                warmup_steps=1000,
                min_lr_ratio=0.0,
                beta1=0.8,
                beta2=0.9,
                weight_decay=0.01,
                clip=20.0,  # above what both gradients have together in the first steps, 3 to 15
                dtype="bfloat16",
                compile=True,
                log_every=100,
                checkpoint_every=5000,
                checkpoint_async=True,
            ),
        ),
    ),
}
