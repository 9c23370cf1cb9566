"""The two ASR heads that teach the codebook to carry words: CTC, and a small Whisper-style attention decoder.

They also read speech tokens back as text. Parameter names are those of transformers' WhisperDecoder.
Trap: both use one id beyond the text tokenizer's, `num_text`: blank for CTC, start and end of text for a decoder
without a prompt. Whisper's own decoder has a prompt of several ids and its end inside its vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.tokenizer.encoder import Attention, initialise_blocks
from speechquilt.types import IGNORE


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
        self, x_BLD: torch.Tensor, causal_LL: torch.Tensor, memory_BTD: torch.Tensor, seen_BT: torch.Tensor
    ) -> torch.Tensor:
        x_BLD = x_BLD + self.self_attn(self.self_attn_layer_norm(x_BLD), causal_LL)[0]
        y_BLD = self.encoder_attn_layer_norm(x_BLD)
        x_BLD = x_BLD + self.encoder_attn(y_BLD, seen_BT[:, None, None], memory_BFD=memory_BTD)[0]
        return x_BLD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BLD))))


class TextDecoder(nn.Module):
    """Text ids given encoder states; learned positions, output tied to the embedding.

    Texts begin with the ids of `prompt` and stop with `end`; without them both are the one id beyond the vocabulary.
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
        prompt: tuple[int, ...] = (),
        end: int | None = None,
    ) -> None:
        super().__init__()
        self.prompt = prompt or (num_text,)
        self.end = num_text if end is None else end
        self.max_ids = max_ids
        self.embed_tokens = nn.Embedding(num_text if prompt else num_text + 1, width)
        self.embed_positions = nn.Embedding(max_ids + len(self.prompt), width)
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)
        nn.init.normal_(self.embed_positions.weight, std=0.01)
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, ffn_width) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(width)
        initialise_blocks(self.layers)

    def forward(self, ids_BL: torch.Tensor, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor) -> torch.Tensor:
        """`ids_BL` begin with `prompt` -> logits of the next id `[B, L, V + 1]`."""
        length, num_tokens = ids_BL.shape[1], states_BTD.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=ids_BL.device).tril()
        seen_BT = torch.arange(num_tokens, device=ids_BL.device) < num_tokens_B[:, None]
        x_BLD = self.embed_tokens(ids_BL) + self.embed_positions.weight[:length]
        for layer in self.layers:
            x_BLD = layer(x_BLD, causal_LL, states_BTD, seen_BT)
        return F.linear(self.layer_norm(x_BLD), self.embed_tokens.weight)

    def loss(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, text_BL: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row's text and its end, summed over ids, `[B]`."""
        if text_BL.shape[1] > self.max_ids:
            raise ValueError(
                f"a text of {text_BL.shape[1]} ids exceeds max_text_ids={self.max_ids}; split it or raise it"
            )
        length_B = (text_BL != IGNORE).sum(1)
        input_BL = torch.cat([self._prompts(text_BL), text_BL.masked_fill(text_BL == IGNORE, self.end)], 1)
        target_BL = F.pad(text_BL, (len(self.prompt) - 1, 1), value=IGNORE)
        last_B = len(self.prompt) - 1 + length_B
        target_BL[torch.arange(len(text_BL), device=text_BL.device), last_B] = self.end
        logits_BLV = self(input_BL, states_BTD, num_tokens_B).float()
        return F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, ignore_index=IGNORE, reduction="none").sum(1)

    def greedy(self, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor) -> list[list[int]]:
        """Most likely next id until the end, at most two ids per speech token of the row, and `max_ids`."""
        ids_BL, start = self._prompts(num_tokens_B), len(self.prompt)
        limit_B = (2 * num_tokens_B).clamp(max=self.max_ids)
        done_B = limit_B == 0
        while not done_B.all():
            next_B = self(ids_BL, states_BTD, num_tokens_B)[:, -1].argmax(-1).masked_fill(done_B, self.end)
            ids_BL = torch.cat([ids_BL, next_B[:, None]], 1)
            done_B |= (next_B == self.end) | (ids_BL.shape[1] - start >= limit_B)
        rows = [row.tolist() for row in ids_BL[:, start:]]
        return [row[: row.index(self.end)] if self.end in row else row for row in rows]

    def _prompts(self, like_B: torch.Tensor) -> torch.Tensor:
        """The prompt, once per row of `like_B`, on its device."""
        return torch.tensor(self.prompt, device=like_B.device).expand(len(like_B), -1)
