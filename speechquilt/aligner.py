"""Waveform + transcript -> word times, by CTC forced alignment (spec latent-speech-text, section 4).

Recordings without word times get them here. What listens is an `Emitter`: a `Wav2Vec2ForCTC` folder (here) or one of
our own CTC encoders (`tokenizer/emitters.py`).
Trap: CTC marks each character by a spike somewhere inside it, so a word is found a little too short on both sides.
`BoundaryShift` moves the ends back by what training speech with known times shows; without it starts are late and ends
are early.

Axis letters: F frames of the emitter, K the columns of its alphabet that a text needs, W words, L ids of the text.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from speechquilt import audio
from speechquilt.nn.ctc import SEPARATOR, CTCPaths, Spelling, ctc_viterbi, frames_needed, target_frames
from speechquilt.text import spoken_form
from speechquilt.types import AlignedWord, Waveform


class Emitter(Protocol):
    """A CTC network with its alphabet. Frame f stands for samples `[f, f + 1) * frame_samples`."""

    sample_rate: int
    frame_samples: int
    window_frames: int  # the most frames that `emit` takes at once
    context_frames: int  # frames at an inner edge of a window that are heard but not used
    blank: int

    def emit(self, wav_S: torch.Tensor) -> torch.Tensor:
        """Float32 audio of at most `window_frames` -> `log_p_FV`, F = ceil(S / frame_samples)."""
        ...

    def spell(self, words: Sequence[str]) -> Spelling:
        """Words in spoken form -> ids. A word that the alphabet cannot spell, and "", get none."""
        ...


@dataclass(frozen=True, kw_only=True)
class BoundaryShift:
    """What is added to the times of every word: the emitter's mean lag, measured on known word times."""

    start_s: float = 0.0
    """Added to its start, in seconds; negative moves it earlier."""
    end_s: float = 0.0
    """Added to its end, in seconds; positive moves it later."""


class AlignmentError(ValueError):
    """A recording that cannot be aligned. `reason`: its class of fault in a few words, by which rejects are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class CTCAligner:
    """Word times from an emitter. Audio of any length in bounded memory: the network sees windows, the search keeps checkpoints.

    Every alignable word spans its first to its last character's frame. Its `score` is the mean probability of its
    frames on the path, between 0 and 1. A word that the emitter cannot spell (digits, another script) lies between its
    neighbours, with score 0.
    """

    def __init__(self, emitter: Emitter, shift: BoundaryShift = BoundaryShift()) -> None:
        self.emitter, self.shift = emitter, shift

    def align(self, waveform: Waveform, text: str) -> tuple[AlignedWord, ...]:
        """One `AlignedWord` per whitespace-separated word of `text`, in its own spelling, in order, inside the audio.

        A sign that stands alone joins the word before it. Raises ValueError on audio that cannot be used, and as
        AlignmentError on a text without a word that can be spelled and on one that needs more frames than the audio has.
        """
        rate = self.emitter.sample_rate
        return self._align(lambda: [audio.resample(audio.check(waveform), rate).samples_S], text, waveform.duration_s)

    def align_pieces(self, pieces: Iterable[np.ndarray], text: str) -> tuple[AlignedWord, ...]:
        """The same for consecutive pieces of audio at the emitter's rate, which are not kept: long recordings."""
        return self._align(lambda: pieces, text, None)

    def _align(
        self, pieces: Callable[[], Iterable[np.ndarray]], text: str, duration_s: float | None
    ) -> tuple[AlignedWord, ...]:
        """`duration_s`: what the pieces last, when that is known more exactly than by their samples at the emitter's rate."""
        emitter = self.emitter
        words = words_to_align(text)
        spelling = emitter.spell([spoken_form(word.replace("’", "'")) for word in words])
        spelled_W = np.isin(np.arange(len(words)), spelling.word_L)
        if not spelled_W.any():
            raise AlignmentError(
                "no word in the aligner's alphabet",
                f"text {text[:60]!r} has no word in the emitter's alphabet; spell numbers out, or use an emitter of its language",
            )
        columns_K, ids_L = np.unique(np.append(spelling.ids_L, emitter.blank), return_inverse=True)
        ids_L, blank = ids_L[:-1], int(ids_L[-1])
        log_p_FK, num_samples = emissions(emitter, pieces(), columns_K)
        duration_s = num_samples / emitter.sample_rate if duration_s is None else duration_s
        if frames_needed(ids_L) > len(log_p_FK):
            raise AlignmentError(
                "text too long for its audio",
                f"text {text[:60]!r} needs {frames_needed(ids_L)} frames, the audio of {duration_s:.2f} s has "
                f"{len(log_p_FK)}; leave it out, or check that they belong together",
            )
        path = ctc_viterbi(log_p_FK[None], np.array([len(log_p_FK)]), ids_L[None], np.array([len(ids_L)]), blank)
        first_W, last_W = _word_frames(path, spelling.word_L, spelled_W)
        score_W = np.zeros(len(words))
        score_W[spelled_W] = _mean_probability(log_p_FK, path, ids_L, blank, first_W, last_W)
        times_W2 = self._times(words, spelled_W, first_W, last_W, duration_s)
        return tuple(
            AlignedWord(text=word, start_s=float(start), end_s=float(end), score=float(score))
            for word, (start, end), score in zip(words, times_W2, score_W)
        )

    def _times(
        self, words: Sequence[str], spelled_W: np.ndarray, first_W: np.ndarray, last_W: np.ndarray, duration_s: float
    ) -> np.ndarray:
        """Start and end of every word in seconds, `[W, 2]`; `first_W` and `last_W` are those of the spelled words."""
        frame_s = self.emitter.frame_samples / self.emitter.sample_rate
        found_W2 = np.stack([first_W * frame_s + self.shift.start_s, (last_W + 1) * frame_s + self.shift.end_s], 1)
        times_W2 = np.full((len(words), 2), np.nan)
        times_W2[spelled_W] = in_order(found_W2, duration_s)
        return interpolated(times_W2, np.array([len(word) for word in words]), duration_s)


def num_interpolated(words: Sequence[AlignedWord]) -> int:
    """Words of an alignment whose times were not heard but lie between their neighbours."""
    return sum(word.score == 0.0 for word in words)


def words_to_align(text: str) -> list[str]:
    """Whitespace-separated words with their punctuation; a sign that stands alone joins a neighbour."""
    words: list[str] = []
    lead = ""  # signs before the first word
    for piece in text.split():
        if spoken_form(piece):
            words.append(lead + piece)
            lead = ""
        elif words:
            words[-1] += " " + piece
        else:
            lead += piece + " "
    return words


def emissions(emitter: Emitter, pieces: Iterable[np.ndarray], columns_K: np.ndarray) -> tuple[np.ndarray, int]:
    """Consecutive pieces of audio -> `log_p_FK` float32 and the number of samples; a window of audio is held at a time.

    Windows overlap, and only their middles are kept: what is kept of an inner window has heard `context_frames` on both sides,
    so a window's edge is nowhere near.
    """
    hop, context = emitter.frame_samples, emitter.context_frames
    columns = torch.from_numpy(columns_K)
    kept = [np.empty((0, len(columns_K)), dtype=np.float32)]
    num_samples = 0
    for start, samples_S, last in _windows(pieces, emitter.window_frames * hop, 2 * context * hop):
        log_p_FV = emitter.emit(torch.from_numpy(samples_S))
        log_p_FK = log_p_FV[:, columns.to(log_p_FV.device)].cpu().numpy()
        kept.append(log_p_FK[context if start else 0 : None if last else len(log_p_FK) - context])
        num_samples = start + len(samples_S)
    return np.concatenate(kept), num_samples


def _windows(pieces: Iterable[np.ndarray], length: int, overlap: int) -> Iterator[tuple[int, np.ndarray, bool]]:
    """(first sample's number, at most `length` samples, whether they are the last); every two neighbours share `overlap`."""
    waiting_S, start = np.empty(0, dtype=np.float32), 0
    for piece_S in pieces:
        waiting_S = np.concatenate([waiting_S, piece_S])
        while len(waiting_S) > length:
            yield start, waiting_S[:length], False
            waiting_S = waiting_S[length - overlap :]
            start += length - overlap
    if len(waiting_S):
        yield start, waiting_S, True


def in_order(times_W2: np.ndarray, duration_s: float) -> np.ndarray:
    """Times after a shift, made possible again: neighbours that overlap meet half-way, nothing lies outside the audio."""
    times_W2 = np.clip(times_W2, 0.0, duration_s)
    end_W, start_W = times_W2[:-1, 1], times_W2[1:, 0]  # views: of each word but the last, of each but the first
    middle_W = (end_W + start_W) / 2
    overlap_W = end_W > start_W
    end_W[overlap_W] = start_W[overlap_W] = middle_W[overlap_W]
    times_W2[:, 1] = np.maximum(times_W2[:, 1], times_W2[:, 0])
    return times_W2


def interpolated(times_W2: np.ndarray, weight_W: np.ndarray, duration_s: float) -> np.ndarray:
    """Words without times (NaN) share the gap between their neighbours in proportion to `weight_W`."""
    times_W2 = times_W2.copy()
    known_W = ~np.isnan(times_W2[:, 0])
    edge_W = np.diff(known_W.astype(int), prepend=1, append=1)
    for a, b in zip(np.flatnonzero(edge_W == -1), np.flatnonzero(edge_W == 1)):
        low = times_W2[a - 1, 1] if a else 0.0
        high = times_W2[b, 0] if b < len(times_W2) else duration_s
        share_W = np.concatenate([[0.0], np.cumsum(weight_W[a:b])]) / weight_W[a:b].sum()
        cuts_W = low + (high - low) * share_W
        times_W2[a:b, 0], times_W2[a:b, 1] = cuts_W[:-1], cuts_W[1:]
    return times_W2


def _word_frames(path: CTCPaths, word_L: np.ndarray, spelled_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First frame of the first and last frame of the last character of each spelled word."""
    first_L, last_L = target_frames(path.target_BF[0], len(word_L))
    inside_L = word_L != SEPARATOR
    _, index_W, count_W = np.unique(word_L[inside_L], return_index=True, return_counts=True)
    return first_L[inside_L][index_W], last_L[inside_L][index_W + count_W - 1]


def _mean_probability(
    log_p_FK: np.ndarray, path: CTCPaths, ids_L: np.ndarray, blank: int, first_W: np.ndarray, last_W: np.ndarray
) -> np.ndarray:
    """Mean probability of the path's id (blanks included) over the frames of each word."""
    ids_F = np.append(ids_L, blank)[path.target_BF[0]]  # BLANK is -1, the last
    p_F = np.exp(np.take_along_axis(log_p_FK, ids_F[:, None], 1)[:, 0].astype(np.float64))
    total_F = np.concatenate([[0.0], np.cumsum(p_F)])
    return np.clip((total_F[last_W + 1] - total_F[first_W]) / (last_W + 1 - first_W), 0.0, 1.0)


WINDOW_S, CONTEXT_S = 30.0, 2.0  # of a Wav2Vec2 window, both sides' context included


class Wav2Vec2Emitter:
    """A Hugging Face `Wav2Vec2ForCTC` folder: config.json, vocab.json, preprocessor_config.json and safetensors weights.

    Letters are looked up as they are, then in upper case. An apostrophe that the alphabet lacks is left out. Each window is
    normalised by itself when the preprocessor says so, as transformers does with a clip.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", window_s: float = WINDOW_S) -> None:
        """Raises FileNotFoundError or ValueError naming the file that is missing or of another kind."""
        from transformers import Wav2Vec2ForCTC

        folder = Path(folder)
        config = _read_json(folder / "config.json")
        if config.get("model_type") != "wav2vec2":
            raise ValueError(f"{folder}/config.json: model_type={config.get('model_type')!r} must be 'wav2vec2'")
        if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            raise FileNotFoundError(
                f"{folder}/model.safetensors is missing; weights are read from safetensors only, convert the checkpoint"
            )
        preprocessor = _read_json(folder / "preprocessor_config.json")
        self.vocab = _read_vocab(folder / "vocab.json")
        self.model = (
            Wav2Vec2ForCTC.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval().to(device)
        )
        self.device = device
        self.sample_rate = int(preprocessor.get("sampling_rate", audio.SAMPLE_RATE))
        self.normalize = bool(preprocessor.get("do_normalize", True))
        self.blank = int(config["pad_token_id"])
        self.delimiter = _delimiter(folder, self.vocab)
        self.frame_samples = int(np.prod(config["conv_stride"]))
        self.window_frames = max(1, round(window_s * self.sample_rate / self.frame_samples))
        self.context_frames = min(
            round(CONTEXT_S * self.sample_rate / self.frame_samples), (self.window_frames - 1) // 2
        )
        self.margin = (_receptive_field(config["conv_kernel"], config["conv_stride"]) - self.frame_samples) // 2

    @torch.no_grad()
    def emit(self, wav_S: torch.Tensor) -> torch.Tensor:
        """One window -> `log_p_FV`. Zeros on both sides centre each frame's receptive field on its own samples."""
        wav_S = wav_S.to(self.device)
        if self.normalize:
            wav_S = (wav_S - wav_S.mean()) / (wav_S.var(correction=0) + 1e-7).sqrt()
        num_samples = -(-len(wav_S) // self.frame_samples) * self.frame_samples
        wav_S = torch.nn.functional.pad(wav_S, (self.margin, num_samples - len(wav_S) + self.margin))
        return self.model(wav_S[None]).logits[0].float().log_softmax(-1)

    def spell(self, words: Sequence[str]) -> Spelling:
        """Characters of each word, a word delimiter between words where the alphabet has one."""
        ids: list[int] = []
        owner: list[int] = []
        for i, word in enumerate(words):
            letters = self._letters(word)
            if letters and ids and self.delimiter is not None:
                ids.append(self.delimiter)
                owner.append(SEPARATOR)
            ids += letters
            owner += [i] * len(letters)
        return Spelling(ids_L=np.array(ids, dtype=np.int64), word_L=np.array(owner, dtype=np.int64))

    def _letters(self, word: str) -> list[int]:
        """Ids of one word's characters; none when one of them is not in the alphabet."""
        ids: list[int] = []
        for letter in word:
            found = self.vocab.get(letter, self.vocab.get(letter.upper()))
            if letter == " ":
                found = self.delimiter
            if found is not None:
                ids.append(found)
            elif letter not in " '":
                return []
        return ids


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a Wav2Vec2ForCTC folder has it, check the path")
    return json.loads(path.read_text())


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    if not all(isinstance(index, int) for index in vocab.values()):
        raise ValueError(
            f"{path} holds one alphabet per language; keep that of the language you align, as plain letter: id"
        )
    return vocab


def _delimiter(folder: Path, vocab: dict[str, int]) -> int | None:
    """Id between words: "|" unless the tokenizer's own config names another; None when the alphabet has none."""
    path = folder / "tokenizer_config.json"
    name = _read_json(path).get("word_delimiter_token", "|") if path.is_file() else "|"
    return vocab.get(name)


def _receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples under one frame of stacked convolutions."""
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides):
        field += (kernel - 1) * step
        step *= stride
    return field
