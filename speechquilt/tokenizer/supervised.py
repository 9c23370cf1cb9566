"""The speech tokenizer that we train: a `TokenEncoder` and the ASR half above its codebook, which also reads tokens
back.

Trap: the ASR half sees one window at a time too, so without `context_frames` a word cut by the edge of a window is read
in two parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from speechquilt import config
from speechquilt.nn.batching import valid_places
from speechquilt.nn.hugging_face import SINGLE
from speechquilt.nn.quantize import POOL_PER_CODE, VectorQuantizerConfig
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.heads import CTCHead, TextDecoder
from speechquilt.tokenizer.saved_weights import filled, read_folder
from speechquilt.tokenizer.token_encoder import TokenEncoder, TokenEncoderConfig

READ_BACK_ROWS = 64  # token sequences per forward pass when reading back
_POOL = "quantizer.pool_ND"  # warm-up vectors: part of a training checkpoint, not of a finished tokenizer

Head = Literal["ctc", "attention"]


@dataclass(frozen=True, kw_only=True)
class SupervisedTokenizerConfig(TokenEncoderConfig):
    """A speech tokenizer that is trained by speech recognition: encoder, codebook, and the two heads that read text
    from the tokens."""

    text_vocab_size: int
    """Ids of the text tokenizer whose texts the heads learn to write."""
    decoder_layers: int = 2
    """Layers of the attention decoder, the second of the two heads."""
    decoder_prompt: tuple[int, ...] = ()
    """Text ids that begin every text of the attention decoder, as in Whisper. Empty: it has an id of its own for start
    and end."""
    decoder_end: int | None = None
    """Text id that ends every text of the attention decoder; given together with `decoder_prompt`. None: its own id."""
    vq_decay: float = 0.99
    """How much of its past a code keeps at each update of the codebook, between 0 and 1. Nearer to 1: slower and
    steadier."""
    vq_warmup_updates: int = 0
    """Training steps at the start in which the codebook is bypassed while data for a first one, made by k-means, is
    collected. 0: quantise at once, with random codes."""
    vq_restart_interval: int = 100
    """Updates between two searches for codes that are hardly used. Such codes are replaced by vectors of the batch."""
    vq_restart_threshold: float = 0.01
    """A code counts as hardly used below this share of the average code's use: 0.01 is a hundredth of it. 0 replaces
    none."""
    commitment_weight: float = 2.5
    """Weight of the distance between the encoder's vectors and their codes in the loss. Larger: vectors stay nearer to
    the codes, and have less freedom to carry words."""
    text_ids_per_s: float = 3.0
    """Text ids in a second of speech, about; 3 are those of Whisper's text tokenizer in English. A token's distance to
    its code counts as much as the ids of its time, so that `commitment_weight` says the same at every frame rate."""
    ctc_weight: float = 0.5
    """Share of the CTC head in the recognition loss, 0 to 1; the attention decoder has the rest. 0, as in the paper:
    there is no CTC head."""
    max_text_ids: int = 448
    """Longest text that the attention decoder can read or write, in ids of the text tokenizer."""
    read_back_head: Head = "ctc"
    """The head that turns tokens back into text by default: "ctc" is fast, "attention" writes one id after the
    other."""
    seed: int = 0
    """Seed of the first weights and of the codebook's random choices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.ctc_weight <= 1.0:
            raise ValueError(f"ctc_weight={self.ctc_weight} must lie in 0..1; the attention decoder gets the rest")
        if not self.ctc_weight and self.read_back_head == "ctc":
            raise ValueError(
                "read_back_head='ctc' needs a CTC head, and ctc_weight=0 makes none; set it to 'attention'"
            )
        if self.text_ids_per_s <= 0:
            raise ValueError(f"text_ids_per_s={self.text_ids_per_s} must be positive; 3 suits English")
        if self.text_vocab_size < 1:
            raise ValueError(f"text_vocab_size={self.text_vocab_size} must be the size of the text tokenizer")
        if self.layers_above < 1:
            raise ValueError(f"layers_above={self.layers_above} must be at least 1, the layer that the ASR heads read")
        self._check_prompt()

    def _check_prompt(self) -> None:
        ids = (*self.decoder_prompt, *(() if self.decoder_end is None else (self.decoder_end,)))
        together = bool(self.decoder_prompt) == (self.decoder_end is not None)
        if not together or not all(0 <= i < self.text_vocab_size for i in ids):
            raise ValueError(
                f"decoder_prompt={self.decoder_prompt} and decoder_end={self.decoder_end} come together and must be ids "
                f"below text_vocab_size={self.text_vocab_size}; leave both out for a new decoder"
            )

    def tokens_only(self) -> TokenEncoderConfig:
        """The part that makes tokens: nothing above the codebook, no heads."""
        kept = {field.name: getattr(self, field.name) for field in fields(TokenEncoderConfig)}
        return TokenEncoderConfig(**kept | {"layers_above": 0})

    def quantizer(self) -> VectorQuantizerConfig:
        return VectorQuantizerConfig(
            codebook_size=self.codebook_size,
            width=self.width,
            decay=self.vq_decay,
            restart_interval=self.vq_restart_interval,
            restart_threshold=self.vq_restart_threshold,
            warmup_updates=self.vq_warmup_updates,
            metric_width=self.metric_width,
            seed=self.seed,
        )

    def build(self, text_tokenizer: TextTokenizer | None = None) -> "SupervisedTokenizer":
        """A fresh model with weights drawn from `seed`; `text_tokenizer` is what its heads speak."""
        with torch.random.fork_rng(devices=[]):  # module initialisation knows only the global generator
            torch.manual_seed(self.seed)
            return SupervisedTokenizer(self, text_tokenizer)


@dataclass(frozen=True)
class Encoded:
    """Result of a forward pass.

    `states_BTD`: what the ASR heads read; `ids_BT`: codes, None while the VQ warm-up bypasses the codebook;
    `commitment_BT`: squared distance to the code, mean over channels, 0 in the padding; `num_tokens_B`: valid tokens;
    `ctc_B`, `attention_B`: -log p of each row's text by either head, None when no text was given or there is no head.
    """

    states_BTD: torch.Tensor
    ids_BT: torch.Tensor | None
    commitment_BT: torch.Tensor
    num_tokens_B: torch.Tensor
    ctc_B: torch.Tensor | None = None
    attention_B: torch.Tensor | None = None


class SupervisedTokenizer(TokenEncoder):
    """16 kHz audio <-> ids; `forward` is the training pass through bottleneck and upper layers, `encode` stops at
    ids."""

    config: SupervisedTokenizerConfig

    def __init__(self, config: SupervisedTokenizerConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config)
        if text_tokenizer is not None:
            _check_vocabulary(config, text_tokenizer)
        self.text_tokenizer = text_tokenizer
        self.ctc = CTCHead(config.width, config.text_vocab_size) if config.ctc_weight else None
        self.decoder = TextDecoder(
            config.width,
            config.num_heads,
            config.ffn_width,
            config.decoder_layers,
            config.text_vocab_size,
            config.max_text_ids,
            token_s=1 / self.frame_rate,
            prompt=config.decoder_prompt,
            end=config.decoder_end,
        )

    def forward(
        self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor, text_BL: torch.Tensor | None = None, later: int = 0
    ) -> Encoded:
        """Audio -> final encoder states through the bottleneck, and the ASR losses of `text_BL` (padded with IGNORE).

        `later`: tokens of the window that come before the audio, which must then fit into one window with them. In
        training mode this updates the codebook, once.
        """
        pooled_BTD, num_tokens_B = self._pooled(wav_BS, num_samples_B, later)
        valid_BT = valid_places(num_tokens_B, pooled_BTD.shape[1])
        quantized = self.quantizer(pooled_BTD, valid_BT)
        states_BTD = self._upper(quantized.values_BTD, num_tokens_B, later)
        return Encoded(
            states_BTD=states_BTD,
            ids_BT=quantized.ids_BT,
            commitment_BT=quantized.commitment_BT,
            num_tokens_B=num_tokens_B,
            ctc_B=None if text_BL is None or not self.ctc else self.ctc.loss(states_BTD, num_tokens_B, text_BL),
            attention_B=None if text_BL is None else self.decoder.loss(states_BTD, num_tokens_B, text_BL),
        )

    def reading_loss(self, ids_BT: torch.Tensor, num_tokens_B: torch.Tensor, text_BL: torch.Tensor) -> torch.Tensor:
        """-log p `[B]` of each row's text, read by the attention decoder from tokens alone."""
        states_BTD = self._upper(self.quantizer.decode(ids_BT), num_tokens_B)
        return self.decoder.loss(states_BTD, num_tokens_B, text_BL)

    def vectors(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> torch.Tensor:
        """What reaches the bottleneck: the vectors of all tokens of all rows, `[N, D]` in float32, padding left out."""
        pooled_BTD, num_tokens_B = self._pooled(wav_BS, num_samples_B)
        valid_BT = valid_places(num_tokens_B, pooled_BTD.shape[1])
        return pooled_BTD[valid_BT].float()

    @torch.no_grad()
    def read_back(self, tokens: Sequence[np.ndarray], head: Head | None = None) -> list[str]:
        """Speech tokens -> text by an ASR head (default: the config's `read_back_head`). An empty sequence reads ""."""
        texts: list[str] = []
        for first in range(0, len(tokens), READ_BACK_ROWS):
            rows = [torch.tensor(np.asarray(t), dtype=torch.long) for t in tokens[first : first + READ_BACK_ROWS]]
            num_tokens_B = torch.tensor([len(r) for r in rows]).to(self.device)
            if not int(num_tokens_B.max()):
                texts += [""] * len(rows)
                continue
            ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            states_BTD = self._upper(self.quantizer.decode(ids_BT), num_tokens_B)
            texts += self._read(states_BTD, num_tokens_B, head)
        return texts

    @torch.no_grad()
    def transcribe(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor, head: Head | None = None) -> list[str]:
        """Audio -> text by the whole ASR model; during the VQ warm-up the codebook is bypassed. Needs eval mode."""
        if self.training:
            raise ValueError("transcribe in training mode would update the codebook; call eval() first")
        encoded = self(wav_BS, num_samples_B)
        return self._read(encoded.states_BTD, encoded.num_tokens_B, head)

    @torch.no_grad()
    def transcribe_without_codebook(
        self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor, head: Head | None = None
    ) -> list[str]:
        """As `transcribe`, past the codebook: what the same weights hear when nothing is rounded to a code."""
        pooled_BTD, num_tokens_B = self._pooled(wav_BS, num_samples_B)
        return self._read(self._upper(pooled_BTD, num_tokens_B), num_tokens_B, head)

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and text_tokenizer.json (when there is a text tokenizer)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config.save(self.config, folder / "config.json")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if k != _POOL}
        save_file(weights, folder / SINGLE)
        if self.text_tokenizer is not None:
            self.text_tokenizer.save(folder / "text_tokenizer.json")

    @classmethod
    def load(cls, folder: Path) -> "SupervisedTokenizer":
        """What `save` wrote, in eval mode. Raises FileNotFoundError or ValueError naming the file that is wrong."""
        folder = Path(folder)
        saved = config.load(SupervisedTokenizerConfig, folder / "config.json")
        text_path = folder / "text_tokenizer.json"
        text_tokenizer = TextTokenizer.load(text_path) if text_path.is_file() else None
        weights = read_folder(folder)
        rows = POOL_PER_CODE * saved.codebook_size if saved.vq_warmup_updates else 0
        weights[_POOL] = torch.zeros(rows, saved.width)
        return filled(lambda: SupervisedTokenizer(saved, text_tokenizer), weights, folder / SINGLE)

    def _upper(self, q_BTD: torch.Tensor, num_tokens_B: torch.Tensor, later: int = 0) -> torch.Tensor:
        parts = []
        for window in self.rule.windows(q_BTD.shape[1]):
            valid_B = (num_tokens_B - window.start).clamp(min=0)
            states_BTD = self.encoder.upper(q_BTD[:, window.start : window.stop], valid_B, later)
            parts.append(states_BTD[:, window.first - window.start :])
        return torch.cat(parts, 1)

    def _read(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, head: Head | None) -> list[str]:
        if self.text_tokenizer is None:
            raise ValueError(
                "this tokenizer has no text_tokenizer.json, so its ASR heads cannot spell; build it with one"
            )
        chosen = self.ctc if (head or self.config.read_back_head) == "ctc" else self.decoder
        if chosen is None:
            raise ValueError("head='ctc': this tokenizer was trained with ctc_weight=0; read with 'attention'")
        return [self.text_tokenizer.decode(ids) for ids in chosen.greedy(states_BTD, num_tokens_B)]


def _check_vocabulary(config: SupervisedTokenizerConfig, text_tokenizer: TextTokenizer) -> None:
    """Equal sizes; a decoder that comes with its vocabulary (it has a prompt) may have spare rows."""
    fits = text_tokenizer.size == config.text_vocab_size
    if not fits and not (config.decoder_prompt and text_tokenizer.size < config.text_vocab_size):
        raise ValueError(
            f"text_vocab_size={config.text_vocab_size}, but the text tokenizer has {text_tokenizer.size} ids; "
            "they must be equal"
        )
