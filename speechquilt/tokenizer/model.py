"""Waveform -> speech tokens: log-mel, half an ASR encoder, pooling, one VQ codebook; and tokens -> text by the other half.

Place in the pipeline: layer 2; implements `protocols.SpeechTokenizer`. Trained by `train/objectives/asr.py`, read by every
stage that needs tokens, and by the evals, which let it read generated tokens back as text.
Trap: audio is cut into windows of `max_frames` (30 s), each tokenised as if it were alone (spec 1, 2.6). So position
tables never end, and a token depends on its own window only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from speechquilt import config as configs
from speechquilt.audio import LogMel
from speechquilt.nn.quantize import VectorQuantizerConfig
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import streaming
from speechquilt.tokenizer.encoder import EncoderConfig, KeyValues
from speechquilt.tokenizer.heads import CTCHead, TextDecoder

FRAME_SAMPLES = 320  # one encoder frame: 20 ms at 16 kHz
READ_BACK_ROWS = 64  # token sequences per forward pass when reading back
_ENCODING_KEYS = (  # the config fields that the tokens depend on
    "num_mels", "width", "num_heads", "ffn_width", "layers_below", "pooling", "block_frames", "max_frames", "causal",
    "codebook_size",
)  # fmt: skip
_POOL = "quantizer.pool_ND"  # warm-up vectors: part of a training checkpoint, not of a finished tokenizer

Head = Literal["ctc", "attention"]


@dataclass(frozen=True, kw_only=True)
class SpeechTokenizerConfig:
    """Encoder, codebook and heads (`EncoderConfig` and `VectorQuantizerConfig` explain theirs).

    `text_vocab_size`: ids of the text tokenizer; `max_text_ids`: longest text of the attention decoder; `ctc_weight`: share
    of CTC in the ASR loss, the rest is attention; `read_back_head`: the head that turns tokens into text.
    """

    text_vocab_size: int
    num_mels: int = 80
    width: int = 192
    num_heads: int = 4
    ffn_width: int = 768
    layers_below: int = 3
    layers_above: int = 3
    decoder_layers: int = 2
    pooling: int = 4
    block_frames: int = 100
    max_frames: int = 1500
    causal: bool = True
    codebook_size: int = 512
    vq_decay: float = 0.99
    vq_warmup_updates: int = 0
    vq_restart_interval: int = 100
    vq_restart_threshold: float = 0.01
    commitment_weight: float = 2.5
    ctc_weight: float = 0.5
    max_text_ids: int = 448
    read_back_head: Head = "ctc"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ctc_weight <= 1.0:
            raise ValueError(f"ctc_weight={self.ctc_weight} must lie in 0..1; the attention decoder gets the rest")
        if self.text_vocab_size < 1:
            raise ValueError(f"text_vocab_size={self.text_vocab_size} must be the size of the text tokenizer")
        self.encoder()

    def encoder(self) -> EncoderConfig:
        return EncoderConfig(
            num_mels=self.num_mels,
            width=self.width,
            num_heads=self.num_heads,
            ffn_width=self.ffn_width,
            layers_below=self.layers_below,
            layers_above=self.layers_above,
            pooling=self.pooling,
            block_frames=self.block_frames,
            max_frames=self.max_frames,
            causal=self.causal,
        )

    def quantizer(self) -> VectorQuantizerConfig:
        return VectorQuantizerConfig(
            codebook_size=self.codebook_size,
            width=self.width,
            decay=self.vq_decay,
            restart_interval=self.vq_restart_interval,
            restart_threshold=self.vq_restart_threshold,
            warmup_updates=self.vq_warmup_updates,
            seed=self.seed,
        )

    def build(self, text_tokenizer: TextTokenizer | None = None) -> "SpeechTokenizer":
        """A fresh model with weights drawn from `seed`; `text_tokenizer` is what its heads speak."""
        with torch.random.fork_rng(devices=[]):  # module initialisation knows only the global generator
            torch.manual_seed(self.seed)
            return SpeechTokenizer(self, text_tokenizer)


@dataclass(frozen=True)
class Encoded:
    """`states_BTD`: what the ASR heads read; `ids_BT`: codes, None while the VQ warm-up bypasses the codebook;
    `commitment_BT`: squared error to the code, mean over channels, 0 in the padding; `num_tokens_B`: valid tokens;
    `ctc_B`, `attention_B`: -log p of each row's text by either head, None when no text was given."""

    states_BTD: torch.Tensor
    ids_BT: torch.Tensor | None
    commitment_BT: torch.Tensor
    num_tokens_B: torch.Tensor
    ctc_B: torch.Tensor | None = None
    attention_B: torch.Tensor | None = None


class SpeechTokenizer(nn.Module):
    """16 kHz audio <-> ids; `forward` is the training pass through bottleneck and upper layers, `encode` stops at ids."""

    sample_rate = 16000

    def __init__(self, config: SpeechTokenizerConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        if text_tokenizer is not None and text_tokenizer.size != config.text_vocab_size:
            raise ValueError(
                f"text_vocab_size={config.text_vocab_size}, but the text tokenizer has {text_tokenizer.size} ids; "
                "they must be equal"
            )
        self.config = config
        self.text_tokenizer = text_tokenizer
        self.token_samples = FRAME_SAMPLES * config.pooling
        self.window_samples = FRAME_SAMPLES * config.max_frames
        self.vocab_size = config.codebook_size
        self.frame_rate = self.sample_rate / self.token_samples
        self.lookahead_s = (config.block_frames - config.pooling) * FRAME_SAMPLES / self.sample_rate
        if not config.causal:
            self.lookahead_s = (self.window_samples - self.token_samples) / self.sample_rate
        self.log_mel = LogMel(num_mels=config.num_mels, mode="stream")
        self.encoder = config.encoder().build()
        self.quantizer = config.quantizer().build()
        self.ctc = CTCHead(config.width, config.text_vocab_size)
        self.decoder = TextDecoder(
            config.width,
            config.num_heads,
            config.ffn_width,
            config.decoder_layers,
            config.text_vocab_size,
            config.max_text_ids,
        )

    @property
    def fingerprint(self) -> str:
        """12 hex digits of everything that the tokens depend on: sizes, weights below the bottleneck, codebook."""
        fields = asdict(self.config)
        digest = hashlib.sha256(configs.fingerprint({k: fields[k] for k in _ENCODING_KEYS}).encode())
        above = tuple(f"layers.{i}." for i in range(self.config.layers_below, len(self.encoder.layers)))
        skip = (*above, "embed_positions2", "layer_norm")
        weights = {k: v for k, v in self.encoder.state_dict().items() if not k.startswith(skip)}
        weights["codebook"] = self.quantizer.codebook_KD
        for name in sorted(weights):
            digest.update(name.encode())
            digest.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def forward(
        self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor, text_BL: torch.Tensor | None = None
    ) -> Encoded:
        """Audio -> final encoder states through the bottleneck, and the ASR losses of `text_BL` (padded with IGNORE).

        In training mode this updates the codebook, once.
        """
        pooled_BTD, num_tokens_B = self._pooled(wav_BS, num_samples_B)
        valid_BT = torch.arange(pooled_BTD.shape[1], device=pooled_BTD.device) < num_tokens_B[:, None]
        quantized = self.quantizer(pooled_BTD, valid_BT)
        states_BTD = self._upper(quantized.values_BTD, num_tokens_B)
        return Encoded(
            states_BTD=states_BTD,
            ids_BT=quantized.ids_BT,
            commitment_BT=quantized.commitment_BT,
            num_tokens_B=num_tokens_B,
            ctc_B=None if text_BL is None else self.ctc.loss(states_BTD, num_tokens_B, text_BL),
            attention_B=None if text_BL is None else self.decoder.loss(states_BTD, num_tokens_B, text_BL),
        )

    @torch.no_grad()
    def encode(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded 16 kHz audio -> `ids_BT` (int64, 0 in the padding), `num_tokens_B` = ceil(samples / 1280).

        A row gives the same ids alone and in any batch; what lies beyond its `num_samples_B` is never read. Raises
        ValueError on empty or non-finite audio, and before the codebook exists.
        """
        pooled_BTD, num_tokens_B = self._pooled(wav_BS, num_samples_B)
        ids_BT = self.quantizer.encode(pooled_BTD)
        padding_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) >= num_tokens_B[:, None]
        return ids_BT.masked_fill(padding_BT, 0), num_tokens_B

    def init_state(self) -> streaming.StreamState:
        return streaming.StreamState()

    @torch.no_grad()
    def step(
        self, wav_S: torch.Tensor, state: streaming.StreamState, *, final: bool = False
    ) -> tuple[torch.Tensor, streaming.StreamState]:
        """Any number of new samples -> ids `ids_T` that no later sample can change, and the new state.

        The ids of all steps together are those of `encode` on the whole audio. `final` flushes the last, incomplete
        block; the returned state is then a fresh one.
        """
        return streaming.step(self, wav_S, state, final)

    @torch.no_grad()
    def read_back(self, tokens: Sequence[np.ndarray], head: Head | None = None) -> list[str]:
        """Speech tokens -> text by an ASR head (default: the config's `read_back_head`). An empty sequence reads ""."""
        texts: list[str] = []
        for first in range(0, len(tokens), READ_BACK_ROWS):
            rows = [torch.as_tensor(np.asarray(t), dtype=torch.long) for t in tokens[first : first + READ_BACK_ROWS]]
            num_tokens_B = torch.tensor([len(r) for r in rows]).to(self._device)
            if not int(num_tokens_B.max()):
                texts += [""] * len(rows)
                continue
            ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
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

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and text_tokenizer.json (when there is a text tokenizer)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        configs.save(self.config, folder / "config.json")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if k != _POOL}
        save_file(weights, folder / "model.safetensors")
        if self.text_tokenizer is not None:
            self.text_tokenizer.save(folder / "text_tokenizer.json")

    @classmethod
    def load(cls, folder: Path) -> "SpeechTokenizer":
        """What `save` wrote, in eval mode. Raises FileNotFoundError or ValueError naming the file that is wrong."""
        folder = Path(folder)
        config = configs.load(SpeechTokenizerConfig, folder / "config.json")
        path = folder / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; a tokenizer folder has one, train the tokenizer again")
        text_path = folder / "text_tokenizer.json"
        model = config.build(TextTokenizer.load(text_path) if text_path.is_file() else None)
        weights = load_file(path)
        wrong = (set(weights) ^ set(model.state_dict())) - {_POOL}
        if wrong:
            raise ValueError(f"{path} does not fit its config.json: {', '.join(sorted(wrong)[:5])} missing or unknown")
        model.load_state_dict(weights, strict=False)
        return model.eval()

    @property
    def _device(self) -> torch.device:
        return self.quantizer.codebook_KD.device

    def frames(
        self, wav_BS: torch.Tensor, num_frames_B: torch.Tensor, skip: int = 0, past: list[KeyValues] | None = None
    ) -> tuple[torch.Tensor, list[KeyValues]]:
        """Samples of one window (a whole number of tokens, after `skip` frames of context) -> `encoder.lower`'s result."""
        x_BFD = self.encoder.stem(self.log_mel(wav_BS))[:, skip:]
        return self.encoder.lower(x_BFD, num_frames_B, past)

    def _pooled(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio -> vectors before the quantiser, window by window, and the number of valid ones."""
        wav_BS = checked_audio(wav_BS, num_samples_B)
        num_tokens_B = -(-num_samples_B // self.token_samples)
        wav_BS = wav_BS[:, : int(num_samples_B.max())]
        wav_BS = F.pad(wav_BS, (0, -wav_BS.shape[1] % self.token_samples))
        parts = []
        for start in range(0, wav_BS.shape[1], self.window_samples):
            window_BS = wav_BS[:, start : start + self.window_samples]
            num_frames_B = (num_tokens_B * self.config.pooling - start // FRAME_SAMPLES).clamp(min=0)
            parts.append(self.frames(window_BS, num_frames_B)[0])
        return torch.cat(parts, 1), num_tokens_B

    def _upper(self, q_BTD: torch.Tensor, num_tokens_B: torch.Tensor) -> torch.Tensor:
        window = self.config.max_frames // self.config.pooling
        parts = [
            self.encoder.upper(part_BTD, (num_tokens_B - i * window).clamp(min=0))
            for i, part_BTD in enumerate(q_BTD.split(window, 1))
        ]
        return torch.cat(parts, 1)

    def _read(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, head: Head | None) -> list[str]:
        if self.text_tokenizer is None:
            raise ValueError(
                "this tokenizer has no text_tokenizer.json, so its ASR heads cannot spell; build it with one"
            )
        chosen = self.ctc if (head or self.config.read_back_head) == "ctc" else self.decoder
        return [self.text_tokenizer.decode(ids) for ids in chosen.greedy(states_BTD, num_tokens_B)]


def checked_audio(wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> torch.Tensor:
    """`wav_BS` with zeros beyond each row's samples. Raises ValueError on empty, too short or non-finite audio."""
    if wav_BS.ndim != 2 or not wav_BS.is_floating_point():
        raise ValueError(
            f"wav_BS is {wav_BS.dtype} of shape {tuple(wav_BS.shape)}; expected float rows of mono samples"
        )
    if int(num_samples_B.min()) < 1:
        raise ValueError("empty audio: num_samples_B has a row without samples; drop it before tokenizing")
    if int(num_samples_B.max()) > wav_BS.shape[1]:
        raise ValueError(f"num_samples_B asks for {int(num_samples_B.max())} samples, wav_BS holds {wav_BS.shape[1]}")
    padding_BS = torch.arange(wav_BS.shape[1], device=wav_BS.device) >= num_samples_B[:, None]
    wav_BS = wav_BS.masked_fill(padding_BS, 0.0)
    if not torch.isfinite(wav_BS).all():
        raise ValueError("audio has NaN or infinite samples; repair or drop the recording")
    return wav_BS
