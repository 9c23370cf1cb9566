"""Spoken texts as the documents of a mixture: neighbours of one session joined, then interleaved anew in every epoch."""

import re
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from speechquilt.data.interleaving.parallel import ParallelSource, PieceLengths, SpokenTexts, TextEncode
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.types import SILENCE, AlignedTokens


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Which spoken texts of one session become one document (spec latent-speech-text, 3.2).

    Single utterances of 10 to 20 s give only two or three blocks of text and speech each, so longer documents help.
    """

    max_tokens: int = 0
    """Most speech tokens of a joined document; the paper's 120 s are 1500 at 12.5 Hz. 0 joins nothing."""
    session: str = r"(.+)[-_/]\d+"
    """Regular expression whose first group is the session in an id: neighbours with the same one are joined. By
    default an id without its last number, so "speaker-chapter" of "speaker-chapter-0001". Ids that do not match stay
    alone.
    """

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"join.max_tokens={self.max_tokens} must be at least 0, where 0 joins nothing")
        try:
            groups = re.compile(self.session).groups
        except re.error as error:
            raise ValueError(f"join.session={self.session!r} is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"join.session={self.session!r} needs a group, the part of an id that names its session")


class JoinedTexts:
    """Spoken texts in which neighbours of one session are one, as many as `max_tokens` allows; a longer one stays whole.

    They are read once to learn their ids and lengths. Session ends are never crossed, and the order stays.
    """

    def __init__(self, spoken: SpokenTexts, config: JoinConfig) -> None:
        self.spoken = spoken
        self._starts: list[int] = []  # of each document, and the end of the last
        session, tokens = None, 0
        for index in range(len(spoken)):
            item = spoken[index]
            found = re.fullmatch(config.session, item.id)
            name = found[1] if found else None
            tokens += len(item.ids_T)
            if name is None or name != session or tokens > config.max_tokens:
                self._starts.append(index)
                session, tokens = name, len(item.ids_T)
        self._starts.append(len(spoken))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> AlignedTokens:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        parts = [self.spoken[n] for n in range(self._starts[index], self._starts[index + 1])]
        first_word = accumulate((len(part.words) for part in parts[:-1]), initial=0)
        word_T = [np.where(p.word_T == SILENCE, SILENCE, p.word_T + first) for p, first in zip(parts, first_word)]
        return AlignedTokens(
            id=parts[0].id if len(parts) == 1 else f"{parts[0].id}+{len(parts) - 1}",
            text=" ".join(part.text for part in parts),
            words=tuple(word for part in parts for word in part.words),
            ids_T=np.concatenate([part.ids_T for part in parts]),
            word_T=np.concatenate(word_T).astype(np.int32),
        )


def as_documents(
    shards: ShardFolder | SpokenFolder,
    text_encode: TextEncode,
    *,
    seed: int = 0,
    source: str = "parallel",
    piece_lengths: PieceLengths | None = None,
    join: JoinConfig = JoinConfig(),
) -> ShardFolder | ParallelSource:
    """What a mixture reads from a folder: documents as they are, spoken texts (joined) interleaved anew in every epoch."""
    if isinstance(shards, ShardFolder):
        return shards
    spoken = JoinedTexts(shards, join) if join.max_tokens else shards
    return ParallelSource(spoken, text_encode, seed=seed, source=source, piece_lengths=piece_lengths)
