"""Whether text ids mean the same to a base model as to the text tokenizer of the shards.

Equal ids and not equal files is the rule: a template for chats, a length at which to cut or the package's own version change
the file of a tokenizer and no row of the base's table. The base may know more than the shards' tokenizer, as a folder does that
`export` wrote.
Trap: without this a model trains as well as from random weights, and nothing says so.
"""

from pathlib import Path

from tokenizers import Tokenizer

from speechquilt.nn.hub import local_folder
from speechquilt.text import TextTokenizer

FILE = "tokenizer.json"


def check_base(folder: Path, text_tokenizer: TextTokenizer) -> None:
    """Raises FileNotFoundError when the base has no tokenizer.json, ValueError when a text token has another id there."""
    path = local_folder(folder) / FILE
    remedy = f"tokenize the text of the shards again with --text-tokenizer {folder}, and train with it"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; it shows that the ids of the shards are the base's own, so copy it from where the base "
            "comes from"
        )
    base = _vocabulary(path)
    shards = Tokenizer.from_str(text_tokenizer.json).get_vocab(with_added_tokens=True)
    other = sorted((i, token) for token, i in shards.items() if base.get(token) != i)
    if other:
        i, token = other[0]
        raise ValueError(
            f"warm_start={str(folder)!r}: {len(other)} of the {len(shards)} text tokens of the shards have another id in the "
            f"base ({token!r} is {i}, there {base.get(token, 'unknown')}), but text must be made with the base's own text "
            f"tokenizer; {remedy}"
        )


def _vocabulary(path: Path) -> dict[str, int]:
    """Token -> id, special tokens included."""
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(
            f"{path} is no text tokenizer ({error}); copy it again from where the base comes from"
        ) from error
