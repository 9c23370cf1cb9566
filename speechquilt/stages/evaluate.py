"""`speechquilt eval`: a trained model chooses endings, whose parts are text or audio, in a JSONL file of one's own.

Trap: audio is read with the tokenizer that made the model's shards; another one's ids would be noise, so it is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from speechquilt import audio
from speechquilt.evals.tasks import ChoiceItem, ChoiceTask
from speechquilt.files import write_json
from speechquilt.stages.encode import encode_all, text_tokenizer_of
from speechquilt.stages.train_lm import TOKENIZER_DIR, load_scorer, tokenizer_folder
from speechquilt.stages.training_documents import text_segment
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Segment


def evaluate(lm: Path, items: Path, out: Path | None) -> None:
    """`speechquilt eval`: choice items whose parts are text or audio."""
    scorer, run = load_scorer(lm)
    tokenizer_dir = tokenizer_folder(lm, run)
    tokenizer = SupervisedTokenizer.load(tokenizer_dir)
    if tokenizer.fingerprint != run.speech_fingerprint:
        raise ValueError(
            f"{tokenizer_dir} has fingerprint {tokenizer.fingerprint}, {lm} was trained on {run.speech_fingerprint}; "
            f"put the tokenizer that made its shards into {lm / TOKENIZER_DIR}"
        )
    task = ChoiceTask(name=items.stem, version=1, items=list(_items(items, tokenizer)))
    found = task.run(scorer)
    if out is not None:
        write_json(out, found)
    measured = found["accuracy"]
    print(f"accuracy {measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}] n={measured['n']}")
    print(f"chance   {found['chance']:.3f}\nresults  {out or 'give --out FILE to keep them'}")


def _items(path: Path, tokenizer: SupervisedTokenizer) -> Iterator[ChoiceItem]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a JSONL file of items is expected, see speechquilt eval --help")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            id = str(row.get("id", number))
            yield ChoiceItem(
                id=id,
                cluster=str(row.get("cluster", id)),
                prompt=(_part(row["prompt"], path.parent, tokenizer),),
                endings=tuple(_part(part, path.parent, tokenizer, inside=True) for part in row["endings"]),
                answer=row["answer"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}:{number}: {error!r}; a line is {{"prompt": PART, "endings": [PART, ...], "answer": 0}}'
            ) from error


def _part(part: dict[str, str], folder: Path, tokenizer: SupervisedTokenizer, inside: bool = False) -> Segment:
    if "text" in part:
        return text_segment(text_tokenizer_of(tokenizer), part["text"], inside=inside)
    wave = audio.resample(audio.check(audio.load(folder / part["audio"])), tokenizer.sample_rate)
    return Segment(modality="speech", ids_T=encode_all(tokenizer, [wave], what=part["audio"])[0])
