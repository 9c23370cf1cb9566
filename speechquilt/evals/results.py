"""results.json: one flat table of numbers whose every key is documented here.

Trap: `<name>` in a key of `SCHEMA` stands for exactly one part between dots; a number that has no line here cannot be
written, so a new measure starts with a new line.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from speechquilt.config import nearest
from speechquilt.evals.intervals import Difference

Value = bool | int | float | str


class Field(NamedTuple):
    """What a key holds (a name of `KINDS`) and what it means."""

    kind: str
    meaning: str


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "share": ("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1),
    "difference": ("a number from -1 to 1", lambda x: _is_number(x) and -1 <= x <= 1),
    "amount": ("a number not below 0", lambda x: _is_number(x) and x >= 0),
    "count": ("a whole number not below 0", lambda x: type(x) is int and x >= 0),
    "flag": ("true or false", lambda x: type(x) is bool),
    "text": ("a string", lambda x: type(x) is str),
}

_SCORE = {
    "accuracy": Field("share", "share of items answered right"),
    "low": Field("share", "lower end of the accuracy's 95 % interval (Wilson, items of a cluster count as one)"),
    "high": Field("share", "upper end of the same interval"),
    "n": Field("count", "items"),
    "clusters": Field("count", "distinct facts or stories the items are about"),
    "chance": Field("share", "accuracy of guessing"),
    "version": Field("count", "version of the task"),
}
_BY_SUM = {"accuracy_sum": Field("share", "the same by summed instead of mean log-probability of the ending")}
_FIRST = {"accuracy_first": Field("share", "the same, and no other possible answer is named before the right one")}
_DIFFERENCE = {
    "difference": Field("difference", "accuracy with minus accuracy without, on the same items"),
    "low": Field("difference", "lower end of its 95 % interval (paired bootstrap over facts)"),
    "high": Field("difference", "upper end of the same interval"),
    "n": Field("count", "items"),
    "clusters": Field("count", "distinct facts"),
    "with": Field("share", "accuracy with interleaved data in the mixture"),
    "without": Field("share", "accuracy without, everything else equal"),
}


def _under(prefix: str, what: str, fields: Mapping[str, Field]) -> dict[str, Field]:
    return {f"{prefix}.{name}": Field(f.kind, f"{what}: {f.meaning}") for name, f in fields.items()}


SCHEMA: dict[str, Field] = {
    "run.recipe": Field("text", "recipe that made this file"),
    "run.fingerprint": Field("text", "fingerprint of the recipe's config"),
    "run.version": Field("text", "version of speechquilt"),
    "run.torch": Field("text", "version of torch"),
    "run.device": Field("text", "device the models were trained on"),
    "run.cores": Field("count", "CPU cores used"),
    "run.seed": Field("count", "seed of the run"),
    "run.seconds": Field("amount", "wall time of all stages, in seconds"),
    "stage.<stage>.seconds": Field("amount", "wall time of the stage, in seconds"),
    "tokenizer.wer": Field("amount", "word error rate of the tokenizer's ASR head on held-out sentences"),
    "tokenizer.cer": Field("amount", "character error rate of the same readings"),
    "tokenizer.left_out": Field("count", "recordings left out of training: broken, too long, or with too long a text"),
    "tokenizer.wer_n": Field("count", "held-out sentences behind tokenizer.wer"),
    "tokenizer.wer_attention": Field("amount", "the same tokens read by the attention decoder instead of the CTC head"),
    "tokenizer.frame_rate": Field("amount", "speech tokens per second"),
    "tokenizer.codebook_size": Field("count", "entries of the codebook"),
    "tokenizer.codebook_used": Field("share", "share of the codebook seen on held-out audio"),
    "tokenizer.perplexity": Field("amount", "perplexity of the code histogram on held-out audio"),
    "tokenizer.lookahead_s": Field("amount", "how far past a token's end the audio can still change it, in seconds"),
    "tokenizer.streaming_equals_offline": Field("flag", "streamed in chunks, every token is the offline one"),
    "tokenizer.steps": Field("count", "training steps of the tokenizer"),
    "tokenizer.parameters": Field("count", "parameters of the tokenizer"),
    "text_to_token.wer": Field("amount", "word error rate of its tokens read back by the ASR head, held-out sentences"),
    "text_to_token.wer_spans_1_3": Field("amount", "the same on spans of 1-3 words"),
    "text_to_token.wer_spans_4_9": Field("amount", "the same on spans of 4-9 words"),
    "text_to_token.wer_spans_10_plus": Field("amount", "the same on spans of 10 words and more"),
    "text_to_token.wer_spans_1_10": Field("amount", "the same on spans of 1-10 words"),
    "text_to_token.rejected": Field("share", "share of texts whose tokens were rejected"),
    "text_to_token.boundary_ms": Field("amount", "median distance of a held-out word's end from its true time, in ms"),
    "text_to_token.boundary_p90_ms": Field("amount", "90th percentile of the same"),
    "text_to_token.boundary_within_token": Field("share", "share of word ends at most one token from the true time"),
    "text_to_token.boundary_grid_ms": Field("amount", "the median with the true tokens of each word: the grid's part"),
    "text_to_token.boundary_n": Field("count", "words behind the boundary figures"),
    "text_to_token.n": Field("count", "held-out sentences behind text_to_token.wer"),
    "text_to_token.steps": Field("count", "training steps of the text-to-token model"),
    "text_to_token.parameters": Field("count", "parameters of the text-to-token model"),
    "shards.<source>.documents": Field("count", "documents of this source"),
    "shards.<source>.speech_tokens": Field("count", "speech tokens of this source"),
    "shards.<source>.text_tokens": Field("count", "text tokens of this source"),
    "shards.<source>.rejects": Field("count", "items that did not become documents"),
    "shards.interleaved.ratio": Field("share", "realised share of words that became speech"),
    "lm.<run>.speech_loss": Field("amount", "held-out loss per speech token, in nats"),
    "lm.<run>.text_loss": Field("amount", "held-out loss per text token, in nats"),
    "lm.<run>.parameters": Field("count", "parameters of the model"),
    "lm.<run>.steps": Field("count", "training steps"),
    "lm.<run>.units": Field("count", "global units seen in training: steps of the global transformer"),
    "lm.<run>.tokens": Field("count", "tokens seen in training"),
    "lm.<run>.speech_tokens": Field("count", "speech tokens seen in training"),
    "lm.<run>.text_tokens": Field("count", "text tokens seen in training"),
    "lm.<run>.flops": Field("amount", "floating point operations of the training"),
    "lm.<run>.seconds": Field("amount", "wall time of the training, in seconds"),
    "lm.<run>.patch_size": Field("amount", "realised speech tokens per patch in training"),
    "lm.<run>.text_patch_size": Field("amount", "realised text tokens per unit in training; 1 by construction"),
    **_under("lm.<run>.story.<set>.<pair>", "story endings", {**_SCORE, **_BY_SUM}),
    **_under("lm.<run>.fact.<group>.<pair>", "fact questions by likelihood", {**_SCORE, **_BY_SUM}),
    **_under("lm.<run>.qa.<group>.<pair>", "fact questions answered freely", {**_SCORE, **_FIRST}),
    **_under(
        "facts.transfer.<group>.<pair>", "questions on facts written but never spoken, by likelihood", _DIFFERENCE
    ),
    **_under("facts.transfer_qa.<group>.<pair>", "the same, answered freely", _DIFFERENCE),
}

WILDCARDS = {
    "pair": ("SS, ST, TS or TT (prompt, ending)", re.compile("[ST]{2}")),
    "": ("letters, digits, _ and -", re.compile("[A-Za-z0-9_-]+")),
}


def field(key: str) -> Field:
    """The schema's line for a key. Raises ValueError with the nearest keys."""
    parts = key.split(".")
    for pattern, entry in SCHEMA.items():
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(_matches(w, p) for w, p in zip(wanted, parts)):
            return entry
    raise ValueError(f"unknown result key {key!r}; {nearest(key, _completed(parts))}")


def check(results: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first key or value that the schema does not allow."""
    for key, value in results.items():
        rule, allowed = KINDS[field(key).kind]
        if not allowed(value):
            raise ValueError(f"result {key}={value!r} must be {rule}; leave the key out when it was not measured")


def write_results(path: Path, results: Mapping[str, Value]) -> Path:
    """Check, sort and write the flat table; an existing file is replaced whole or not at all."""
    check(results)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    os.replace(partial, path)
    return path


def read_results(path: Path) -> dict[str, Value]:
    """Read and check what `write_results` wrote. Raises FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the evals stage of a run writes it")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); run the evals stage again") from error
    check(results)
    return results


def task_results(prefix: str, result: Mapping[str, Any]) -> dict[str, Value]:
    """The flat lines of one task's result: `task_results("lm.lst.story.topic.SS", task.run(scorer))`."""
    measured = result["accuracy"]
    lines: dict[str, Value] = {f"{prefix}.{k}": measured[k] for k in ("low", "high", "n", "clusters")}
    lines |= {f"{prefix}.{k}": result[k] for k in ("chance", "version")}
    return lines | {f"{prefix}.{k}": result[k]["value"] for k in result if k.startswith("accuracy")}


def transfer_results(
    prefix: str, difference: Difference, accuracy_with: float, accuracy_without: float
) -> dict[str, Value]:
    """The flat lines of one paired difference: `transfer_results("facts.transfer.text.ST", ...)`."""
    lines: dict[str, Value] = {f"{prefix}.{k}": v for k, v in vars(difference).items() if k != "value"}
    return lines | {
        f"{prefix}.difference": difference.value,
        f"{prefix}.with": accuracy_with,
        f"{prefix}.without": accuracy_without,
    }


def schema_markdown() -> str:
    """The schema as a Markdown table, for docs/results.md."""
    rows = [f"| `{key}` | {KINDS[f.kind][0]} | {f.meaning} |" for key, f in SCHEMA.items()]
    return "\n".join(["| key | value | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def _matches(wanted: str, part: str) -> bool:
    if not wanted.startswith("<"):
        return wanted == part
    _, rule = WILDCARDS.get(wanted.strip("<>"), WILDCARDS[""])
    return rule.fullmatch(part) is not None


def _completed(parts: list[str]) -> list[str]:
    """Every pattern with its wildcards filled from the key at hand where they fit, so that a near miss looks near."""
    completed = []
    for pattern in SCHEMA:
        wanted = pattern.split(".")
        filled = [p if w.startswith("<") and _matches(w, p) else w for w, p in zip(wanted, parts)]
        completed.append(".".join(filled + wanted[len(filled) :]))
    return completed
