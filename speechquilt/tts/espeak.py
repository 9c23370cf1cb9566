"""Text -> speech with exact word times, by espeak-ng: a small synthetic voice that needs no recordings and no network.

Trap: espeak-ng keeps its pitch flutter, noise and glottal phase in C statics that no call resets, so the same text
sounds different after another text. The library is therefore loaded afresh for every utterance (about 1 ms); never
cache it.
"""

import ctypes
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from speechquilt.tts.spoken_words import SpokenWord, spoken_words
from speechquilt.types import AlignedWord, Utterance, Waveform

SAMPLE_RATE = 22050  # what espeak-ng's voices are made for
FRAME_S = 0.005  # energy is judged on frames this long
QUIET_DB = -40.0  # a frame this far below the loudest frame of the utterance is silence
LATE = SAMPLE_RATE // 100  # word events come up to this many samples after the word's first sound
MIN_GAP_S = 0.03  # a shorter silence after a word is a stop consonant closing, not a gap

# From espeak-ng's speak_lib.h; the numbers are its stable ABI.
_EVENT_END_OF_LIST, _EVENT_WORD = 0, 1
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_OUTPUT_SYNCHRONOUS, _DONT_EXIT, _CHARS_UTF8, _POSITION_CHARACTER = 2, 0x8000, 1, 1
_PHONEMES_IPA = 2
_CLOSING = re.compile(
    r"""([;:,.!?—…]+)["'”’)\s]*["'“‘(]*\S?$"""
)  # and the letter of the next clause that is read ahead

_one_at_a_time = threading.Lock()  # espeak-ng is one global speaker


@dataclass(frozen=True)
class Clause:
    """What is said in one breath: IPA with stress marks and a space between words, and the signs that close it, or ""."""

    ipa: str
    signs: str


def clauses(text: str, language: str) -> list[Clause]:
    """How espeak-ng pronounces `text`, numbers and abbreviations included: a pure function.

    `language`: a name of espeak-ng's, "en-us". Raises ValueError when it has no such language, ImportError when it is
    not installed.
    """
    with _one_at_a_time, _Library(_loader()) as library:
        library.set_voice(language)
        return [clause for clause in library.pronounce(_with_capitals(text)) if clause.ipa]


@dataclass(frozen=True, kw_only=True)
class EspeakTTSConfig:
    """Voices and speed of espeak-ng, the synthetic speaker. Every spoken second costs tokens and so compute, which is
    why the default is faster than espeak's own 175 words per minute and pauses are short."""

    voices: tuple[str, ...] = ("en-us", "en-us+f3", "en+m3", "en+f4")
    """Voices to speak with, each once: an espeak-ng language ("en-us"), or one with a variant ("en-us+f3")."""
    words_per_minute: int = 220
    """Speed in words per minute, 80 to 450. Higher: less audio for the same text."""
    pitch: int = 50
    """Height of the voice on espeak-ng's scale, 0 to 100. 50 is the voice's own."""
    pitch_range: int = 50
    """How much the pitch moves on espeak-ng's scale, 0 to 100. 0 is a monotone, 50 the voice's own."""
    max_pause_s: float = 0.16
    """Longest silence after a word in seconds; a longer one is cut to this. 0 leaves no pauses."""

    def __post_init__(self) -> None:
        if not self.voices or len(set(self.voices)) != len(self.voices):
            raise ValueError(f"voices={self.voices} must name at least one voice, each once")
        if not 80 <= self.words_per_minute <= 450:
            raise ValueError(f"words_per_minute={self.words_per_minute} must be 80..450, espeak-ng's own range")
        if not self.max_pause_s >= 0:
            raise ValueError(f"max_pause_s={self.max_pause_s} must not be negative; 0.16 is two tokens at 12.5 Hz")
        for key in ("pitch", "pitch_range"):
            if not 0 <= getattr(self, key) <= 100:
                raise ValueError(f"{key}={getattr(self, key)} must be 0..100; 50 is the voice's own")

    def build(self) -> "EspeakTTS":
        return EspeakTTS(self)


class EspeakTTS:
    """espeak-ng through its C library. `speak` is a pure function of (config, text, voice)."""

    def __init__(self, config: EspeakTTSConfig) -> None:
        """Raises ValueError on an unknown voice, ImportError when espeak-ng is not installed."""
        self.config = config
        self.voices: Sequence[str] = config.voices
        loader = _loader()
        variants = Path(loader.get_data_path()) / "voices" / "!v"
        for voice in config.voices:
            variant = voice.partition("+")[2]
            # espeak-ng takes an unknown variant in silence and speaks with the plain voice
            if variant and not (variants / variant).is_file():
                known = ", ".join(sorted(p.name for p in variants.iterdir()))
                raise ValueError(f"voice {voice!r}: espeak-ng has no variant {variant!r}; it has {known}")
        with _one_at_a_time, _Library(loader) as library:
            for voice in config.voices:
                library.set_voice(voice)

    def speak(self, text: str, voice: str) -> Utterance:
        """One utterance at 22,050 Hz with one `AlignedWord` per whitespace-separated word of `text`.

        Words keep their punctuation; a sign that stands alone joins the word before it. A word ends where its sound
        does, so pauses are gaps between words. Raises ValueError on a voice outside the config and on text without
        words.
        """
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is not one of this speaker's: {', '.join(self.voices)}")
        words = spoken_words(text)
        config = self.config
        with _one_at_a_time, _Library(_loader()) as library:
            library.set_voice(voice)
            library.set_parameter(_PARAMETER_RATE, config.words_per_minute)
            library.set_parameter(_PARAMETER_PITCH, config.pitch)
            library.set_parameter(_PARAMETER_RANGE, config.pitch_range)
            samples_S, events = library.synthesize(_with_capitals(text))
        if not len(samples_S):
            raise ValueError(f"espeak-ng voice {voice!r} says nothing for {text!r}; give it words of its language")
        spans = _audible(_starts(words, events, len(samples_S)), samples_S)
        samples_S, spans = _shorten_pauses(samples_S, spans, int(config.max_pause_s * SAMPLE_RATE))
        digest = hashlib.sha256(f"{config}\n{text}".encode()).hexdigest()[:12]
        return Utterance(
            id=f"{voice}/{digest}",
            text=text,
            audio=Waveform(samples_S=samples_S, sample_rate=SAMPLE_RATE),
            alignment=tuple(
                AlignedWord(text=word.text, start_s=start / SAMPLE_RATE, end_s=end / SAMPLE_RATE)
                for word, (start, end) in zip(words, spans)
            ),
        )


def _starts(words: list[SpokenWord], events: list[tuple[int, int]], num_samples: int) -> list[int]:
    """First sample of each word, from (character, sample) events.

    espeak-ng speaks some pairs as one ("of the") and reports only the first; such a run shares its time by length.
    A word with several events (a number, a compound) starts at the first.
    """
    known: dict[int, int] = {0: 0}
    for char, sample in events:
        i = sum(w.first_char <= char for w in words) - 1
        if i > 0 and i not in known:
            known[i] = min(max(sample, max(known.values())), num_samples)
    anchors = sorted(known)
    starts = [0] * len(words)
    for first, stop in zip(anchors, [*anchors[1:], len(words)]):
        begin, end = known[first], known.get(stop, num_samples)
        chars = np.cumsum([0] + [w.num_chars for w in words[first:stop]])
        for k in range(first, stop):
            starts[k] = begin + int((end - begin) * chars[k - first] / chars[-1])
    return starts


def _audible(starts: list[int], samples_S: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) sample of each word: from its start to its last audible sample before the next word's sound."""
    frame = int(FRAME_S * SAMPLE_RATE)
    padded_S = np.pad(samples_S, (0, -len(samples_S) % frame))
    energy_F = np.sqrt((padded_S.reshape(-1, frame).astype(np.float64) ** 2).mean(1))
    loud_F = energy_F > energy_F.max() * 10 ** (QUIET_DB / 20)
    spans = []
    for start, stop in zip(starts, [*starts[1:], len(samples_S)]):
        onset = stop - LATE if stop < len(samples_S) else stop
        loud = np.flatnonzero(loud_F[start // frame : -(-onset // frame)])
        end = min(stop, (start // frame + int(loud[-1]) + 1) * frame) if len(loud) else stop
        spans.append((start, stop if stop - end < MIN_GAP_S * SAMPLE_RATE else end))
    return spans


def _shorten_pauses(
    samples_S: np.ndarray, spans: list[tuple[int, int]], longest: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Cut the silence after each word down to `longest` samples, and move the words behind it forward."""
    kept, moved, at, cut = [], [], 0, 0
    for (start, end), following in zip(spans, [*(s - LATE for s, _ in spans[1:]), len(samples_S)]):
        moved.append((start - cut, end - cut))
        excess = following - end - longest
        if excess > 0:
            kept.append(samples_S[at : end + longest])
            at = end + longest + excess
            cut += excess
    kept.append(samples_S[at:])
    return np.concatenate(kept), moved


def _with_capitals(text: str) -> str:
    """Upper case after ". ": espeak-ng takes a full stop before a small letter for an abbreviation and does not
    pause."""
    return re.sub(r"(?<=[.]\s)[a-z]", lambda letter: letter.group().upper(), text)


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """espeak_EVENT; `text_position` counts characters from 1."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "espeak-ng is not installed; run `pip install speechquilt[espeak]`, or bring recorded audio"
        ) from error
    return espeakng_loader


class _Library:
    """One fresh load of the C library, unloaded at the end of the `with` block. Hold `_one_at_a_time` around it."""

    def __init__(self, loader: ModuleType) -> None:
        self._path, self._data_path = loader.get_library_path(), loader.get_data_path()

    def __enter__(self) -> "_Library":
        self._library = ctypes.CDLL(str(self._path))
        rate = self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, str(self._data_path).encode(), _DONT_EXIT)
        if rate != SAMPLE_RATE:
            raise RuntimeError(
                f"espeak-ng started at {rate} Hz instead of {SAMPLE_RATE}; reinstall the espeakng-loader package "
                f"(its data is expected in {self._data_path})"
            )
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else breath noise is seeded by the clock
        return self

    def __exit__(self, *exception: object) -> None:
        import _ctypes

        self._library.espeak_Terminate()
        handle = self._library._handle
        if hasattr(_ctypes, "dlclose"):
            _ctypes.dlclose(handle)
        else:  # Windows
            _ctypes.FreeLibrary(handle)  # type: ignore[attr-defined]

    def set_voice(self, voice: str) -> None:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(
                f"espeak-ng has no voice {voice!r}; names look like en-us, en, en-gb-scotland, de, fr-fr, "
                "with an optional variant: en-us+f3"
            )

    def set_parameter(self, parameter: int, value: int) -> None:
        self._library.espeak_SetParameter(parameter, value, 0)

    def synthesize(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """-> `samples_S` float32, and (character from 0, sample) of every word event."""
        chunks: list[np.ndarray] = []
        events: list[tuple[int, int]] = []

        def receive(wav: "ctypes._Pointer[ctypes.c_short]", num_samples: int, event: "ctypes._Pointer[_Event]") -> int:
            if wav and num_samples:
                chunks.append(np.ctypeslib.as_array(wav, (num_samples,)).astype(np.float32) / 32768)
            i = 0
            while event[i].type != _EVENT_END_OF_LIST:
                if event[i].type == _EVENT_WORD:
                    events.append((event[i].text_position - 1, event[i].sample))
                i += 1
            return 0

        callback = _Callback(receive)  # kept alive by this frame until the synchronous call is over
        self._library.espeak_SetSynthCallback(callback)
        data = text.replace("\0", " ").encode() + b"\0"
        status = self._library.espeak_Synth(data, len(data), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak-ng returned error {status} for {text!r}; please report this text")
        return np.concatenate(chunks) if chunks else np.zeros(0, np.float32), events

    def pronounce(self, text: str) -> Iterator[Clause]:
        """Clause by clause: each call moves a pointer to the text that is not read yet."""
        to_phonemes = self._library.espeak_TextToPhonemes
        to_phonemes.restype = ctypes.c_char_p
        data = text.replace("\0", " ").encode()
        rest = ctypes.c_char_p(data)
        while left := rest.value:
            ipa = to_phonemes(ctypes.byref(rest), _CHARS_UTF8, _PHONEMES_IPA) or b""
            read = left[: len(left) - len(rest.value or b"")].decode(errors="ignore")
            closing = _CLOSING.search(read)
            yield Clause(ipa.decode().strip(), closing[1] if closing else "")
