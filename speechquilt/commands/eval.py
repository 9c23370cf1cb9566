"""`speechquilt eval LM ITEMS`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Positional


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a language model on choice items: which ending is likelier?

    An item is a line of JSON: {"id": "1", "prompt": PART, "endings": [PART, ...], "answer": 0}, where a PART is
    {"text": "..."} or {"audio": "path.wav"}, the path from the folder of the items.
    """

    lm: Positional[Path]
    """Run of a language model."""
    items: Positional[Path]
    """JSONL file of items."""
    tokenizer: Path | None = None
    """Speech tokenizer that made the model's shards; none: the one that the run has or remembers."""
    out: Path | None = None
    """Where results go as JSON; none: only the accuracy is printed."""

    def run(self) -> None:
        from speechquilt.stages.evaluate import evaluate

        evaluate(self.lm, self.items, self.out, self.tokenizer)
