"""`speechquilt study patching`: how to group speech tokens, on the micro-world, several seeds each.

After spec latent-speech-text, sections 8 to 10. The study starts from the shards of `story toy` (made first when they
are not there). Compute-controlled: every system takes the same steps over the same number of global units, so a
patched one reads more. Data-controlled: the token-level systems read as many tokens as the static LST does, in more
steps.
Trap: the intervals are over stories, pooled over seeds; how far seeds lie apart stands beside them, not inside them.
"""

from collections import ChainMap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from speechquilt.files import write_json
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.recipes import defaults
from speechquilt.recipes.toy import pipeline
from speechquilt.recipes.toy.questions import Voicer, story_tasks
from speechquilt.stages import workers
from speechquilt.stages.encode import encode_utterances, text_tokenizer_of
from speechquilt.stages.stage import Story, remembered
from speechquilt.stages.train_lm import LMRecipe, load_scorer
from speechquilt.stages.training_documents import text_segment
from speechquilt.studies import seeds
from speechquilt.tokenizer.supervised import SupervisedTokenizer

TASKS = {f"{kind}.{pair}": f"story.{kind}.{pair}" for kind in ("topic", "hard") for pair in ("SS", "TT")}


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """One row of the study: a model and how it groups speech tokens."""

    kind: Literal["plain", "latent"]
    """"plain" steps over every token, "latent" over patches."""
    patcher: PatcherConfig
    """How speech tokens are grouped into patches; of kind none for a plain model."""
    text_path: Literal["decoder", "bypass"] = "decoder"
    """In a latent model: "decoder" sends text through the local modules too, "bypass" past them."""
    speech_pieces: int | None = None
    """Read speech as pieces of a BPE of this size; None reads the speech tokens as they are."""
    tokens_of: str | None = None
    """Name of a system to read as many tokens as; None takes the same steps as all others."""


def _latent(kind: Any, **more: Any) -> SystemConfig:
    return SystemConfig(kind="latent", patcher=PatcherConfig(kind=kind, patch_size=defaults.PATCH_SIZE), **more)


def _plain(**more: Any) -> SystemConfig:
    return SystemConfig(kind="plain", patcher=PatcherConfig(kind="none"), **more)


@dataclass(frozen=True, kw_only=True)
class PatchingConfig(seeds.StudyConfig):
    """Ways to group speech tokens, everything else the same."""

    run_dir: str = "runs/patching"
    """Folder that holds the study."""
    reference: str = "baseline"
    """Name of the system that the others' gains are measured against."""
    systems: dict[str, SystemConfig] = field(
        default_factory=lambda: {
            "baseline": _plain(),
            "bpe": _plain(speech_pieces=1000),
            "static": _latent("static"),
            "aligned": _latent("aligned"),
            "mixed": _latent("mixed"),
            "curriculum": _latent("curriculum"),
            "static_bypass": _latent("static", text_path="bypass"),
            "baseline_data": _plain(tokens_of="static"),
            "bpe_data": _plain(speech_pieces=1000, tokens_of="static"),
        }
    )
    """The systems to compare, by name."""

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            study(self)


def study(config: PatchingConfig) -> Path:
    """Train and ask every system with every seed, two at a time on two cores; returns the path of patching.md."""
    made = config.start()
    results: dict[str, Any] = {}
    for compute_controlled in (True, False):  # the others wait to know how many tokens to read
        jobs = [
            (config, name, seed, made, _tokens_to_read(system, seed, results))
            for seed in config.seeds
            for name, system in config.systems.items()
            if (system.tokens_of is None) == compute_controlled
        ]
        results |= dict(ChainMap(*workers.run_all(train_and_ask, jobs))) if jobs else {}
    folder = Path(config.run_dir)
    rows = {name: summary(config, folder, name, results) for name in config.systems}
    write_json(folder / "patching.json", rows)
    page = folder / "patching.md"
    page.write_text(table(rows))
    print(page.read_text() + f"\nresults  {folder / 'patching.json'}\ntable    {page}")
    return page


def _tokens_to_read(system: SystemConfig, seed: int, results: dict[str, Any]) -> int:
    return 0 if system.tokens_of is None else results[f"lm.{system.tokens_of}_seed{seed}.tokens"]


def train_and_ask(config: PatchingConfig, name: str, seed: int, made: pipeline.Prepared, tokens: int) -> dict[str, Any]:
    """One system with one seed: its training (for so many `tokens`, 0 = the common steps), then its endings and losses."""
    tokenizer = SupervisedTokenizer.load(made.tokenizer_dir)
    (run,) = seeds.run_names(name, [seed])
    return seeds.train_and_ask(
        Story(Path(config.run_dir), made.fingerprint),
        run,
        system_recipe(config, name, seed, tokens),
        made.shards,
        text_tokenizer_of(tokenizer),
        lambda lm_dir, folder: ask(config, lm_dir, tokenizer, folder, run),
        ask_settings=config.num_stories,
    )


def system_recipe(config: PatchingConfig, name: str, seed: int, tokens: int) -> LMRecipe:
    """The toy's recipe with the system's model, patcher and budget."""
    system, full = config.systems[name], pipeline.scaled(config.story)
    train = replace(full.lm.train, seed=seed, steps=config.steps or full.lm.train.steps)
    latent = full.lm.model
    assert isinstance(latent, LatentLMConfig)  # the story's default; its plain twin is `full.plain`
    return replace(
        full.lm,
        model=full.plain if system.kind == "plain" else replace(latent, text_path=system.text_path),
        patcher=system.patcher,
        train=train,
        budget="tokens" if tokens else "steps",
        budget_amount=tokens,
        speech_pieces=system.speech_pieces,
    )


def ask(config: PatchingConfig, lm_dir: Path, tokenizer: SupervisedTokenizer, folder: Path, run: str) -> dict[str, Any]:
    """Two-way story endings, S→S and T→T, and the loss per base speech token and per text token on the stories."""
    world, speaker = pipeline.scaled(config.story).world.build(), config.story.voices.build()
    scorer, _ = load_scorer(lm_dir)
    text_tokenizer = text_tokenizer_of(tokenizer)
    tasks = story_tasks(world, Voicer(speaker, tokenizer, text_tokenizer), config.num_stories)
    stories = [s.text for s in world.stories(2 * config.num_stories, "test")]
    spoken = encode_utterances(tokenizer, [speaker.speak(text, speaker.voices[0]) for text in stories])
    losses = {
        "speech_loss": [t.segment() for t in spoken],
        "text_loss": [text_segment(text_tokenizer, text) for text in stories],
    }
    return seeds.score(scorer, {key: tasks[task] for key, task in TASKS.items()}, losses, folder, run)


def summary(config: PatchingConfig, folder: Path, name: str, results: dict[str, Any]) -> dict[str, Any]:
    """One system over its seeds: sizes and losses as means, accuracies pooled, differences to the reference paired."""
    runs, reference = (seeds.run_names(system, config.seeds) for system in (name, config.reference))
    means = ("steps", "units", "tokens", "flops", "patch_size", "seconds", "speech_loss", "text_loss")
    row: dict[str, Any] = {key: seeds.mean_of(results, runs, key) for key in means}
    return row | {key: seeds.pooled_accuracy(folder / "evals", key, runs, reference) for key in TASKS}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Two Markdown tables: what each system cost and its losses; its accuracies, with the gain over the reference."""
    head = ["system", "steps", "units, k", "tokens, k", "patch", "TFLOPs", "seconds", "speech loss", "text loss"]
    costs = [[name, *_cost_cells(row)] for name, row in rows.items()]
    asked = ["system", *(f"{k.replace('.', ' ')[:-2]}{k[-2]}→{k[-1]}" for k in TASKS)]
    scores = [[name, *(seeds.accuracy_cell(row[key]) for key in TASKS)] for name, row in rows.items()]
    return seeds.markdown_table(head, costs) + "\n" + seeds.markdown_table(asked, scores)


def _cost_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['steps']:.0f}",
        f"{row['units'] / 1e3:.0f}",
        f"{row['tokens'] / 1e3:.0f}",
        f"{row['patch_size']:.2f}",
        f"{row['flops'] / 1e12:.1f}",
        f"{row['seconds']:.0f}",
        f"{row['speech_loss']:.3f}",
        f"{row['text_loss']:.3f}",
    ]
