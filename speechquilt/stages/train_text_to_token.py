"""Stage 3: train the text-to-token model and let the tokenizer's ASR head read its tokens back.

Cost of the default: about 2 minutes on two cores.
Trap: interleaving asks for spans, so spans are measured by length class, not only whole sentences; and patches ask for
word ends, so those are measured against the recordings' word times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechquilt.data.feed.spoken_parts import SpokenParts
from speechquilt.evals.measures import Measure, Promise, at_most
from speechquilt.evals.wer import wer
from speechquilt.model.base_vocabulary import check_base
from speechquilt.model.warm_start import Ends, plain_from_hugging_face
from speechquilt.nn.llama import LlamaConfig
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_utterances, text_tokenizer_of
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token import codebook_rows, network
from speechquilt.text_to_token.boundaries import Spoken, place_units
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tokenizer.token_encoder import TokenEncoder
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import AlignedTokens, UnitEnd, Utterance

HELD_OUT_EVERY = 20  # one in so many recordings of shards is kept for measuring
MOST_MEASURED = 200  # of those; each is said five times, alone and in spans of every length, and read back
BOUNDARY_UTTERANCES = 64  # enough for some hundred words, seconds on one core
SPAN_CLASSES = {"1_3": (1, 3), "4_9": (4, 9), "10_plus": (10, 15)}  # words, spec 1 section 4

MEASURES = (
    Measure(
        key="text_to_token.wer", kind="rate", meaning="word error rate of its tokens read back by the ASR head, held-out sentences",
        promise=Promise(name="Text-to-token: word error rate of held-out sentences", bound=at_most(0.10)),
    ),
    Measure(
        key="text_to_token.wer_spans_1_10", kind="rate", meaning="the same on spans of 1-10 words",
        promise=Promise(name="Text-to-token: word error rate of spans of 1-10 words", bound=at_most(0.10)),
    ),
    Measure(key="text_to_token.wer_spans_1_3", kind="rate", meaning="the same on spans of 1-3 words"),
    Measure(key="text_to_token.wer_spans_4_9", kind="rate", meaning="the same on spans of 4-9 words"),
    Measure(key="text_to_token.wer_spans_10_plus", kind="rate", meaning="the same on spans of 10 words and more"),
    Measure(key="text_to_token.rejected", kind="share", meaning="share of texts whose tokens were rejected"),
    Measure(key="text_to_token.n", kind="count", meaning="held-out sentences behind text_to_token.wer"),
    Measure(key="text_to_token.boundary_ms", kind="amount", unit="ms", meaning="median distance of a held-out word's end from its true time"),
    Measure(key="text_to_token.boundary_p90_ms", kind="amount", unit="ms", meaning="90th percentile of the same"),
    Measure(key="text_to_token.boundary_within_token", kind="share", meaning="share of word ends at most one token from the true time"),
    Measure(key="text_to_token.boundary_grid_ms", kind="amount", unit="ms", meaning="the median with the true tokens of each word: the grid's part"),
    Measure(key="text_to_token.boundary_n", kind="count", meaning="words behind the boundary figures"),
    Measure(key="text_to_token.steps", kind="count", meaning="training steps of the text-to-token model"),
    Measure(key="text_to_token.parameters", kind="count", meaning="parameters of the text-to-token model"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextToTokenRecipe:
    """How a text-to-token model is trained."""

    llama: LlamaConfig
    """Sizes of the transformer."""
    data: TextToTokenDataConfig
    """The size of a batch, and how pieces of the recordings are drawn."""
    train: TrainConfig
    """The run: its steps, learning rate, devices and checkpoints."""
    engine: EngineConfig
    """How speech tokens are sampled with the trained model."""
    warm_start: str = ""
    """Hugging Face folder, or hub:OWNER/NAME, of a Llama, Qwen2 or Qwen3 to start from, whose sizes the model takes; it reads text with the
    base's own tokenizer. "" starts from random weights.
    """
    bos_token: str = ""
    """Token of the warm start's base that stands for the beginning of a text, as its tokenizer.json writes it; "" is the
    bos_token_id of its config.json.
    """
    eos_token: str = ""
    """Token of the warm start's base that stands for the end; "" is the eos_token_id of its config.json."""
    codebook_rows: bool = False
    """Learn the speech rows of embedding and head as a map of the speech tokenizer's codebook plus a free part: much
    faster where codes are rare (docs/decisions/0022-codebook-rows.md). Needs a tokenizer whose codes are vectors.
    """

    def __post_init__(self) -> None:
        for key in ("bos_token", "eos_token"):
            if getattr(self, key) and not self.warm_start:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} names a token of a base; set warm_start, or leave it out"
                )


def train_text_to_token(
    recipe: TextToTokenRecipe,
    tokenizer: SpeechTokenizer,
    train: Sequence[Utterance],
    held_out: Sequence[Utterance],
    folder: Path,
    *,
    text_tokenizer: TextTokenizer | None = None,
) -> dict[str, Any]:
    """Train, save to `folder` as a Hugging Face Llama, return flat results (`text_to_token.*`).

    Utterances without word times are left out where there are others: the model is cued word by word, or, when no
    utterance has word times, by whole texts. `text_tokenizer`: what it reads with; None: the speech tokenizer's own.
    """
    text_tokenizer = text_tokenizer or text_tokenizer_of(tokenizer, recipe.warm_start)
    aligned = [u for u in train if u.alignment]
    if 0 < len(aligned) < len(train):
        print(f"text-to-token: {len(train) - len(aligned)} of {len(train)} utterances have no word times, left out")
    cue: network.Cue = "word" if aligned else "text"
    spoken = encode_utterances(tokenizer, aligned or train)
    model, found = _trained(recipe, tokenizer, spoken, [u.text for u in held_out], folder, text_tokenizer, cue)
    return {**found, **measure_boundaries(model, text_tokenizer, tokenizer, held_out)}


def train_on_shards(
    recipe: TextToTokenRecipe,
    tokenizer: SpeechTokenizer,
    shards: Sequence[Path],
    folder: Path,
    *,
    text_tokenizer: TextTokenizer | None = None,
) -> dict[str, Any]:
    """As `train_text_to_token`, on the spoken texts that `tokenize` wrote (its `parallel` shards): no audio is decoded again.

    One recording in `HELD_OUT_EVERY` is held out, by a hash of its id, and at most `MOST_MEASURED` of them are said. Ends of
    words are not measured, since the shards know them no better than to a token. Raises ValueError for shards of another
    kind or another speech tokenizer.
    """
    spoken = SpokenParts.open(shards)
    for part in spoken.folders:
        part.check(speech_fingerprint=tokenizer.fingerprint, text_fingerprint="")
    train, held_out = spoken.split(HELD_OUT_EVERY)
    text_tokenizer = text_tokenizer or text_tokenizer_of(tokenizer, recipe.warm_start)
    texts = [item.text for item in held_out[:MOST_MEASURED]]
    return _trained(recipe, tokenizer, train, texts, folder, text_tokenizer, "word")[1]


def _trained(
    recipe: TextToTokenRecipe,
    tokenizer: SpeechTokenizer,
    spoken: Sequence[AlignedTokens],
    held_out: Sequence[str],
    folder: Path,
    text_tokenizer: TextTokenizer,
    cue: network.Cue,
) -> tuple[network.TextToTokenLM, dict[str, Any]]:
    config = network.TextToTokenConfig(
        num_text=text_tokenizer.size,
        num_speech=tokenizer.vocab_size,
        llama=recipe.llama,
        cue=cue,
        frame_rate=tokenizer.frame_rate,
    )
    model = new_model(recipe, config, text_tokenizer)
    if recipe.codebook_rows:
        codebook_rows.attach(model, codebook_of(tokenizer), recipe.train.seed)
    loader = recipe.data.build(spoken, text_tokenizer, model.vocab)
    objective = NextTokenObjective(model.vocab, labelled_only=True)
    Trainer(recipe.train, model, objective, loader, folder, name="text-to-token").train()
    codebook_rows.fold(model)
    network.save(folder, model.eval().to("cpu"), text_tokenizer, tokenizer.fingerprint)
    engine = recipe.engine.build(model, text_tokenizer)
    return model, {
        "text_to_token.steps": recipe.train.steps,
        "text_to_token.parameters": sum(p.numel() for p in model.parameters()),
        **measure_text_to_token(engine, tokenizer, held_out),
    }


def new_model(
    recipe: TextToTokenRecipe, config: network.TextToTokenConfig, text_tokenizer: TextTokenizer
) -> network.TextToTokenLM:
    """Random weights drawn with the run's seed, or those of `warm_start` with rows for speech and the special ids."""
    if not recipe.warm_start:
        return config.build(recipe.train.seed)
    base = Path(recipe.warm_start)
    check_base(base, text_tokenizer)
    ends = Ends(bos=recipe.bos_token, eos=recipe.eos_token)
    started = plain_from_hugging_face(base, config.vocab, recipe.train.seed, ends)
    with torch.device("meta"):
        model = network.TextToTokenLM(replace(config, llama=started.config.llama))
    names = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    weights = {names.get(k, k.replace("llama.", "model.", 1)): v for k, v in started.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model


def codebook_of(tokenizer: SpeechTokenizer | None) -> Tensor:
    """Vectors of its codes [K, D]. Raises ValueError for a tokenizer that shows none."""
    if not isinstance(tokenizer, TokenEncoder):
        raise ValueError(
            f"codebook_rows=true needs the vectors of the codes, which {type(tokenizer).__name__} does not show; "
            "set codebook_rows=false for it"
        )
    return tokenizer.quantizer.codebook_KD.detach().cpu()


def measure_text_to_token(
    engine: TextToTokenEngine, tokenizer: SpeechTokenizer, held_out: Sequence[str]
) -> dict[str, Any]:
    """Word error rates of generated tokens: held-out sentences, and spans of running held-out text by length.

    A rejected text counts as silence, so every one of its words is an error. A tokenizer without ASR heads cannot read tokens
    back: then only the rejected share is known.
    """
    reader = tokenizer if isinstance(tokenizer, SupervisedTokenizer) and tokenizer.text_tokenizer else None
    rng = np.random.default_rng(0)
    words = " ".join(map(spoken_form, held_out)).split()
    classes = {"wer": list(held_out)}
    for name, (low, high) in {**SPAN_CLASSES, "1_10": (1, 10)}.items():
        if len(words) > high:
            classes[f"wer_spans_{name}"] = [_span(words, low, high, rng) for _ in held_out]
    results: dict[str, Any] = {"text_to_token.n": len(held_out)}
    for name, texts in classes.items():
        spans = engine.generate(texts, range(len(texts)))
        if reader is None:
            continue
        heard = reader.read_back([span.ids_T[: 0 if span.reject else None] for span in spans])
        results[f"text_to_token.{name}"] = wer(zip(texts, heard)).rate
    results["text_to_token.rejected"] = sum(engine.stats.rejects.values()) / engine.stats.texts
    return results


def measure_boundaries(
    model: network.TextToTokenLM, texts: TextTokenizer, tokenizer: SpeechTokenizer, held_out: Sequence[Utterance]
) -> dict[str, Any]:
    """How far the word ends that the model finds lie from the recordings' word times; {} when either has no word times.

    `boundary_grid_ms` is what the 80 ms grid alone costs: the error of the tokens' own word ends, for the words that have
    a token.
    """
    timed = [u for u in held_out if u.alignment][:BOUNDARY_UTTERANCES]
    if model.config.cue != "word" or not timed:
        return {}
    token_ms, found_ms, grid_ms = 1000 / tokenizer.frame_rate, [], []
    spoken, ends_ms = [], []
    for utterance, tokens in zip(timed, encode_utterances(tokenizer, timed)):
        words = [(form, 1000 * w.end_s) for w in utterance.alignment if (form := spoken_form(w.text))]
        if words and len(tokens.ids_T) >= len(words):
            spoken.append(Spoken(words=tuple(form for form, _ in words), ids_T=tokens.ids_T))
            ends_ms.append(np.array([end for _, end in words]))
            grid_ms += _grid_errors(tokens, utterance, token_ms)
    for true_ms, unit_end_T in zip(ends_ms, place_units(model, texts, spoken)):
        found_ms += np.abs((np.flatnonzero(unit_end_T == UnitEnd.WORD) + 1) * token_ms - true_ms).tolist()
    if not (found_ms and grid_ms):
        return {}
    return {
        "text_to_token.boundary_ms": float(np.median(found_ms)),
        "text_to_token.boundary_p90_ms": float(np.quantile(found_ms, 0.9)),
        "text_to_token.boundary_within_token": float(np.mean(np.array(found_ms) <= token_ms)),
        "text_to_token.boundary_grid_ms": float(np.median(grid_ms)),
        "text_to_token.boundary_n": len(found_ms),
    }


def _grid_errors(tokens: AlignedTokens, utterance: Utterance, token_ms: float) -> list[float]:
    """Distance of each word's end from the end of its last token, for the words that have one."""
    last = {int(word): t for t, word in enumerate(tokens.word_T) if word >= 0}
    return [abs((t + 1) * token_ms - 1000 * utterance.alignment[word].end_s) for word, t in last.items()]


def _span(words: Sequence[str], low: int, high: int, rng: np.random.Generator) -> str:
    length = int(rng.integers(low, high + 1))
    start = int(rng.integers(0, len(words) - length + 1))
    return " ".join(words[start : start + length])
