"""The two ASR heads that teach the codebook to carry words: CTC, and a small Whisper-style attention decoder.

They also read speech tokens back as text. Parameter names are those of transformers' WhisperDecoder. A decoder layer
keeps keys and values between ids, those of the audio from the first id on: `TextDecoder.step` is `forward` in parts.
Trap: both use one id beyond the text tokenizer's, `num_text`: blank for CTC, start and end of text for a decoder
without a prompt. Whisper's own decoder has a prompt of several ids and its end inside its vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.nn.batching import valid_places
from speechquilt.tokenizer.encoder import Attention, KeyValues, initialise_blocks
from speechquilt.tokenizer.loops import repeated_ids
from speechquilt.types import IGNORE

# A text that is read may have so many ids per second of audio, and a few more: what a decoder that does not stop costs.
# Fast speech has 5 ids a second of Whisper's, 13 of a text tokenizer with 300 ids.
MAX_IDS_PER_S = 16.0
SPARE_IDS = 8


class CTCHead(nn.Module):
    """One linear layer to the text ids and the blank."""

    def __init__(self, width: int, num_text: int) -> None:
        super().__init__()
        self.blank = num_text
        self.proj = nn.Linear(width, num_text + 1)

    def loss(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, text_BL: torch.Tensor) -> torch.Tensor:
        """-log p(text) of each row, `[B]`; 0 for a text that does not fit into its frames."""
        length_B = (text_BL != IGNORE).sum(1)
        log_p_TBV = self.proj(states_BTD).float().log_softmax(-1).transpose(0, 1)
        targets_BL = text_BL.clamp(min=0)
        return F.ctc_loss(
            log_p_TBV, targets_BL, num_tokens_B, length_B, blank=self.blank, reduction="none", zero_infinity=True
        )

    def greedy(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor) -> list[list[int]]:
        """Best path: repeats merged, blanks dropped."""
        best_BT = self.proj(states_BTD).argmax(-1)
        texts = []
        for best_T, n in zip(best_BT, num_tokens_B.tolist()):
            merged = torch.unique_consecutive(best_T[:n]).tolist()
            texts.append([i for i in merged if i != self.blank])
        return texts


@dataclass(frozen=True)
class LayerKeys:
    """What one decoder layer keeps between ids: keys and values of the text so far, `[B, H, L, K]`, and of the audio,
    `[B, H, T, K]`."""

    text: KeyValues
    audio: KeyValues

    def rows(self, kept: list[int]) -> "LayerKeys":
        (text_k, text_v), (audio_k, audio_v) = self.text, self.audio
        return LayerKeys((text_k[kept], text_v[kept]), (audio_k[kept], audio_v[kept]))


class DecoderLayer(nn.Module):
    """Pre-norm block: attention to the text so far, to the audio, then a GELU feed-forward layer."""

    def __init__(self, width: int, num_heads: int, ffn_width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = Attention(width, num_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BLD: torch.Tensor,
        mask_LL: torch.Tensor | None,
        audio_BTD: torch.Tensor,
        heard_BT: torch.Tensor,
        past: LayerKeys | None = None,
    ) -> tuple[torch.Tensor, LayerKeys]:
        """New ids' vectors, after the `past` if there is one; `heard_BT` is True where there is audio."""
        y_BLD = self.self_attn_layer_norm(x_BLD)
        y_BLD, text = self.self_attn(y_BLD, mask_LL, past=past.text if past else None)
        x_BLD = x_BLD + y_BLD
        y_BLD, audio = self.encoder_attn(
            self.encoder_attn_layer_norm(x_BLD),
            heard_BT[:, None, None],
            memory_BFD=audio_BTD,
            known=past.audio if past else None,
        )
        x_BLD = x_BLD + y_BLD
        return x_BLD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BLD)))), LayerKeys(text, audio)


@dataclass(frozen=True)
class DecoderState:
    """Where a decoder stands that is given a few ids at a time.

    `audio_BTD`: the encoder's states; `heard_BT`: True where there is audio; `num_ids`: ids so far, of every row;
    `layers`: what each layer keeps, empty before the first id.
    """

    audio_BTD: torch.Tensor
    heard_BT: torch.Tensor
    num_ids: int = 0
    layers: tuple[LayerKeys, ...] = ()

    def rows(self, kept: list[int]) -> "DecoderState":
        """The state of these rows alone."""
        layers = tuple(layer.rows(kept) for layer in self.layers)
        return DecoderState(self.audio_BTD[kept], self.heard_BT[kept], self.num_ids, layers)


class TextDecoder(nn.Module):
    """Text ids given encoder states; learned positions, output tied to the embedding.

    Texts begin with the ids of `prompt` and stop with `end`; without them both are the one id beyond the vocabulary.
    `token_s`: seconds of audio that one encoder state stands for.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_width: int,
        num_layers: int,
        num_text: int,
        max_ids: int,
        *,
        token_s: float,
        prompt: tuple[int, ...] = (),
        end: int | None = None,
    ) -> None:
        super().__init__()
        self.prompt = prompt or (num_text,)
        self.end = num_text if end is None else end
        self.max_ids = max_ids
        self.token_s = token_s
        self.embed_tokens = nn.Embedding(num_text if prompt else num_text + 1, width)
        self.embed_positions = nn.Embedding(max_ids + len(self.prompt), width)
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)
        nn.init.normal_(self.embed_positions.weight, std=0.01)
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, ffn_width) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(width)
        initialise_blocks(self.layers)

    def forward(
        self, ids_BL: torch.Tensor, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, first: int = 0
    ) -> torch.Tensor:
        """`ids_BL` begin with `prompt` -> logits of the id after each, from number `first` on, `[B, L - first, V]`."""
        state = self.init_state(states_BTD, num_tokens_B)
        x_BLD, mask_LL = self._embedded(ids_BL, 0)
        for layer in self.layers:
            x_BLD, _ = layer(x_BLD, mask_LL, state.audio_BTD, state.heard_BT)
        return self._logits(x_BLD[:, first:])

    def init_state(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor) -> DecoderState:
        """Before the first id; `num_tokens_B` counts the valid states, at least one in every row."""
        return DecoderState(states_BTD, valid_places(num_tokens_B, states_BTD.shape[1]))

    def step(self, ids_BL: torch.Tensor, state: DecoderState) -> tuple[torch.Tensor, DecoderState]:
        """New ids -> logits of the id after the last, as `forward` on all ids so far gives them, `[B, V]`."""
        x_BLD, mask_LL = self._embedded(ids_BL, state.num_ids)
        layers = []
        for layer, past in zip(self.layers, state.layers or [None] * len(self.layers)):
            x_BLD, past = layer(x_BLD, mask_LL, state.audio_BTD, state.heard_BT, past)
            layers.append(past)
        num_ids = state.num_ids + ids_BL.shape[1]
        return self._logits(x_BLD[:, -1]), replace(state, num_ids=num_ids, layers=tuple(layers))

    def loss(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, text_BL: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row's text and its end, summed over ids, `[B]`."""
        if text_BL.shape[1] > self.max_ids:
            raise ValueError(
                f"a text of {text_BL.shape[1]} ids exceeds max_text_ids={self.max_ids}; split it or raise it"
            )
        length_B = (text_BL != IGNORE).sum(1)
        input_BL = torch.cat(
            [self._prompts(len(text_BL), text_BL.device), text_BL.masked_fill(text_BL == IGNORE, self.end)], 1
        )
        target_BL = F.pad(text_BL, (0, 1), value=IGNORE)
        target_BL[torch.arange(len(text_BL), device=text_BL.device), length_B] = self.end
        logits_BLV = self(input_BL, states_BTD, num_tokens_B, first=len(self.prompt) - 1).float()
        return F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, ignore_index=IGNORE, reduction="none").sum(1)

    def greedy(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor) -> list[list[int]]:
        """Most likely next id until the end, until a row repeats itself (`loops`), or up to `most_ids`.

        A row that is finished leaves the batch, and one without audio has no text.
        """
        texts: list[list[int]] = [[] for _ in range(len(states_BTD))]
        limits = [self.most_ids(n) for n in num_tokens_B.tolist()]
        rows = [row for row, limit in enumerate(limits) if limit]
        state = self.init_state(states_BTD, num_tokens_B).rows(rows)
        ids_NL = self._prompts(len(rows), states_BTD.device)
        while rows:
            logits_NV, state = self.step(ids_NL, state)
            next_N = logits_NV.argmax(-1)
            writing = []
            for n, (row, i) in enumerate(zip(rows, next_N.tolist())):
                text = texts[row]
                if i != self.end:
                    text.append(i)
                    extra = repeated_ids(text)
                    del text[len(text) - extra :]
                    if not extra and len(text) < limits[row]:
                        writing.append(n)
            if len(writing) < len(rows):
                rows, next_N, state = [rows[n] for n in writing], next_N[writing], state.rows(writing)
            ids_NL = next_N[:, None]
        return texts

    def most_ids(self, num_tokens: int) -> int:
        """The longest text that is read from so many tokens, in ids; none from none."""
        seconds = num_tokens * self.token_s
        return min(self.max_ids, math.ceil(MAX_IDS_PER_S * seconds) + SPARE_IDS) if num_tokens else 0

    def _embedded(self, ids_BL: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors of ids from position `start` on, and where each may look; None: everywhere."""
        stop = start + ids_BL.shape[1]
        x_BLD = self.embed_tokens(ids_BL) + self.embed_positions.weight[start:stop]
        if stop == start + 1:
            return x_BLD, None
        return x_BLD, torch.ones(stop - start, stop, dtype=torch.bool, device=ids_BL.device).tril(start)

    def _logits(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return F.linear(self.layer_norm(x_BLD), self.embed_tokens.weight)

    def _prompts(self, num_rows: int, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.prompt, device=device).expand(num_rows, -1)
