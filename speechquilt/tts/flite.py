"""Text -> English speech with word times, by Flite's C library: four voices, 50-80 times real time on one core.

Word times are read from the utterance that Flite has built: token -> words -> syllables -> phones, each with its end.
Trap: Flite draws its noise from the C library's `rand`, so the same text sounds different after another text unless
`srand` comes first; and its settings keep the pointer to their name, which must therefore never be freed.
"""

import ctypes
import ctypes.util
import functools
import hashlib
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechquilt.tts.spoken_words import SpokenWord, spoken_words
from speechquilt.types import AlignedWord, Utterance, Waveform

VOICES = ("awb", "rms", "slt", "kal16")  # Scottish man, American man, American woman, an older and rougher voice
_SIGNS = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_STRETCH = b"duration_stretch"  # kept here for ever, see above

_one_at_a_time = threading.Lock()  # `rand` and the settings of a voice belong to the whole process


@dataclass(frozen=True, kw_only=True)
class FliteTTSConfig:
    """Voices and speed of Flite, the English speaker."""

    voices: tuple[str, ...] = VOICES
    """Voices to speak with, each once: awb, rms, slt or kal16."""
    rate: float = 1.0
    """Speed, 0.5 to 2; 1 is the voice's own. Higher: less audio for the same text."""
    folder: str = ""
    """Where Flite's libraries were unpacked, searched with all folders below; what is not there is taken from the system."""

    def __post_init__(self) -> None:
        if not self.voices or len(set(self.voices)) != len(self.voices):
            raise ValueError(f"voices={self.voices} must name at least one voice, each once")
        if unknown := [voice for voice in self.voices if voice not in VOICES]:
            raise ValueError(f"voices: Flite has no {', '.join(unknown)}; it has {', '.join(VOICES)}")
        if not 0.5 <= self.rate <= 2:
            raise ValueError(f"rate={self.rate} must be 0.5..2; 1 is the voice's own speed")

    def build(self) -> "FliteTTS":
        return FliteTTS(self)


class FliteTTS:
    """Flite through its C library. `speak` is a pure function of (config, text, voice)."""

    def __init__(self, config: FliteTTSConfig) -> None:
        """Raises FileNotFoundError when Flite is not there."""
        self.config = config
        self.voices: Sequence[str] = config.voices
        self._library = _library(config.folder)
        for voice in config.voices:
            self._library.voice(voice)

    def speak(self, text: str, voice: str) -> Utterance:
        """One utterance at 16 kHz with one `AlignedWord` per whitespace-separated word of `text`.

        Words keep their punctuation; a sign that stands alone joins the word before it. Pauses are gaps between words.
        Raises ValueError on a voice outside the config, on text without words or in other letters than English has, and
        where Flite is silent about a word.
        """
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is not one of this speaker's: {', '.join(self.voices)}")
        words = spoken_words(text)
        with _one_at_a_time:
            samples_S, rate, tokens = self._library.synthesize(_ascii(text), voice, 1 / self.config.rate)
        digest = hashlib.sha256(f"{self.config.rate}\n{text}".encode()).hexdigest()[:12]
        return Utterance(
            id=f"{voice}/{digest}",
            text=text,
            audio=Waveform(samples_S=samples_S, sample_rate=rate),
            alignment=_timed(words, tokens, len(samples_S) / rate),
        )


def is_there(folder: str = "") -> bool:
    """Whether Flite's library is in `folder` or on the system."""
    try:
        _path("flite", folder)
    except FileNotFoundError:
        return False
    return True


def _ascii(text: str) -> str:
    """The text in the letters that Flite knows: accents off, typographic signs as a typewriter has them."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_SIGNS))
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    if foreign := [c for c in plain if not c.isascii()]:
        raise ValueError(f"Flite reads English letters alone, not {foreign[0]!r} in {text!r}; choose another voice")
    return plain


@dataclass(frozen=True)
class _Token:
    """What Flite has read as one: its letters and digits, and the time of its phones in seconds; None where it is silent."""

    letters: str
    span_s: tuple[float, float] | None


def _timed(words: Sequence[SpokenWord], tokens: Sequence[_Token], duration_s: float) -> tuple[AlignedWord, ...]:
    """Words and tokens are matched letter by letter: Flite cuts some words in two and drops or speaks lone signs, which
    count for the word before them.
    """
    spans: list[list[tuple[float, float]]] = [[] for _ in words]
    at, rest = 0, _letters(words[0].text)
    for token in tokens:
        if token.letters and not rest and at + 1 < len(words):
            at, rest = at + 1, _letters(words[at + 1].text)
        if not rest.startswith(token.letters):
            raise ValueError(f"Flite has read {token.letters!r} in {words[at].text!r}; leave the text out")
        rest = rest[len(token.letters) :]
        spans[at] += [token.span_s] if token.span_s else []
    for word, parts in zip(words, spans):
        if not parts:
            raise ValueError(f"Flite is silent about {word.text!r}; leave it out or spell it as it is said")
    return tuple(
        AlignedWord(text=word.text, start_s=parts[0][0], end_s=min(parts[-1][1], duration_s))
        for word, parts in zip(words, spans)
    )


def _letters(text: str) -> str:
    return "".join(c for c in _ascii(text) if c.isalnum())


# --- the C library


class _Wave(ctypes.Structure):
    """cst_wave"""

    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class _Voice(ctypes.Structure):
    """The beginning of cst_voice."""

    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


_POINTER, _NAME = ctypes.c_void_p, ctypes.c_char_p
_SIGNATURES = {
    "flite_init": (ctypes.c_int, []),
    "flite_synth_text": (_POINTER, [_NAME, _POINTER]),
    "delete_utterance": (None, [_POINTER]),
    "utt_wave": (ctypes.POINTER(_Wave), [_POINTER]),
    "utt_relation": (_POINTER, [_POINTER, _NAME]),
    "relation_head": (_POINTER, [_POINTER]),
    "item_next": (_POINTER, [_POINTER]),
    "item_prev": (_POINTER, [_POINTER]),
    "item_daughter": (_POINTER, [_POINTER]),
    "item_as": (_POINTER, [_POINTER, _NAME]),
    "item_feat_string": (_NAME, [_POINTER, _NAME]),
    "item_feat_float": (ctypes.c_float, [_POINTER, _NAME]),
    "feat_set_float": (None, [_POINTER, _NAME, ctypes.c_float]),
}


class _Library:
    """libflite and its voices, loaded once per process. Hold `_one_at_a_time` around `synthesize`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._voices: dict[str, int] = {}
        if folder and (sound := _find("asound", folder)):  # what libflite would play with; unpacked beside it
            ctypes.CDLL(sound, mode=ctypes.RTLD_GLOBAL)
        self._flite = self._load("flite")
        for name in ("flite_usenglish", "flite_cmulex"):
            self._load(name)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._flite, name)
            function.restype, function.argtypes = result, arguments
        self._flite.flite_init()
        self._c = ctypes.CDLL(None)

    def voice(self, name: str) -> int:
        """The address of a voice, which stays registered."""
        if name not in self._voices:
            register = getattr(self._load(f"flite_cmu_us_{name}"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = _POINTER, [_NAME]
            self._voices[name] = register(None)
        return self._voices[name]

    def synthesize(self, text: str, voice: str, stretch: float) -> tuple[np.ndarray, int, list[_Token]]:
        """-> `samples_S` float32, their rate in Hz, and what was read."""
        flite, address = self._flite, self.voice(voice)
        flite.feat_set_float(_Voice.from_address(address).features, _STRETCH, stretch)
        self._c.srand(1)
        utterance = flite.flite_synth_text(text.encode(), address)
        if not utterance:
            raise ValueError(f"Flite's voice {voice!r} cannot speak {text!r}")
        try:
            wave = flite.utt_wave(utterance).contents
            samples_S = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).astype(np.float32) / 32768
            tokens = [self._token(item) for item in self._items(flite.utt_relation(utterance, b"Token"))]
            return samples_S, wave.sample_rate, tokens
        finally:
            flite.delete_utterance(utterance)

    def _load(self, name: str) -> ctypes.CDLL:
        return ctypes.CDLL(_path(name, self._folder), mode=ctypes.RTLD_GLOBAL)  # the libraries need one another

    def _token(self, token: int) -> _Token:
        flite = self._flite
        phones = [
            flite.item_as(phone, b"Segment")
            for word in self._daughters(token)
            for syllable in self._daughters(flite.item_as(word, b"SylStructure"))
            for phone in self._daughters(syllable)
        ]
        span_s = (self._begin_s(phones[0]), flite.item_feat_float(phones[-1], b"end")) if phones else None
        return _Token(_letters(flite.item_feat_string(token, b"name").decode()), span_s)

    def _begin_s(self, phone: int) -> float:
        before = self._flite.item_prev(phone)
        return self._flite.item_feat_float(before, b"end") if before else 0.0

    def _items(self, relation: int) -> Iterator[int]:
        yield from self._chain(self._flite.relation_head(relation))

    def _daughters(self, item: int | None) -> Iterator[int]:
        if item:
            yield from self._chain(self._flite.item_daughter(item))

    def _chain(self, item: int | None) -> Iterator[int]:
        while item:
            yield item
            item = self._flite.item_next(item)


@functools.cache
def _library(folder: str) -> _Library:
    return _Library(folder)


def _path(name: str, folder: str) -> str:
    found = (_find(name, folder) if folder else "") or ctypes.util.find_library(name)
    if not found:
        raise FileNotFoundError(
            f"Flite's library lib{name} is not {f'in {folder} nor ' if folder else ''}on this system; install flite (Debian: "
            "apt-get install flite), or run `make speech` and give the folder that it fills"
        )
    return found


def _find(name: str, folder: str) -> str:
    return next((str(path) for path in sorted(Path(folder).rglob(f"lib{name}.so.*"))), "")
