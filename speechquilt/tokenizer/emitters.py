"""What a CTC aligner listens with: log-probabilities of text ids per frame, by our encoder.

`CharacterCTC` is an encoder of its own at 50 frames/s; `TokenizerEmitter` is the CTC head that a speech tokenizer was
trained with. That head marks a word by one piece in one 80 ms token, so its times are coarse
(docs/decisions/0013-alignment.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from speechquilt import config
from speechquilt.audio import HOP, SAMPLE_RATE, LogMel
from speechquilt.nn.ctc import SEPARATOR, Spelling
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.encoder import EncoderConfig
from speechquilt.tokenizer.heads import CTCHead
from speechquilt.tokenizer.supervised import SupervisedTokenizer

NUM_BYTES = 256
FRAME_SAMPLES = 2 * HOP  # the stem halves the mel frames: 20 ms


@dataclass(frozen=True, kw_only=True)
class CharacterCTCConfig:
    """An aligner's ear: a small encoder that hears which characters are spoken in every 20 ms."""

    alphabet: str
    """Characters of the training texts, without the space. A word with any other character cannot be aligned."""
    num_mels: int = 80
    """Mel bins of the input."""
    width: int = 128
    """Numbers per frame between the layers (the model's width); a multiple of 2 * `num_heads`."""
    num_heads: int = 4
    """Attention heads of each layer."""
    ffn_width: int = 512
    """Width inside the feed-forward part of each layer."""
    num_layers: int = 3
    """Transformer layers, at least 2."""
    max_frames: int = 400
    """Longest window, in frames of 20 ms (400 is 8 s). Longer audio is cut into windows."""
    context_frames: int = 50
    """Frames of 20 ms at each edge between two windows that are heard but not used. More: better near the edges, more
    compute."""
    seed: int = 0
    """Seed of the first weights."""

    def __post_init__(self) -> None:
        if self.num_layers < 2:
            raise ValueError(f"num_layers={self.num_layers} must be at least 2")
        if not 0 <= 2 * self.context_frames < self.max_frames:
            raise ValueError(
                f"context_frames={self.context_frames} on both sides must leave frames of max_frames={self.max_frames}"
            )

    def encoder(self) -> EncoderConfig:
        return EncoderConfig(
            num_mels=self.num_mels,
            width=self.width,
            num_heads=self.num_heads,
            ffn_width=self.ffn_width,
            layers_below=self.num_layers - 1,
            layers_above=1,
            pooling=1,
            block_frames=self.max_frames,
            max_frames=self.max_frames,
            causal=False,
        )

    def build(self) -> "CharacterCTC":
        """A fresh model with weights drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return CharacterCTC(self)


class CharacterCTC(nn.Module):
    """16 kHz audio -> log-probabilities of UTF-8 bytes, 50 frames/s, full attention inside a window.

    Bytes are the ids of a byte-level `TextTokenizer` without merges, so any language can be trained; a word with a
    character that training never showed cannot be spelled.
    """

    sample_rate = SAMPLE_RATE
    frame_samples = FRAME_SAMPLES

    def __init__(self, config: CharacterCTCConfig) -> None:
        super().__init__()
        self.config = config
        self.window_frames, self.context_frames = config.max_frames, config.context_frames
        self.text_tokenizer = TextTokenizer.train([], NUM_BYTES)
        self.log_mel = LogMel(num_mels=config.num_mels, mode="stream")
        self.encoder = config.encoder().build()
        self.ctc = CTCHead(config.width, self.text_tokenizer.size)
        self.blank = self.ctc.blank

    def forward(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio of at most a window, zeros on the right -> encoder states `[B, F, D]` and the valid frames, ceil(S /
        320)."""
        num_frames_B = -(-num_samples_B // FRAME_SAMPLES)
        wav_BS = nn.functional.pad(wav_BS, (0, -wav_BS.shape[1] % FRAME_SAMPLES))
        if wav_BS.shape[1] > self.window_frames * FRAME_SAMPLES:
            raise ValueError(
                f"{wav_BS.shape[1] // FRAME_SAMPLES} frames exceed max_frames={self.window_frames}; "
                "long audio is aligned through CTCAligner"
            )
        # A frame of silence behind the clip: its last frame then hears the same alone as in a longer batch.
        stem_BFD = self.encoder.stem(self.log_mel(nn.functional.pad(wav_BS, (0, FRAME_SAMPLES))))[:, :-1]
        lower_BFD, _ = self.encoder.lower(stem_BFD, num_frames_B)
        return self.encoder.upper(lower_BFD, num_frames_B), num_frames_B

    @torch.no_grad()
    def emit(self, wav_S: torch.Tensor) -> torch.Tensor:
        """One window of audio -> `log_p_FV`. A clip gives the same numbers as in a padded batch."""
        wav_S = wav_S.to(self.ctc.proj.weight.device)
        states_BFD, _ = self(wav_S[None], torch.tensor([len(wav_S)], device=wav_S.device))
        return self.ctc.proj(states_BFD)[0].float().log_softmax(-1)

    def spell(self, words: Sequence[str]) -> Spelling:
        """Words in spoken form -> their bytes, each word with a separator in front, as in training.

        An apostrophe that the alphabet lacks is left out; any other such character leaves the word unspelled.
        """
        letters = set(self.config.alphabet) | {" "}
        if "'" not in letters:
            words = [word.replace("'", "") for word in words]
        known = [word if set(word) <= letters else "" for word in words]
        return spell_pieces(self.text_tokenizer, known, separated=True)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config.save(self.config, folder / "config.json")
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors"
        )

    @classmethod
    def load(cls, folder: Path) -> "CharacterCTC":
        """What `save` wrote, in eval mode. Raises FileNotFoundError or ValueError naming the file that is wrong."""
        folder = Path(folder)
        model = config.load(CharacterCTCConfig, folder / "config.json").build()
        path = folder / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; an aligner's folder has one, train the aligner again")
        weights = load_file(path)
        wrong = set(weights) ^ set(model.state_dict())
        if wrong:
            raise ValueError(f"{path} does not fit its config.json: {', '.join(sorted(wrong)[:5])} missing or unknown")
        model.load_state_dict(weights)
        return model.eval()


class TokenizerEmitter:
    """The CTC head of a trained speech tokenizer, through its codebook: one frame per speech token."""

    def __init__(self, tokenizer: SupervisedTokenizer) -> None:
        """Raises ValueError for a tokenizer without text tokenizer or CTC head, or in training mode."""
        if tokenizer.text_tokenizer is None:
            raise ValueError(
                "this tokenizer has no text_tokenizer.json, so its CTC head cannot spell; use CharacterCTC"
            )
        if tokenizer.ctc is None:
            raise ValueError("this tokenizer has no CTC head (ctc_weight=0), so it cannot align; use CharacterCTC")
        if tokenizer.training:
            raise ValueError("a tokenizer in training mode would update its codebook; call eval() first")
        self.tokenizer = tokenizer
        self.text_tokenizer = tokenizer.text_tokenizer
        self.sample_rate = tokenizer.sample_rate
        self.frame_samples = tokenizer.token_samples
        self.window_frames = tokenizer.rule.core
        # What is kept of a window has heard as much as its tokens have in `encode`, none where windows are cut hard.
        self.context_frames = min(tokenizer.rule.context, (self.window_frames - 1) // 2)
        self.ctc = tokenizer.ctc
        self.blank = tokenizer.ctc.blank

    @torch.no_grad()
    def emit(self, wav_S: torch.Tensor) -> torch.Tensor:
        """Audio of at most a window -> `log_p_TV`, one row per speech token."""
        wav_S = wav_S.to(self.ctc.proj.weight.device)
        encoded = self.tokenizer(wav_S[None], torch.tensor([len(wav_S)], device=wav_S.device))
        return self.ctc.proj(encoded.states_BTD)[0].float().log_softmax(-1)

    def spell(self, words: Sequence[str]) -> Spelling:
        """Words in spoken form -> their BPE pieces; the space is part of the piece, so nothing stands between words."""
        return spell_pieces(self.text_tokenizer, words, separated=False)


def spell_pieces(text_tokenizer: TextTokenizer, words: Sequence[str], *, separated: bool) -> Spelling:
    """Ids of every word ("" has none). `separated`: the first id of a word is a separator, not part of the word."""
    ids: list[int] = []
    owner: list[int] = []
    for i, word in enumerate(words):
        pieces = text_tokenizer.encode(word) if word else []
        ids += pieces
        owner += [SEPARATOR if separated and k == 0 else i for k in range(len(pieces))]
    return Spelling(ids_L=np.array(ids, dtype=np.int64), word_L=np.array(owner, dtype=np.int64))
