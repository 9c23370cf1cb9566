"""Long texts as parts that end where their writers paused.

Trap: a text may be far larger than anything that should be made of all of it at once. Its words are found as they are
needed.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from speechquilt.data.interleaving.synthetic import word_starts
from speechquilt.types import TextDocument

_PARAGRAPH, _LINE = re.compile(r"\s*\n[ \t\r]*\n"), re.compile(r"\s*\n")


def parts(document: TextDocument, max_words: int) -> Iterator[TextDocument]:
    """The document, or when it has more than `max_words` words (of `split_words`) its parts `ID/part0` ...

    Joined, the parts are the document. A part ends where a paragraph ends in the second half of what it may hold, else
    where a line does, else after `max_words` words.
    """
    text = document.text
    if len(text) <= max_words:  # a word has a character at least
        yield document
        return
    starts = word_starts(text)
    ahead = list(islice(starts, max_words + 1))  # the words of this part and the next one's first
    if len(ahead) <= max_words:
        yield document
        return
    number = 0
    while ahead:
        count = _part_end(text, ahead, max_words)
        stop = ahead[count] if count < len(ahead) else len(text)
        yield TextDocument(id=f"{document.id}/part{number}", text=text[ahead[0] : stop])
        ahead = [*ahead[count:], *islice(starts, count)]
        number += 1


def _part_end(text: str, starts: Sequence[int], max_words: int) -> int:
    """How many of the words that begin at `starts` are the next part."""
    if max_words >= len(starts):
        return len(starts)
    for ends in (_PARAGRAPH, _LINE):
        for count in range(max_words, max_words // 2, -1):
            if ends.match(text, starts[count]):  # the white space before a word is its own
                return count
    return max_words
