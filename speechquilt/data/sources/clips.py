"""Five recordings of people reading aloud (LibriVox, in Debian's pocketsphinx-testdata) with what they say.

Trap: a hundred words by a few readers. Enough to see whether people are understood at all, far too few to choose between
two models, and none is to be trained on.
"""

import re
from pathlib import Path

from speechquilt import audio
from speechquilt.types import Utterance

TABLE = "transcription"
_LINE = re.compile(r"<s> (.+) </s> \((.+)\)")


def read_clips(folder: Path) -> list[Utterance]:
    """The recordings with their texts. Raises FileNotFoundError when they were not fetched."""
    table = folder / TABLE
    if not table.is_file():
        raise FileNotFoundError(f"{table} is missing; `make clips` fetches the recordings")
    found = _LINE.findall(table.read_text(encoding="utf-8"))
    return [Utterance(id=name, text=text, audio=audio.load(folder / f"{name}.wav")) for text, name in found]
