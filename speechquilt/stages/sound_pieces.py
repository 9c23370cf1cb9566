"""Recordings with their speech tokens -> batches of pieces of both, for training a speech decoder's flow.

A piece begins where a block of the token encoder does and is at most `tokens` long; its mel frames are those that the
whole recording has there. Batch n is a pure function of (seed, n).
Trap: a token hears what came before it, so tokens are made of whole recordings and cut then, never the other way round.

Axis letters: B rows, T tokens, M mel bands, F mel frames, S samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from speechquilt import audio
from speechquilt.data.feed.ahead import Ahead
from speechquilt.data.shards.spoken import open_shards
from speechquilt.data.sources.speech_folder import folder_rows, read_row
from speechquilt.data.sources.speech_rows import root_of
from speechquilt.decoder.flow import FlowConfig
from speechquilt.decoder.mel import Mel
from speechquilt.protocols import SpeechTokenizer
from speechquilt.train.objectives.velocity import FlowBatch
from speechquilt.types import AlignedTokens, Document, Reject, Row, Utterance, Waveform

MAX_BROKEN = 0.1  # share of the recordings that may turn out to be broken when they are decoded
EDGE_HOPS = 4  # hops of sound around a piece that its first and last windows reach into, rounded up


@dataclass(frozen=True, kw_only=True)
class PiecesConfig:
    """How recordings are cut."""

    rows: int = 16
    """Pieces in a batch, over all ranks."""
    tokens: int = 40
    """Longest piece, in tokens: a block and the prompt before it, as in a stream. A multiple of the encoder's block_tokens."""
    truncated: float = 0.5
    """Share of the pieces that end after some whole blocks, each number as likely, 0 to 1: what a stream begins with."""
    threads: int = 0
    """Threads that decode ahead of the training step; 0 decodes in between. The batches are the same."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise ValueError(f"rows={self.rows} and tokens={self.tokens} must be at least 1")
        if not 0.0 <= self.truncated <= 1.0:
            raise ValueError(f"truncated={self.truncated} must lie in 0..1, it is a share")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must be at least 0")


@dataclass(frozen=True)
class TokenSound:
    """Recordings by number: `tokens[i]`, all speech ids of one, and `sound(i)`, what they were made of, at any rate.

    `sound` may be called from several threads, and raises ValueError or OSError for a recording that cannot be decoded.
    """

    names: Sequence[str]
    tokens: Sequence[np.ndarray]
    sound: Callable[[int], Waveform]

    def only(self, wanted: Sequence[int]) -> "TokenSound":
        """These recordings, in this order."""
        return TokenSound(
            [self.names[i] for i in wanted], [self.tokens[i] for i in wanted], lambda i: self.sound(wanted[i])
        )


def in_memory(utterances: Sequence[Utterance], tokens: Sequence[np.ndarray]) -> TokenSound:
    """Utterances with what a tokenizer said of each."""
    return TokenSound([u.id for u in utterances], tokens, lambda i: utterances[i].audio)


def on_disk(speech: Path, shards: Sequence[Path], tokenizer: SpeechTokenizer) -> TokenSound:
    """Recordings of a folder or table, with their tokens from the `speech` or `parallel` shards that tokenize made of it.

    Ids stay in memory, four bytes a token. Raises FileNotFoundError or ValueError when either cannot be read, when the
    tokens are of another tokenizer, or when they have no recording in common.
    """
    said: dict[str, np.ndarray] = {}
    for path in shards:
        folder = open_shards(path)
        if folder.info.speech_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{path} holds tokens of tokenizer {folder.info.speech_fingerprint}, not of {tokenizer.fingerprint}; give the "
                "tokenizer that made them"
            )
        for item in folder.in_order():
            ids_T = _speech_ids(item)
            if ids_T is not None:
                said[item.id] = ids_T
    rows: list[Row] = [row for row in folder_rows(speech) if row["id"] in said]
    if not rows:
        raise ValueError(
            f"no recording of {speech} is in {', '.join(map(str, shards))}; give the folder that was tokenized, and its "
            "shards of kind speech or parallel"
        )
    root = root_of(speech)

    def sound(i: int) -> Waveform:
        read = read_row(root, rows[i], need_text=False)
        if isinstance(read, Reject):
            raise ValueError(f"{read.reason}: {read.detail}")
        return read.audio

    return TokenSound([row["id"] for row in rows], [said[row["id"]] for row in rows], sound)


def _speech_ids(item: Document | AlignedTokens) -> np.ndarray | None:
    """All speech of one recording; None for a document that holds text too."""
    if isinstance(item, AlignedTokens):
        return item.ids_T
    segment, *others = item.segments
    return None if others or segment.modality != "speech" else segment.ids_T


@dataclass(frozen=True)
class _Piece:
    """`first`: place of its first token in recording `row`."""

    row: int
    first: int
    num_tokens: int


class PieceLoader:
    """A `protocols.Loader` of `FlowBatch`. Long recordings give more pieces, about one for each of their `tokens`.

    `rejects` lists recordings that turned out to be broken; others take their place. Raises ValueError when a piece is no whole number of
    blocks, when an id is not of the codebook, and from `next_batch` when more than `MAX_BROKEN` of the recordings were broken.
    """

    def __init__(
        self,
        speech: TokenSound,
        config: PiecesConfig,
        flow: FlowConfig,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.block = flow.encoder.block_tokens
        if config.tokens % self.block:
            raise ValueError(f"tokens={config.tokens} must be a multiple of the encoder's block_tokens={self.block}")
        if config.rows % world_size:
            raise ValueError(f"rows={config.rows} must be a multiple of the {world_size} processes")
        self.speech, self.config, self.flow, self.seed = speech, config, flow, seed
        self.rank, self.world_size = rank, world_size
        self.mel: Mel = flow.mel.build()
        self._num_tokens_N = np.array([len(ids_T) for ids_T in speech.tokens])
        self._check(speech)
        self._until_N = np.cumsum(np.maximum(1, self._num_tokens_N // config.tokens) * (self._num_tokens_N > 0))
        self._number = 0
        self._broken: dict[int, Reject] = {}
        self._ahead = Ahead(self._load, config.threads, "pieces")

    @property
    def rejects(self) -> list[Reject]:
        return [reject for _, reject in sorted(self._broken.copy().items())]

    @property
    def seconds(self) -> float:
        """Speech in all recordings."""
        return float(self._num_tokens_N.sum()) / self.flow.token_rate

    def next_batch(self) -> FlowBatch:
        self._number += 1
        return self._ahead.get(self._number - 1)

    def state_dict(self) -> dict:
        return {"number": self._number}

    def load_state_dict(self, state: dict) -> None:
        self._ahead.forget()
        self._number = state["number"]

    def close(self) -> None:
        """End the threads; batches that wait are dropped."""
        self._ahead.close()

    def _check(self, speech: TokenSound) -> None:
        size = self.flow.codebook_size
        if not self._num_tokens_N.any():
            raise ValueError("no recording has a speech token; tokenize recordings that hold sound")
        for name, ids_T in zip(speech.names, speech.tokens):
            if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < size:
                raise ValueError(
                    f"{name} has speech ids {int(ids_T.min())} to {int(ids_T.max())}; they must lie in 0..{size - 1} "
                    f"(codebook_size={size}), so these tokens are of another tokenizer"
                )

    def _load(self, number: int) -> FlowBatch:
        """This rank's share of the rows; every row is drawn from a generator of its own."""
        rows = range(self.rank, self.config.rows, self.world_size)
        return self._batch([self._row(np.random.default_rng([self.seed, number, row])) for row in rows])

    def _row(self, draw: np.random.Generator) -> tuple[_Piece, torch.Tensor]:
        """A piece and its mel; another one for a recording that cannot be decoded."""
        while True:
            piece = self._drawn(draw)
            if piece.row in self._broken:
                continue
            try:
                return piece, self._mel_of(piece)
            except (ValueError, OSError) as error:
                self._note(piece.row, error)

    def _drawn(self, draw: np.random.Generator) -> _Piece:
        longest, block = self.config.tokens, self.block
        row = int(np.searchsorted(self._until_N, draw.integers(self._until_N[-1]), side="right"))
        num_tokens = int(self._num_tokens_N[row])
        first = block * int(draw.integers(-(-max(0, num_tokens - longest) // block) + 1))
        if draw.random() < self.config.truncated:
            longest = block * int(draw.integers(1, longest // block + 1))
        return _Piece(row, first, min(longest, num_tokens - first))

    def _mel_of(self, piece: _Piece) -> torch.Tensor:
        """`[M, F]`, those frames of the whole recording's mel. Raises ValueError when the sound is not as long as its
        tokens."""
        time, mel = self.flow.time, self.flow.mel
        wav_S = audio.resample(audio.check(self.speech.sound(piece.row)), mel.sample_rate).samples_S
        sound_s, tokens_s = len(wav_S) / mel.sample_rate, self._num_tokens_N[piece.row] / self.flow.token_rate
        if abs(tokens_s - sound_s) > 2 / self.flow.token_rate:
            raise ValueError(
                f"its sound does not fit its tokens: {sound_s:.2f} s and {tokens_s:.2f} s; tokenize the recordings as they are now"
            )
        first, stop = time.num_frames(piece.first), time.num_frames(piece.first + piece.num_tokens)
        stop = min(stop, len(wav_S) // mel.hop)
        if stop <= first:
            raise ValueError("there is no whole mel frame in it")
        begin = max(0, first - EDGE_HOPS)
        cut_S = wav_S[begin * mel.hop : (stop + EDGE_HOPS) * mel.hop]
        with torch.no_grad():
            return self.mel(torch.from_numpy(cut_S)[None])[0, :, first - begin : stop - begin]

    def _note(self, row: int, error: Exception) -> None:
        self._broken[row] = Reject(id=self.speech.names[row], reason=str(error).split(":")[0], detail=str(error))
        if len(self._broken) > MAX_BROKEN * len(self.speech.names):
            raise ValueError(
                f"{len(self._broken)} of {len(self.speech.names)} recordings cannot be used, more than {MAX_BROKEN:.0%}: "
                f"{self._broken[row].id}: {error}; mend the recordings, or tokenize them again"
            ) from error

    def _batch(self, rows: list[tuple[_Piece, torch.Tensor]]) -> FlowBatch:
        """Padded to the same shape in every batch, as compiled models want it."""
        longest, time = self.config.tokens, self.flow.time
        most_frames = time.num_frames(longest) + 1  # as many wherever the piece begins
        ids = [torch.from_numpy(self._ids(piece)) for piece, _ in rows]
        mels = [mel_MF.mT for _, mel_MF in rows]
        ids.append(torch.zeros(longest, dtype=torch.long))
        mels.append(torch.zeros(most_frames, self.flow.mel.num_mels))
        return FlowBatch(
            ids_BT=pad_sequence(ids, batch_first=True)[:-1],
            num_tokens_B=torch.tensor([piece.num_tokens for piece, _ in rows]),
            mel_BMF=pad_sequence(mels, batch_first=True)[:-1].mT.contiguous(),
            num_frames_B=torch.tensor([len(mel_FM) for mel_FM in mels[:-1]]),
            first_B=torch.tensor([piece.first for piece, _ in rows]),
        )

    def _ids(self, piece: _Piece) -> np.ndarray:
        ids_T = self.speech.tokens[piece.row][piece.first : piece.first + piece.num_tokens]
        return np.asarray(ids_T, dtype=np.int64)


def mel_statistics(loader: PieceLoader, batches: int) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel over all bands, from so many of the loader's batches, which are read again
    afterwards."""
    state, parts = loader.state_dict(), []
    for _ in range(batches):
        batch = loader.next_batch()
        parts += [mel_MF[:, :n].flatten() for mel_MF, n in zip(batch.mel_BMF, batch.num_frames_B.tolist())]
    loader.load_state_dict(state)
    values_N = torch.cat(parts)
    return float(values_N.mean()), float(values_N.std())


def with_statistics(flow: FlowConfig, loader: PieceLoader, batches: int = 8) -> FlowConfig:
    """The same decoder, whose mel is scaled by what this speech has."""
    mean, std = mel_statistics(loader, batches)
    return replace(flow, mel_mean=mean, mel_std=std)
