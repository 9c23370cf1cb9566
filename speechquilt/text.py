"""Text tokenizer (byte-level BPE, `tokenizers` JSON) and the plain form of text that speech recognition is scored on.

Byte-level means that text in any script comes back unchanged, but only text like the training text becomes few ids.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPACES = ("\u0120", "\u2581", " ")  # how byte-level BPE, SentencePiece and plain vocabularies write a space


class TextTokenizer:
    """Text <-> ids 0 .. size - 1.

    Ours puts a space before every text, so a word has the same ids at its start and inside; `prefixes_space` says so.
    Those of most text models (SmolLM2, Llama 3, Qwen, Whisper) put none: for them a word inside a text is its space and
    itself, and white space has to reach `encode`. `encode_run` and `encode_inside` do what either kind needs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.prefixes_space = self._prefixes_space()

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Byte-level BPE; fewer ids than `vocab_size` when the texts run out of pairs to merge."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing; a text tokenizer is a tokenizers JSON file")
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))

    @property
    def json(self) -> str:
        """The whole tokenizer, for fingerprints."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_run(self, text: str) -> list[int]:
        """A run of a document, given with the white space that belongs to it."""
        return self.encode(text.strip() if self.prefixes_space else text)

    def encode_inside(self, text: str) -> list[int]:
        """Text that stands behind a space, inside a document."""
        return self.encode(text if self.prefixes_space else f" {text}")

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids)).strip()

    def _prefixes_space(self) -> bool:
        """Whether a text begins with a space of the tokenizer's own, or white space at its start makes no difference."""
        plain = self._tokenizer.encode("a", add_special_tokens=False)
        opened = bool(plain.tokens) and plain.tokens[0].startswith(SPACES)
        return opened or plain.ids == self._tokenizer.encode(" a", add_special_tokens=False).ids


_APOSTROPHE = re.compile(r"(?<=\w)[\u2019\u02bc](?=\w)")
# Soft hyphens, joiners, variation selectors: they change how a word looks, not what it is.
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufeff\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_SIGNS = re.compile(r"[^\w\s']+")


def spoken_form(text: str) -> str:
    """Lower case, no punctuation, single spaces: what an ASR target holds and what word error rates compare.

    Marks stay on the letters that they belong to (vowels of Devanagari, accents that no single character has).
    """
    if text.isascii():
        text = _SIGNS.sub(" ", text.lower())
    else:
        text = _APOSTROPHE.sub("'", unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).lower())
        text = _SIGNS.sub(_marks_of, text)
    return re.sub(r"\s+", " ", text).strip()


def _marks_of(signs: re.Match[str]) -> str:
    """Of signs behind a letter the marks that stand on it, and a space for others."""
    before = signs.string[signs.start() - 1] if signs.start() else " "
    if before.isspace() or before == "'":
        return " "
    number = next((i for i, sign in enumerate(signs[0]) if unicodedata.category(sign) not in ("Mn", "Mc")), None)
    return signs[0] if number is None else signs[0][:number] + " "
