"""The real story's page: what was heard and said, samples, sound, curves, promises and every number."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechquilt import config
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.recipes.real import sizes
from speechquilt.recipes.real.promises import SCHEMA
from speechquilt.recipes.story_parts import audios, curve, samples, utterance_view
from speechquilt.reports.result_tables import result_tables, score_charts
from speechquilt.reports.story_page import Stage, StoryPage, write_story_page
from speechquilt.stages.encode import load_text_tokenizer
from speechquilt.stages.spoken_corpus import HELD_OUT, UNSEEN_VOICE
from speechquilt.stages.stage import Story
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Utterance

HEARD = f"heard.{HELD_OUT}.tokens.wer"
SAID = "text_to_token.spans.sentence.generated.wer"
NOISE = "interleaved.noise.all.wer"
PLAYERS = 3  # of each group of voices
TITLES = {  # of the tables, by family of measures; "" is shown elsewhere on the page
    "run": "",
    "stage.<stage>": "",
    "tokenizer": "Speech tokenizer",
    "text_to_token": "Text-to-token model",
    "interleaved.noise.<kind>": "Noise of interleaved text, by kind of text",
    "lm.<run>": "Language models",
    "texts.<kind>": "Texts",
    "corpus.<set>": "Corpus",
    "shards.<source>": "Training documents, by source",
}
NAMES = {
    "corpus": "Corpus",
    "tokenizer": "Speech tokenizer",
    "tokens": "Recordings as tokens",
    "reader": "Reader of pieces",
    "voice": "One voice as tokens",
    "text_to_token": "Text-to-token",
    "texts": "Texts",
    "interleaved": "Interleaving",
    "text": "Text as ids",
    "lm/plain": "Plain language model",
    "lm/latent": "Latent language model",
    "evals": "Evaluation",
}


def write(settings: Any, story: Story, flat: Mapping[str, Any], base: Path) -> Path:
    """report.html in the run folder. `base`: folder of the text model, whose tokenizer spells the documents."""
    run_dir = story.run_dir
    tokenizer = SupervisedTokenizer.load(run_dir / "reader")
    spoken = {group: _first(run_dir / "corpus" / group) for group in (HELD_OUT, UNSEEN_VOICE)}
    shown = {"interleaved": run_dir / "interleaved/shards", "parallel": run_dir / "tokens/shards/parallel"}
    page = StoryPage(
        title="SpeechQuilt: real weights, real speech, real text",
        sentences=_sentences(flat),
        utterance=utterance_view(spoken[HELD_OUT][0], tokenizer, sizes.PATCH_SIZE),
        utterance_note="A held-out sentence: log-mel, word times, speech tokens, and how each patcher groups them.",
        samples=samples(shown, tokenizer, load_text_tokenizer(base), sizes.PATCH_SIZE),
        samples_note="Training documents. Speech runs show what the tokenizer's ASR half reads in the tokens.",
        audios=audios(
            {f"{name.replace('_', ' ')} {u.id}": u for name, group in spoken.items() for u in group}, tokenizer
        ),
        audios_note="Held-out sentences, then the same in a voice that was never trained on. Below: what the tokens alone are read back as.",
        verdicts=SCHEMA.verdicts(flat),
        curves=[curve(run_dir / "lm" / name, name) for name in ("plain", "latent")],
        curves_note="Training loss per token of both models, which start from the same text model.",
        scores=score_charts(SCHEMA, flat),
        table_sections=[("Tables", result_tables(SCHEMA, flat, TITLES))],
        stages=[Stage(name=NAMES[name], made=_made(name, flat), seconds=s) for name, s in story.seconds.items()],
        facts=_facts(settings, flat),
    )
    return write_story_page(run_dir / "report.html", page)


def _first(folder: Path) -> list[Utterance]:
    read = (item for item in read_utterances(folder) if isinstance(item, Utterance))
    return [utterance for _, utterance in zip(range(PLAYERS), read)]


def _sentences(flat: Mapping[str, Any]) -> list[str]:
    """What happened."""
    verdicts = SCHEMA.verdicts(flat)
    kept = sum(v.met for v in verdicts)
    return [
        f"In {flat['run.seconds'] / 60:.0f} minutes on {flat['run.cores']} cores, Whisper became a speech tokenizer on "
        f"{flat['corpus.train.hours']:.1f} hours of synthetic voices. Word errors of its tokens read back: {_shown(HEARD, flat)} "
        f"on sentences that nobody trained on, {_shown(HEARD.replace(HELD_OUT, UNSEEN_VOICE), flat)} in a voice never heard.",
        f"A text-to-token model speaks such sentences in the same tokens (word errors: {_shown(SAID, flat)}), and wrote the "
        f"speech of interleaved real text (word errors: {_shown(NOISE, flat)}).",
        f"{kept} of {len(verdicts)} promised results were met.",
    ]


def _shown(key: str, flat: Mapping[str, Any]) -> str:
    return SCHEMA.measure(key).shown(flat[key]) if key in flat else "not measured"


def _made(name: str, flat: Mapping[str, Any]) -> str:
    """What came out of a stage, in a few words."""
    if name == "corpus":
        return f"{flat['corpus.train.hours']:.1f} hours"
    if name == "tokenizer":
        return f"WER {_shown(HEARD, flat)} at {_shown('tokenizer.frame_rate', flat)}"
    if name == "text_to_token":
        return f"WER {_shown(SAID, flat)}"
    if name.startswith("lm/"):
        return f"{_shown(f'lm.{name[3:]}.tokens', flat)} tokens"
    source = {"tokens": "speech", "interleaved": "interleaved", "text": "text"}.get(name)
    return f"{_shown(f'shards.{source}.documents', flat)} documents" if source else ""


def _facts(settings: Any, flat: Mapping[str, Any]) -> list[tuple[str, str]]:
    run = [m for m in SCHEMA.measures if m.key.startswith("run.") and m.key in flat]
    return [
        ("command", "speechquilt story real"),
        *((m.key.removeprefix("run."), m.shown(flat[m.key])) for m in run),
        ("settings", json.dumps(config.to_dict(settings))),
    ]
