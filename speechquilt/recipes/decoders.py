"""The speech decoder at the size of the spec: the flow of 111 M parameters of the released GLM-4-Voice decoder (spec 1, 3.1).

Sizes are the release's. Steps, learning rate and batch are not published; these are our choice, and have not been run.
"""

from speechquilt.decoder.flow import FlowConfig
from speechquilt.stages.cost import PaperRun
from speechquilt.stages.sound_pieces import PiecesConfig
from speechquilt.stages.train_decoder import DecoderRecipe
from speechquilt.train.trainer import TrainConfig

_RUN = TrainConfig(
    steps=400_000,
    lr=2e-4,
    warmup_steps=5000,
    beta2=0.98,
    weight_decay=0.01,
    dtype="bfloat16",
    compile=True,
    log_every=100,
    checkpoint_every=5000,
    checkpoint_async=True,
    spike_factor=4.0,
)

RECIPES: dict[str, PaperRun] = {
    "decoder_111m": PaperRun(
        about="12.5 Hz tokens -> mel: all voices, then one voice with truncated clips",
        recipe=DecoderRecipe(
            flow=FlowConfig(),
            pieces=PiecesConfig(rows=128, tokens=120, threads=8),
            first=_RUN,
            train=TrainConfig(**{**vars(_RUN), "steps": 50_000, "lr": 5e-5, "warmup_steps": 1000, "seed": 1}),
        ),
    ),
}
