"""`speechquilt eval`: a trained model chooses endings, whose parts are text or audio, in a JSONL file of one's own.

Trap: audio is read with the tokenizer that made the model's shards; another one's ids would be noise, so it is refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechquilt import audio
from speechquilt.data.sources.tables import decoded
from speechquilt.evals.tasks import ChoiceItem, ChoiceTask
from speechquilt.files import write_json
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_all
from speechquilt.stages.train_lm import TEXT_TOKENIZER, LMRun, load_scorer, tokenizer_folder
from speechquilt.stages.training_documents import text_fingerprint, text_segment
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import loading
from speechquilt.types import Segment

ITEM_FORM = '{"prompt": PART, "endings": [PART, ...], "answer": 0}, where a PART is {"text": "..."} or {"audio": "x.wav"}; without a prompt leave it out'


@dataclass(frozen=True, kw_only=True)
class Tokenizers:
    """What made the shards of a trained model."""

    speech: SpeechTokenizer
    text: TextTokenizer


def evaluate(lm: Path, items: Path, out: Path | None, tokenizer: Path | None = None) -> None:
    """`speechquilt eval`: choice items whose parts are text or audio. `tokenizer`: where the speech tokenizer is now."""
    scorer, run = load_scorer(lm)
    tokenizers = tokenizers_of(lm, run, tokenizer)
    task = ChoiceTask(name=items.stem, version=1, items=list(_items(items, tokenizers)))
    found = task.run(scorer)
    if out is not None:
        write_json(out, found)
    measured = found["accuracy"]
    print(f"accuracy {measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}] n={measured['n']}")
    print(f"chance   {found['chance']:.3f}\nresults  {out or 'give --out FILE to keep them'}")


def tokenizers_of(lm: Path, run: LMRun, moved_to: Path | None = None) -> Tokenizers:
    """Both tokenizers of a run folder. Raises FileNotFoundError or ValueError when one is not there, or another one is."""
    return Tokenizers(speech=speech_tokenizer_of(lm, run, moved_to), text=text_tokenizer_in(lm, run))


def speech_tokenizer_of(lm: Path, run: LMRun, moved_to: Path | None = None) -> SpeechTokenizer:
    """The one behind a run folder; `moved_to`: where it is now. Raises as `tokenizers_of`."""
    folder = moved_to or tokenizer_folder(lm, run)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}, the speech tokenizer of {lm}, is missing; say where it is by --tokenizer FOLDER"
        )
    speech = loading.load(folder)
    _require(folder, speech.fingerprint, lm, run.speech_fingerprint)
    return speech


def text_tokenizer_in(lm: Path, run: LMRun) -> TextTokenizer:
    """The one inside a run folder. Raises as `tokenizers_of`."""
    text = TextTokenizer.load(lm / TEXT_TOKENIZER)
    _require(lm / TEXT_TOKENIZER, text_fingerprint(text), lm, run.text_fingerprint)
    return text


def _require(path: Path, fingerprint: str, lm: Path, expected: str) -> None:
    if expected and fingerprint != expected:
        raise ValueError(
            f"{path} has fingerprint {fingerprint}, {lm} was trained on {expected}; "
            "put the file of its own run back, or give the speech tokenizer that made its shards by --tokenizer FOLDER"
        )


def _items(path: Path, tokenizers: Tokenizers) -> Iterator[ChoiceItem]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a JSONL file of items is expected, see speechquilt eval --help")
    for number, line in enumerate(decoded(path.read_bytes()).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _item(json.loads(line), number, path.parent, tokenizers)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            what = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            raise ValueError(f"{path}:{number}: {what}; a line is {ITEM_FORM}") from error


def _item(row: dict[str, Any], number: int, folder: Path, tokenizers: Tokenizers) -> ChoiceItem:
    """Without a `prompt` (as in sWUGGY and sBLIMP) the endings are scored as they are."""
    id = str(row.get("id", number))
    prompt, endings = row.get("prompt"), row["endings"]
    if not isinstance(endings, list):
        raise ValueError(f"item {id!r}: endings={endings!r} must be a list of parts")
    parts = [_part(part, folder, tokenizers, inside=prompt is not None) for part in endings]
    if empty := [k for k, part in enumerate(parts) if not len(part.ids_T)]:
        raise ValueError(f"item {id!r}: endings[{empty[0]}] is empty; there must be something to score in each")
    return ChoiceItem(
        id=id,
        cluster=str(row.get("cluster", id)),
        prompt=() if prompt is None else (_part(prompt, folder, tokenizers),),
        endings=tuple(parts),
        answer=row["answer"],
    )


def _part(part: dict[str, str], folder: Path, tokenizers: Tokenizers, inside: bool = False) -> Segment:
    if "text" in part:
        return text_segment(tokenizers.text, part["text"], inside=inside)
    wave = audio.resample(audio.check(audio.load(folder / part["audio"])), tokenizers.speech.sample_rate)
    return Segment(modality="speech", ids_T=encode_all(tokenizers.speech, [wave], what=part["audio"])[0])
