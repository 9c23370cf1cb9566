"""The Whisper-shaped encoder around the bottleneck: stem and lower layers, pooling, then upper layers (spec 1,
2.1-2.2).

Parameter names are those of transformers' WhisperEncoder.
Trap: position tables end after `max_frames`. Both halves take ONE window of at most that many frames; longer audio must
be cut into windows by `windows.WindowRule`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Per convolution, times He's standard deviation: what leaves the stem is about five times as large as the positions.
STEM_GAIN = 3.0
KeyValues = tuple[torch.Tensor, torch.Tensor]  # keys and values of the frames so far, each [B, H, F, K]


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Sizes of a Whisper-shaped audio encoder around a bottleneck. Its frames are 20 ms long."""

    num_mels: int = 80
    """Mel bins of the input. Whisper has 80; large-v3 has 128."""
    width: int = 192
    """Numbers per frame between the layers (the model's width); a multiple of 2 * `num_heads`."""
    num_heads: int = 4
    """Attention heads of each layer."""
    ffn_width: int = 768
    """Width inside the feed-forward part of each layer, usually 4 times `width`."""
    layers_below: int = 3
    """Layers before the bottleneck: these make the tokens."""
    layers_above: int = 3
    """Layers after it: these only help to read the tokens in training. 0: tokens alone, without the final norm."""
    pooling: int = 4
    """Frames averaged into one token: 1, 2, 4 and 8 give 50, 25, 12.5 and 6.25 tokens per second. More: fewer tokens,
    each of which must say more."""
    block_frames: int = 100
    """Length of an attention block, in frames of 20 ms: a frame attends to the past and to the rest of its block. A
    streaming tokenizer waits for whole blocks, so shorter answers sooner and hears less ahead. A multiple of `pooling`;
    without `causal` nothing attends by blocks."""
    max_frames: int = 1500
    """Longest window, in frames of 20 ms (1500 is 30 s); a multiple of `pooling`. Longer audio is cut into windows."""
    causal: bool = True
    """True: convolutions and attention hear nothing beyond the block, so tokens can stream. False: plain Whisper, which
    hears the whole window."""
    positions_out: bool = False
    """Take the position table, which the lower half added to its input, out of the pooled vectors again, so that no code
    is spent on where a sound stands. False, as in the paper: the vectors keep it."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * num_heads={2 * self.num_heads}")
        for key in ("block_frames", "max_frames"):
            if getattr(self, key) < self.pooling or getattr(self, key) % self.pooling:
                raise ValueError(f"{key}={getattr(self, key)} must be a positive multiple of pooling={self.pooling}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(EncoderSizes):
    """An encoder alone, without codebook."""

    def build(self) -> "AudioEncoder":
        return AudioEncoder(self)


class Attention(nn.Module):
    """Whisper's multi-head attention: biases on all projections but the key's."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        memory_BFD: torch.Tensor | None = None,
        past: KeyValues | None = None,
        known: KeyValues | None = None,
    ) -> tuple[torch.Tensor, KeyValues]:
        """Attend to `memory_BFD` (default: to `x_BTD` itself, after the `past`), or to what an earlier call returned
        for that memory, `known`. `mask` is True where attention may go."""
        source = x_BTD if memory_BFD is None else memory_BFD
        k, v = known or (self._heads(self.k_proj(source)), self._heads(self.v_proj(source)))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(self._heads(self.q_proj(x_BTD)), k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2)), (k, v)

    def _heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Pre-norm block: attention, then a GELU feed-forward layer."""

    def __init__(self, width: int, num_heads: int, ffn_width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self, x_BFD: torch.Tensor, mask: torch.Tensor | None, past: KeyValues | None = None
    ) -> tuple[torch.Tensor, KeyValues]:
        y_BFD, past = self.self_attn(self.self_attn_layer_norm(x_BFD), mask, past=past)
        x_BFD = x_BFD + y_BFD
        return x_BFD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BFD)))), past


class AudioEncoder(nn.Module):
    """`lower` makes pooled vectors out of log-mel frames, `upper` continues from (quantised) vectors."""

    def __init__(self, config: EncoderSizes) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv1d(config.num_mels, width, kernel_size=3)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2)
        table_FD = sinusoids(config.max_frames, width)
        self.embed_positions = nn.Embedding.from_pretrained(table_FD, freeze=True)
        num_layers = config.layers_below + config.layers_above
        layers = [EncoderLayer(width, config.num_heads, config.ffn_width) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        # Trainable, and added after quantisation: the quantiser never sees it.
        max_tokens = config.max_frames // config.pooling
        self.embed_positions2 = nn.Embedding.from_pretrained(table_FD[:max_tokens].clone(), freeze=False)
        self.layer_norm = nn.LayerNorm(width) if config.layers_above else nn.Identity()
        self._initialise(layers)

    def _initialise(self, layers: list[EncoderLayer]) -> None:
        """For training from scratch; PyTorch's own start takes twice the steps to the same CTC loss.

        Its convolutions give values of 0.04 beside position sines of 0.7, so the first layers receive positions rather
        than sound. Here the stem is louder, and equal maps to queries and keys make a frame attend at first to frames
        that are like itself, its neighbours.
        """
        initialise_blocks(self.layers)
        with torch.no_grad():
            for conv in (self.conv1, self.conv2):
                conv.weight.normal_(std=STEM_GAIN * (2 / conv.weight[0].numel()) ** 0.5)
                if conv.bias is not None:
                    conv.bias.zero_()
            for layer in layers:
                layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)

    def stem(self, mel_BMF: torch.Tensor) -> torch.Tensor:
        """Log-mel, 100 frames/s -> `[B, ceil(F / 2), D]`, 50 frames/s, before positions."""
        pad = (2, 0) if self.config.causal else (1, 1)
        x = F.gelu(self.conv1(F.pad(mel_BMF, pad)))
        return F.gelu(self.conv2(F.pad(x, pad))).transpose(1, 2)

    def lower(
        self, x_BFD: torch.Tensor, num_frames_B: torch.Tensor, past: list[KeyValues] | None = None, later: int = 0
    ) -> tuple[torch.Tensor, list[KeyValues]]:
        """Stem output of one window -> pooled vectors `[B, ceil(F / pooling), D]` and each layer's keys and values.

        `num_frames_B` counts valid frames of the window including the past. With `past`, `x_BFD` continues the window
        at a block start; the result is what one pass over the whole window gives for these frames. `later`: tokens of the
        window by which the positions run ahead, as if silence that nobody hears came first.
        """
        start = past[0][0].shape[2] if past else 0
        stop = start + x_BFD.shape[1]
        ahead = later * self.config.pooling
        position_FD = self.embed_positions.weight[start + ahead : stop + ahead]
        x_BFD = x_BFD + position_FD
        mask = self._mask(start, stop, num_frames_B, self.config.block_frames)
        new_past = []
        for i in range(self.config.layers_below):
            x_BFD, key_values = self.layers[i](x_BFD, mask, past[i] if past else None)
            new_past.append(key_values)
        pooled_BTD = self._pool(x_BFD)
        if self.config.positions_out:  # the residual stream still holds them
            whole = stop + -stop % self.config.pooling  # a last token of fewer frames gets a whole one's positions back
            pooled_BTD = pooled_BTD - self._pool(self.embed_positions.weight[None, start + ahead : whole + ahead])
        return pooled_BTD, new_past

    def upper(self, q_BTD: torch.Tensor, num_tokens_B: torch.Tensor, later: int = 0) -> torch.Tensor:
        """Quantised vectors of one window -> final encoder states `[B, T, D]`; `later` as for `lower`."""
        num_tokens = q_BTD.shape[1]
        x_BTD = q_BTD + self.embed_positions2.weight[later : later + num_tokens]
        mask = self._mask(0, num_tokens, num_tokens_B, self.config.block_frames // self.config.pooling)
        for layer in self.layers[self.config.layers_below :]:
            x_BTD, _ = layer(x_BTD, mask)
        return self.layer_norm(x_BTD)

    def _pool(self, x_BFD: torch.Tensor) -> torch.Tensor:
        k = self.config.pooling
        x_BFD = F.pad(x_BFD, (0, 0, 0, -x_BFD.shape[1] % k))
        return x_BFD.unflatten(1, (-1, k)).mean(2)

    def _mask(self, start: int, stop: int, valid_B: torch.Tensor, block: int) -> torch.Tensor | None:
        """`[B, 1, stop - start, stop]`, True where a query may look; None when it may look everywhere."""
        one_block = start // block == (stop - 1) // block
        if (one_block or not self.config.causal) and bool((valid_B >= stop).all()):
            return None
        query_Q = torch.arange(start, stop, device=valid_B.device)
        key_F = torch.arange(stop, device=valid_B.device)
        allowed_BQF = (key_F < valid_B[:, None])[:, None]
        if self.config.causal:
            seen_QF = (key_F <= query_Q[:, None]) | (key_F // block == query_Q[:, None] // block)
            allowed_BQF = allowed_BQF & seen_QF
        # A row whose audio ended before this window attends to itself: the result is not used, but a softmax over
        # nothing would be NaN.
        allowed_BQF = allowed_BQF | ((key_F == query_Q[:, None]) & (valid_B == 0)[:, None, None])
        return allowed_BQF[:, None]


def initialise_blocks(layers: nn.ModuleList) -> None:
    """Unit gain in every projection; what is added to the residual stream shrinks with the number of additions."""
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                gain = (2 * len(layers)) ** -0.5 if name.endswith(("out_proj", "fc2")) else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Whisper's position table `[length, width]`: sines in the first half of the channels, cosines in the second."""
    step = math.log(10000) / (width // 2 - 1)
    angle_FC = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))
    return torch.cat([angle_FC.sin(), angle_FC.cos()], 1)
