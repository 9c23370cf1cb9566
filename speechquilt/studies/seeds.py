"""What the studies share: one system with one seed as two stages, its seeds pooled, and the cells of their tables.

Trap: the intervals are over items (stories, facts), pooled over seeds; how far seeds lie apart stands beside them, not
inside them, because three seeds say little about a fourth.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.evals.intervals import accuracy, paired_difference, per_token
from speechquilt.evals.scorer import Request, Scorer
from speechquilt.evals.tasks import AnswerTask, ChoiceTask
from speechquilt.files import write_json
from speechquilt.recipes.toy import pipeline
from speechquilt.stages.stage import Story
from speechquilt.stages.train_lm import LMRecipe, train_lm
from speechquilt.text import TextTokenizer
from speechquilt.types import Segment

DETAILS = "details.json"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What every study on the micro-world has."""

    run_dir: str
    """Folder that holds the study."""
    prepared: str = ""
    """Folder of a finished story whose tokenizer, text-to-token model and shards are read as they are; "" makes what
    is missing in the folder of story.
    """
    story: pipeline.ToyConfig = field(default_factory=pipeline.ToyConfig)
    """The toy story whose world, tokenizer, text-to-token model and shards the study starts from."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every system is trained once with each of these seeds."""
    steps: int = 0
    """Training steps of every language model; 0 takes those of the story."""
    num_stories: int = 200
    """Test stories of each of the two kinds (topic, hard) that the models choose endings for."""

    def start(self) -> pipeline.Prepared:
        """The finished story, taken as it is when `prepared` names it; made where it is missing otherwise."""
        full = pipeline.scaled(self.story)
        if self.prepared:
            return pipeline.finished(full, Path(self.prepared))
        return pipeline.prepare(full, Story(Path(full.run_dir)))


def run_names(system: str, seeds: Sequence[int]) -> list[str]:
    """The folder of a system with each of its seeds."""
    return [f"{system}_seed{seed}" for seed in seeds]


def train_and_ask(
    stages: Story,
    run: str,
    recipe: LMRecipe,
    shards: dict[str, Path],
    text_tokenizer: TextTokenizer,
    ask: Callable[[Path, Path], dict[str, Any]],
    *,
    ask_settings: Any,
) -> dict[str, Any]:
    """Two stages: train `recipe` on `shards`, then `ask(its folder, folder for answers)`; returns the results of both."""
    lm_dir = stages.stage(
        f"lm/{run}", recipe, lambda folder: train_lm(recipe, shards, text_tokenizer, folder, run), what=run
    )
    stages.stage(f"evals/{run}", ask_settings, lambda folder: ask(lm_dir, folder), what=f"tasks of {run}")
    return stages.results


def score(
    scorer: Scorer,
    tasks: Mapping[str, ChoiceTask | AnswerTask],
    losses: Mapping[str, Sequence[Segment]],
    folder: Path,
    run: str,
) -> dict[str, Any]:
    """Run all tasks and the loss per base token of every set of segments; returns `lm.<run>.*`, details go to `folder`."""
    details: dict[str, Any] = {key: task.run(scorer) for key, task in tasks.items()}
    flat: dict[str, Any] = {f"lm.{run}.{key}.accuracy": d["accuracy"]["value"] for key, d in details.items()}
    for key, segments in losses.items():
        sums = [float(s.sum) for s in scorer.log_likelihoods([Request((), segment) for segment in segments])]
        items = [{"nats": -total, "tokens": len(segment.ids_T)} for total, segment in zip(sums, segments)]
        details[key] = {"items": items}
        flat[f"lm.{run}.{key}"] = -sum(sums) / sum(len(segment.ids_T) for segment in segments)
    write_json(folder / DETAILS, details)
    return flat


def pooled_accuracy(evals: Path, key: str, runs: Sequence[str], reference: Sequence[str]) -> dict[str, Any]:
    """Accuracy over the items of all `runs` of a system, each run's own, and the paired gain over the `reference` runs."""
    mine, others = ([_items(evals, run, key) for run in of] for of in (runs, reference))
    correct, correct_of_reference = ([i["correct"] for items in of for i in items] for of in (mine, others))
    cluster = [i["cluster"] for items in mine for i in items]
    return {
        **vars(accuracy(correct, cluster)),
        "seeds": [float(np.mean([i["correct"] for i in items])) for items in mine],
        "gain": vars(paired_difference(correct, correct_of_reference, cluster)),
    }


def pooled_loss(evals: Path, key: str, runs: Sequence[str], reference: Sequence[str]) -> dict[str, Any]:
    """Nats per base token over all `runs`, each run's own, and the paired difference to the `reference` runs."""
    (nats_RN, tokens_RN), (others_RN, _) = (_losses(evals, of, key) for of in (runs, reference))
    return {
        **vars(per_token(nats_RN.sum(0), tokens_RN.sum(0))),
        "seeds": (nats_RN.sum(1) / tokens_RN.sum(1)).tolist(),
        "gain": vars(per_token((nats_RN - others_RN).sum(0), tokens_RN.sum(0))),
    }


def mean_of(results: Mapping[str, Any], runs: Sequence[str], key: str) -> float:
    return float(np.mean([results[f"lm.{run}.{key}"] for run in runs]))


def accuracy_cell(found: Mapping[str, Any]) -> str:
    """`73.0 [66, 79] (71 75 73) +4.0 [1, 7]`: percent, interval, seeds, gain; no gain for the reference itself."""
    return _cell(found, scale=100, digits=1, bound_digits=0)


def loss_cell(found: Mapping[str, Any]) -> str:
    """As `accuracy_cell`, in nats per token."""
    return _cell(found, scale=1, digits=3, bound_digits=3)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any], *, scale: float, digits: int, bound_digits: int) -> str:
    def interval(of: Mapping[str, Any]) -> str:
        return f"[{scale * of['low']:.{bound_digits}f}, {scale * of['high']:.{bound_digits}f}]"

    seeds = " ".join(f"{scale * x:.{bound_digits}f}" for x in found["seeds"])
    gain = found["gain"]
    text = f"{scale * found['value']:.{digits}f} {interval(found)} ({seeds})"
    if gain["value"] == gain["low"] == gain["high"] == 0:
        return text
    return f"{text} {scale * gain['value']:+.{digits}f} {interval(gain)}"


def _items(evals: Path, run: str, key: str) -> list[dict[str, Any]]:
    return json.loads((evals / run / DETAILS).read_text())[key]["items"]


def _losses(evals: Path, runs: Sequence[str], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Nats and base tokens, each runs by segments."""
    items = [_items(evals, run, key) for run in runs]
    nats_RN, tokens_RN = (
        np.array([[i[name] for i in run] for run in items], dtype=float) for name in ("nats", "tokens")
    )
    return nats_RN, tokens_RN
