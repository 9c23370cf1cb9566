"""`speechquilt study interleaving`: what interleaved data is worth, on the micro-world, several seeds each.

After spec synthetic-interleaved, section 10. The study starts from the tokenizer, text-to-token model and shards of
`story toy` (made first when they are not there; `prepared` names the folder of a finished story, which is only read).
Every run takes the same steps over the same number of global units. Conditions that coincide are run once.
Trap: the paper's amounts come on top of other data, ours are shares of a fixed budget: what interleaved data gives up,
the other sources read more of.
"""

import dataclasses
import json
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from speechquilt.config import fingerprint, to_dict
from speechquilt.data.interleaving.synthetic import InterleaveConfig, InterleaveStats
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.sources.micro_world import MicroWorld
from speechquilt.files import write_json
from speechquilt.model.patcher import PatcherConfig
from speechquilt.protocols import TextToToken
from speechquilt.recipes import defaults
from speechquilt.recipes.toy import pipeline
from speechquilt.recipes.toy.questions import PAIRS, Voicer, fact_tasks, question_tasks, story_tasks
from speechquilt.stages import workers
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.stage import Story, remembered
from speechquilt.stages.train_lm import LMRecipe, load_scorer
from speechquilt.stages.training_documents import interleaved_documents, write_documents
from speechquilt.studies import seeds
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import network
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Segment, TextDocument

SYNTHETIC, PARALLEL = pipeline.INTERLEAVED
GROUPS = ("interleaved", "text", "both")  # of facts: in interleaved text, in plain text only, in both and in recordings
ENDINGS = {kind: [f"story.{kind}.{pair}" for pair in PAIRS] for kind in ("topic", "hard")}
FACT_TASKS = {"qa": "free answers", "fact": "choice of four"}
FACTS = {task: [f"{task}.{group}.{pair}" for group in GROUPS for pair in ("ST", "SS")] for task in FACT_TASKS}
TASKS = [key for keys in (*ENDINGS.values(), *FACTS.values()) for key in keys]
LOSSES = ("speech_loss", "text_loss")
COSTS = ("steps", "units", "tokens", "speech_tokens", "patch_size", "flops", "seconds")
VOICED = "voiced.json"
Rows = dict[str, dict[str, dict[str, Any]]]  # question, condition, what was found


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How one run differs from the story's plain baseline; the default is that baseline.

    Where a source gets less or nothing, the others fill up in proportion to their weights.
    """

    ratio: float = InterleaveConfig().ratio
    """Share of the words that become speech in synthetic interleaved text, 0 to 0.5."""
    amount: float = 1.0
    """Times the story's weight of both kinds of interleaved data; 0 leaves it out."""
    interleaving: Literal["both", "synthetic", "parallel"] = "both"
    """Which kinds of interleaved data there are: "both", or one alone, which takes the other's weight too."""
    without: tuple[str, ...] = ()
    """Sources that are left out, by name."""
    patcher: Literal["none", "static", "aligned", "mixed", "curriculum"] = "none"
    """How speech is grouped: "none" trains a plain model on every token, any other kind a latent one on patches."""

    @property
    def name(self) -> str:
        """Folder and key: what differs from the baseline, "baseline" when nothing does."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        parts = [f"{k}_{'_'.join(v) if isinstance(v, tuple) else v}" for k, v in changed.items()]
        return "_".join(parts).replace(".", "_") or "baseline"

    def weights(self, weights: dict[str, float]) -> dict[str, float]:
        """The story's `weights` as this condition mixes them, shares of 1. Raises ValueError on an unknown source or when nothing is left."""
        for source in self.without:
            if source not in weights:
                raise ValueError(f"without names {source!r}, the story mixes {', '.join(weights)}; name one of them")
        kinds = {"synthetic": (SYNTHETIC,), "parallel": (PARALLEL,), "both": pipeline.INTERLEAVED}[self.interleaving]
        share = self.amount * sum(weights[s] for s in pipeline.INTERLEAVED) / sum(weights.values())
        if not 0 <= share <= 1:
            raise ValueError(
                f"amount={self.amount} makes interleaved data {share:.2f} of all tokens; choose it so that this is 0 to 1"
            )
        interleaved = _scaled({s: weights[s] for s in kinds}, share)
        others = _scaled({s: w for s, w in weights.items() if s not in pipeline.INTERLEAVED}, 1 - share)
        left = {s: w for s, w in (others | interleaved).items() if w and s not in self.without}
        if not left:
            raise ValueError(f"without={self.without} leaves no source to read; keep at least one that has a weight")
        return _scaled(left, 1.0)


def _scaled(weights: dict[str, float], total: float) -> dict[str, float]:
    """The same proportions with another sum."""
    return {source: weight * total / sum(weights.values()) for source, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class Question:
    """Conditions that are compared with each other."""

    conditions: dict[str, Condition]
    """The conditions, by what the table calls them."""
    against: str
    """Name of the condition that the others' gains are measured against."""

    def __post_init__(self) -> None:
        if self.against not in self.conditions:
            raise ValueError(f"against={self.against!r} must be one of {', '.join(self.conditions)}")


def _questions() -> dict[str, Question]:
    alone = ("parallel", "speech", "asr", "tts")  # the sources that hold recordings
    return {
        "spoken ratio": Question(
            conditions={f"{ratio}": Condition(ratio=ratio) for ratio in (0.1, 0.2, 0.3, 0.4)}, against="0.3"
        ),
        "amount": Question(
            conditions={f"{amount:g}": Condition(amount=amount) for amount in (0.0, 0.25, 0.5, 1.0)}, against="1"
        ),
        "kind": Question(
            conditions={
                "both": Condition(),
                "synthetic": Condition(interleaving="synthetic"),
                "parallel": Condition(interleaving="parallel"),
            },
            against="both",
        ),
        "ASR and TTS pairs": Question(
            conditions={"with": Condition(), "without": Condition(without=("asr", "tts"))}, against="with"
        ),
        "synthetic alone": Question(
            conditions={
                "static": Condition(without=alone, patcher="static"),
                "curriculum": Condition(without=alone, patcher="curriculum"),
            },
            against="static",
        ),
    }


@dataclass(frozen=True, kw_only=True)
class InterleavingConfig(seeds.StudyConfig):
    """Conditions with more, less or other interleaved data, everything else the same."""

    run_dir: str = "runs/interleaving"
    """Folder that holds the study."""
    steps: int = 650
    """Training steps of every language model; 0 takes those of the story."""
    questions: dict[str, Question] = field(default_factory=_questions)
    """What is compared with what, by question."""

    @property
    def conditions(self) -> list[Condition]:
        """All conditions, each once."""
        return list(dict.fromkeys(c for question in self.questions.values() for c in question.conditions.values()))

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            study(self)


def study(config: InterleavingConfig) -> Path:
    """Make the missing shards, train and ask every condition with every seed; returns the path of interleaving.md."""
    full = pipeline.scaled(config.story)
    for condition in config.conditions:
        condition.weights(full.lm.weights)  # an error in one is raised now, not after an hour
    made = config.start()
    folder = Path(config.run_dir)
    voiced = Story(folder, made.fingerprint).stage(
        "voiced",
        config.num_stories,
        lambda to: voice(config, made, to),
        what="stories and questions, spoken and tokenised once",
    )
    shards = {c.ratio: shards_of(config, made, c.ratio) for c in config.conditions}
    jobs = [
        (config, c, seed, made, shards[c.ratio], voiced / VOICED) for seed in config.seeds for c in config.conditions
    ]
    results = dict(ChainMap(*workers.run_all(train_and_ask, jobs)))
    return write(config, results)


def voice(config: InterleavingConfig, made: pipeline.Prepared, folder: Path) -> dict[str, Any]:
    """Speak and tokenise whatever will be asked, because every run asks the same."""
    full, tokenizer = pipeline.scaled(config.story), SupervisedTokenizer.load(made.tokenizer_dir)
    world, voicer = full.world.build(), Voicer(full.voices.build(), tokenizer, text_tokenizer_of(tokenizer))
    asked(world, voicer, config.num_stories)
    found = [
        {"text": text, "voice": voice, "ids": segment.ids_T.tolist(), "ends": _plain(segment.unit_end_T)}
        for (text, voice), segment in voicer.spoken.items()
    ]
    write_json(folder / VOICED, found)
    return {}


def _plain(ends_T: np.ndarray | None) -> list[int] | None:
    return None if ends_T is None else ends_T.tolist()


def read_voiced(path: Path) -> dict[tuple[str, str], Segment]:
    """What `voice` wrote, as `Voicer.spoken` holds it."""
    return {
        (item["text"], item["voice"]): Segment(
            modality="speech",
            ids_T=np.asarray(item["ids"], dtype=np.int32),
            unit_end_T=None if item["ends"] is None else np.asarray(item["ends"], dtype=np.uint8),
        )
        for item in json.loads(path.read_text())
    }


def asked(world: MicroWorld, voicer: Voicer, num_stories: int) -> tuple[dict[str, Any], dict[str, list[Segment]]]:
    """The tasks of `TASKS`, and the test stories as speech and as text for the losses."""
    tasks = {**story_tasks(world, voicer, num_stories), **fact_tasks(world, voicer), **question_tasks(world, voicer)}
    stories = [story.text for story in world.stories(2 * num_stories, "test")]
    teller = voicer.speaker.voices[0]
    voicer.prepare([(text, teller) for text in stories])
    losses = {loss: [voicer.segment(letter, text, teller) for text in stories] for loss, letter in zip(LOSSES, "ST")}
    return {key: tasks[key] for key in TASKS}, losses


def shards_of(config: InterleavingConfig, made: pipeline.Prepared, ratio: float) -> dict[str, Path]:
    """The story's shards, with its synthetic interleaved ones made again at another ratio."""
    full = pipeline.scaled(config.story)
    if ratio == full.interleave.ratio:
        return made.shards
    settings = replace(full.interleave, ratio=ratio)

    def make(folder: Path) -> dict[str, Any]:
        loaded = network.load(made.text_to_token_dir)
        engine = full.text_to_token.engine.build(loaded.model, loaded.tokenizer)
        before = ShardFolder(made.shards[SYNTHETIC])
        return interleave_again(before, engine, loaded.tokenizer, full.interleave_passes, settings, folder / SYNTHETIC)

    folder = Story(Path(config.run_dir), made.fingerprint).stage(
        f"shards/ratio_{ratio}".replace(".", "_"),
        [settings, full.interleave_passes],
        make,
        what=f"the same texts interleaved again, {100 * ratio:g} % of the words spoken",
    )
    return {**made.shards, SYNTHETIC: folder / SYNTHETIC}


def interleave_again(
    before: ShardFolder,
    speaker: TextToToken,
    tokenizer: TextTokenizer,
    passes: int,
    settings: InterleaveConfig,
    folder: Path,
) -> dict[str, Any]:
    """The texts of interleaved shards, spoken by the `speaker` that made them under other `settings`; returns counts."""
    stats = InterleaveStats()
    documents = interleaved_documents(interleaved_texts(before), speaker, tokenizer, passes, settings, stats)
    info = replace(before.info, made_by={**before.info.made_by, "recipe": "interleaving", "ratio": settings.ratio})
    counts = write_documents(folder, info, documents)
    return {f"shards.interleaved.{key}": n for key, n in counts.items()} | {"shards.interleaved.ratio": stats.ratio}


def interleaved_texts(shards: ShardFolder) -> list[TextDocument]:
    """The texts behind interleaved shards, each once, in their order."""
    texts = {shards[i].id.rpartition("/pass")[0]: shards.text(i) for i in range(len(shards))}
    return [TextDocument(id=id, text=text) for id, text in texts.items()]


def train_and_ask(
    config: InterleavingConfig,
    condition: Condition,
    seed: int,
    made: pipeline.Prepared,
    shards: dict[str, Path],
    voiced: Path,
) -> dict[str, Any]:
    """One condition with one seed: its training, then its endings, answers and losses."""
    tokenizer = SupervisedTokenizer.load(made.tokenizer_dir)
    (run,) = seeds.run_names(condition.name, [seed])
    return seeds.train_and_ask(
        Story(Path(config.run_dir), fingerprint([made.fingerprint, condition.ratio])),
        run,
        lm_recipe(config, condition, seed),
        shards,
        text_tokenizer_of(tokenizer),
        lambda lm_dir, folder: ask(config, lm_dir, tokenizer, voiced, folder, run),
        ask_settings=config.num_stories,
    )


def lm_recipe(config: InterleavingConfig, condition: Condition, seed: int) -> LMRecipe:
    """The story's recipe with the condition's mixture and patcher."""
    full = pipeline.scaled(config.story)
    return replace(
        full.lm,
        model=full.plain if condition.patcher == "none" else full.lm.model,
        patcher=PatcherConfig(kind=condition.patcher, patch_size=defaults.PATCH_SIZE),
        weights=condition.weights(full.lm.weights),
        train=replace(full.lm.train, seed=seed, steps=config.steps or full.lm.train.steps),
    )


def ask(
    config: InterleavingConfig, lm_dir: Path, tokenizer: SupervisedTokenizer, voiced: Path, folder: Path, run: str
) -> dict[str, Any]:
    """The tasks and losses of `asked`, details per item into `folder`."""
    full = pipeline.scaled(config.story)
    voicer = Voicer(full.voices.build(), tokenizer, text_tokenizer_of(tokenizer), read_voiced(voiced))
    tasks, losses = asked(full.world.build(), voicer, config.num_stories)
    return seeds.score(load_scorer(lm_dir)[0], tasks, losses, folder, run)


def write(config: InterleavingConfig, results: dict[str, Any]) -> Path:
    """results.json, interleaving.md and the terminal."""
    folder = Path(config.run_dir)
    rows = {
        name: {label: summary(config, question, label, results) for label in question.conditions}
        for name, question in config.questions.items()
    }
    write_json(folder / "results.json", {"config": to_dict(config), "questions": rows})
    page = folder / "interleaving.md"
    page.write_text(tables(rows))
    print(page.read_text() + f"\nresults  {folder / 'results.json'}\ntables   {page}")
    return page


def summary(config: InterleavingConfig, question: Question, label: str, results: dict[str, Any]) -> dict[str, Any]:
    """One condition over its seeds: its run name, weights and costs (means), accuracies and losses pooled, gains paired."""
    condition, reference = question.conditions[label], question.conditions[question.against]
    evals = Path(config.run_dir) / "evals"
    mine, others = (seeds.run_names(c.name, config.seeds) for c in (condition, reference))
    return {
        "run": condition.name,
        "weights": condition.weights(pipeline.scaled(config.story).lm.weights),
        **{key: seeds.mean_of(results, mine, key) for key in COSTS},
        **{key: seeds.pooled_loss(evals, key, mine, others) for key in LOSSES},
        **{key: seeds.pooled_accuracy(evals, key, mine, others) for key in TASKS},
    }


def tables(rows: Rows) -> str:
    """Markdown: costs and losses, story endings, answers to spoken questions; a line per question and condition."""
    costs = ["units, k", "tokens, k", "speech tokens, k", "TFLOPs", "seconds", "speech loss", "text loss"]
    endings = [_score_table(f"{kind} endings", keys, rows) for kind, keys in ENDINGS.items()]
    facts = [_score_table(f"facts, {FACT_TASKS[task]}", keys, rows) for task, keys in FACTS.items()]
    return "\n".join([_table("cost and loss", costs, rows, _cost_cells), *endings, *facts])


def _score_table(title: str, keys: list[str], rows: Rows) -> str:
    """The title says how many answers one accuracy is over: items times seeds, about so many stories or facts."""
    some = next(row[keys[0]] for of in rows.values() for row in of.values())
    head = [f"{key.split('.')[1]} {key[-2]}→{key[-1]}" for key in keys]
    title = f"{title}, n={some['n']} ({some['clusters']} different)"
    return _table(title, head, rows, lambda row: [seeds.accuracy_cell(row[key]) for key in keys])


def _table(title: str, head: list[str], rows: Rows, cells: Callable[[dict[str, Any]], list[str]]) -> str:
    lines = [[f"{name}: {label}", *cells(row)] for name, of in rows.items() for label, row in of.items()]
    return seeds.markdown_table([title, *head], lines)


def _cost_cells(row: dict[str, Any]) -> list[str]:
    thousands = [f"{row[key] / 1e3:.0f}" for key in ("units", "tokens", "speech_tokens")]
    return [
        *thousands,
        f"{row['flops'] / 1e12:.1f}",
        f"{row['seconds']:.0f}",
        *(seeds.loss_cell(row[k]) for k in LOSSES),
    ]
