"""What a language model's run starts from: random weights, a text model, or another run of ours.

Trap: only weights go on. Schedule, optimizer, data and steps are those of the new run, in a folder of its own.
"""

from pathlib import Path
from typing import Any

from speechquilt import config
from speechquilt.data.feed.speech_bpe import SpeechBPE
from speechquilt.model import saving
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.model.warm_start import Ends, latent_from_hugging_face, layout_of, plain_from_hugging_face
from speechquilt.stages.lm_recipe import RUN, LMRecipe, LMRun

BPE_FILE = "speech_bpe.json"
VOCABULARY = (  # what a run must have in common with the one that it continues
    "num_text", "num_speech", "speech_pieces", "text_fingerprint", "speech_fingerprint", "bpe_fingerprint", "opening_marker",
)  # fmt: skip


def new_model(recipe: LMRecipe, run: LMRun) -> PlainLM | LatentLM:
    """Random weights drawn with the run's seed, those of `warm_start` with rows for the new ids, or those of the run that
    is continued."""
    seed, vocab = recipe.train.seed, run.vocab
    if recipe.continue_from:
        return continued_model(Path(recipe.continue_from), recipe.model.for_vocab(vocab), run)
    if not recipe.warm_start:
        return recipe.model.for_vocab(vocab).build(seed)
    ends = Ends(bos=recipe.bos_token, eos=recipe.eos_token)
    if isinstance(recipe.model, LatentLMConfig):
        return latent_from_hugging_face(Path(recipe.warm_start), vocab, recipe.model, seed, ends)
    return plain_from_hugging_face(Path(recipe.warm_start), vocab, seed, ends)


def has_opening_marker(recipe: LMRecipe) -> bool:
    """The layout that the recipe asks for, or that of what it starts from."""
    if recipe.opening_marker != "auto":
        return recipe.opening_marker == "on"
    if recipe.continue_from:
        return config.load(LMRun, Path(recipe.continue_from) / RUN).opening_marker
    if recipe.warm_start:
        exported = layout_of(Path(recipe.warm_start))
        return exported is not None and exported.opening_marker
    return True


def made_of(folder: Path) -> dict[str, Any]:
    """Fields of the recipe that a run goes on with: its model, its patches and its speech pieces."""
    run = config.load(LMRun, folder / RUN)
    pieces = None if run.speech_pieces is None else SpeechBPE.load(folder / BPE_FILE).wanted
    return {"model": saving.config_of(folder), "patcher": run.patcher, "speech_pieces": pieces}


def check_apart(before: Path, folder: Path) -> None:
    """Raises ValueError when a run would go on in the folder of the one that it continues."""
    if before.resolve() == folder.resolve():
        raise ValueError(
            f"continue_from={str(before)!r} is the run's own folder; a run that goes on from another is a new one, "
            "give it a --run-dir of its own"
        )


def continued_model(folder: Path, expected: PlainLMConfig | LatentLMConfig, run: LMRun) -> PlainLM | LatentLM:
    """The trained weights of a run folder. Raises ValueError when its vocabulary, layout, kind or sizes are others."""
    before = config.load(LMRun, folder / RUN)
    for key in VOCABULARY:
        was, now = getattr(before, key), getattr(run, key)
        if was != now:
            raise ValueError(
                f"continue_from={str(folder)!r} has {key}={was!r}, this run {now!r}; a run goes on with the tokenizers and "
                "the layout that it began with, make the shards with these"
            )
    model = saving.load(folder)
    if type(model.config) is not type(expected):
        kinds = {cls: name for name, cls in saving.KINDS.items()}
        raise ValueError(
            f"continue_from={str(folder)!r} holds a {kinds[type(model.config)]} model, this run has "
            f"kind={kinds[type(expected)]}; its weights fit no other kind"
        )
    differing = _differences(config.to_dict(model.config), config.to_dict(expected), "model.")
    if differing:
        raise ValueError(
            f"continue_from={str(folder)!r} has other sizes: {', '.join(differing)}; give the sizes of that run, which "
            "train lm takes by itself when no --preset or --model.* flag says otherwise"
        )
    return model


def _differences(was: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """Keys of nested data whose values differ, as `model.width=96 (here 64)`."""
    found = []
    for key, value in was.items():
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            found += _differences(value, now[key], f"{where}{key}.")
        elif value != now.get(key):
            found.append(f"{where}{key}={value!r} (here {now.get(key)!r})")
    return found


def copy_bpe(before: Path, folder: Path) -> None:
    """The pieces of the run that is continued, which its rows belong to."""
    if not (folder / BPE_FILE).is_file():
        SpeechBPE.load(before / BPE_FILE).save(folder / BPE_FILE)
