"""The words of a text that a speaker gives times to: whitespace-separated, with their signs."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SpokenWord:
    """A word with its punctuation, and where its first and its last piece stand in the text."""

    text: str
    first_char: int
    num_chars: int
    num_pieces: int
    """Whitespace-separated pieces in it: 1, and one for each lone sign that has joined it."""


def spoken_words(text: str) -> list[SpokenWord]:
    """The words of `text` in order; a sign that stands alone joins the word before it, at the start the word behind it.
    Raises ValueError on text without words.
    """
    words: list[SpokenWord] = []
    lead: list[str] = []
    for match in re.finditer(r"\S+", text):
        piece = match.group()
        if any(c.isalnum() for c in piece):
            joined = " ".join([*lead, piece])
            words.append(SpokenWord(joined, match.start(), len(piece), len(lead) + 1))
            lead = []
        elif words:
            last = words[-1]
            words[-1] = SpokenWord(f"{last.text} {piece}", last.first_char, last.num_chars, last.num_pieces + 1)
        else:
            lead.append(piece)
    if not words:
        raise ValueError(f"text {text!r} has no words to speak; give it at least one letter or digit")
    return words
