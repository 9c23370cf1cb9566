"""What every story says of itself in results.json: which recipe with which settings, on what, and for how long."""

import os
from typing import Any

import torch

import speechquilt
from speechquilt.config import fingerprint
from speechquilt.evals.measures import Measure, Value
from speechquilt.stages import stage
from speechquilt.stages.stage import Story

MEASURES = (
    Measure(key="run.recipe", kind="text", meaning="recipe that made this file"),
    Measure(key="run.fingerprint", kind="text", meaning="fingerprint of the recipe's config"),
    Measure(key="run.version", kind="text", meaning="version of speechquilt"),
    Measure(key="run.torch", kind="text", meaning="version of torch"),
    Measure(key="run.device", kind="text", meaning="device the models were trained on"),
    Measure(key="run.cores", kind="count", meaning="CPU cores used"),
    Measure(key="run.seconds", kind="amount", unit="s", meaning="wall time of all stages"),
    *stage.MEASURES,
)


def run_facts(recipe: str, settings: Any, stages: Story) -> dict[str, Value]:
    """`run.*` of `settings`, the config of the `recipe`, and the seconds of every stage."""
    return {
        "run.recipe": recipe,
        "run.fingerprint": fingerprint(settings),
        "run.version": speechquilt.__version__,
        "run.torch": str(torch.__version__),
        "run.device": "cuda" if torch.cuda.is_available() else "cpu",
        "run.cores": os.cpu_count() or 1,
        "run.seconds": sum(stages.seconds.values()),
        **{f"stage.{name.replace('/', '_')}.seconds": s for name, s in stages.seconds.items()},
    }
