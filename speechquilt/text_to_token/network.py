"""The text-to-token model: a decoder-only Llama that reads text and writes speech tokens.

It is a plain `protocols.LanguageModel` over the shared id space (spec synthetic-interleaved, section 4).
Trap: parameter names are those of `LlamaForCausalLM`, so a saved folder is a standard Hugging Face folder that any
engine can serve. Renaming a module here breaks that. The sequence format is not in those weights but in
`examples.py`; an engine that leaves the cues to sampling instead of forcing them may skip or repeat words.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from speechquilt.config import fingerprint, from_dict, to_dict
from speechquilt.files import write_json
from speechquilt.nn.attention import KVState
from speechquilt.nn.hugging_face import hugging_face_config, read_weights
from speechquilt.nn.llama import LlamaConfig, LlamaStack, init_weights
from speechquilt.span_length import USUAL_RATE
from speechquilt.text import TextTokenizer
from speechquilt.types import Batch
from speechquilt.vocab import Vocab

WEIGHTS, HF_CONFIG, OURS, TEXT = "model.safetensors", "config.json", "text_to_token.json", "text_tokenizer.json"
Cue = Literal["word", "text"]


@dataclass(frozen=True, kw_only=True)
class TextToTokenConfig:
    """The sizes of a text-to-token model."""

    num_text: int
    """Ids of the text tokenizer."""
    num_speech: int
    """Codes of the speech tokenizer."""
    llama: LlamaConfig
    """Sizes of the transformer."""
    cue: Cue = "word"
    """What introduces a stretch of speech in the training data, and so in generation: each "word", or once the whole
    "text" for a model that never saw word times.
    """
    frame_rate: float = USUAL_RATE
    """Speech tokens per second, of the tokenizer that it writes for."""

    def __post_init__(self) -> None:
        if self.cue not in ("word", "text"):
            raise ValueError(f'cue={self.cue!r} must be "word" or "text"')
        for key in ("num_text", "num_speech"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.frame_rate <= 0:
            raise ValueError(f"frame_rate={self.frame_rate} must be positive, in speech tokens per second")
        if self.llama.window is not None:
            raise ValueError(
                f"llama.window={self.llama.window} must be null: LlamaForCausalLM, the format this model is saved in, "
                "has no sliding window"
            )

    @property
    def vocab(self) -> Vocab:
        return Vocab(num_text=self.num_text, num_speech=self.num_speech)

    def build(self, seed: int = 0) -> "TextToTokenLM":
        """A freshly initialised model; the same seed gives the same weights."""
        model = TextToTokenLM(self)
        init_weights(model, torch.Generator().manual_seed(seed))
        return model


class _Body(LlamaStack):
    """The stack with its embedding beside it, named as in `LlamaModel`."""

    def __init__(self, config: TextToTokenConfig) -> None:
        super().__init__(config.llama)
        self.embed_tokens = nn.Embedding(config.vocab.size, config.llama.width)


class TextToTokenLM(nn.Module):
    """Text ids in, logits over the shared vocabulary out."""

    def __init__(self, config: TextToTokenConfig) -> None:
        super().__init__()
        self.config, self.vocab = config, config.vocab
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.llama.width, self.vocab.size, bias=False)

    def forward(self, batch: Batch, at_BT: Tensor | None = None) -> Tensor:
        """-> `logits_BTV`, or `logits_NV` of the positions `at_BT` alone; documents of a row do not see each other."""
        x_BTD = self.model(self.model.embed_tokens(batch.ids_BT), self.model.mask(batch.doc_BT))
        return self.lm_head(x_BTD if at_BT is None else x_BTD[at_BT])

    def init_state(self, num_rows: int, max_tokens: int) -> KVState:
        return self.model.init_state(num_rows, max_tokens)

    def step(self, ids_B: Tensor, opens_B: Tensor, closes_B: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """One token per row -> `logits_BV`. Every token is a unit here, so `opens_B` and `closes_B` say nothing."""
        x_BD, state = self.hidden_step(ids_B, state, torch.ones_like(ids_B, dtype=torch.bool))
        return self.lm_head(x_BD), state

    def hidden_step(self, ids_B: Tensor, state: KVState, active_B: Tensor) -> tuple[Tensor, KVState]:
        """`step` before the head, for active rows only (the others give zeros): `x_BD` and the new state."""
        return self.model.step(self.model.embed_tokens(ids_B), state, active_B)


def save(folder: Path, model: TextToTokenLM, tokenizer: TextTokenizer, speech_fingerprint: str) -> None:
    """Write a Hugging Face Llama folder plus what we need to read it back.

    `speech_fingerprint` is the `SpeechTokenizer.fingerprint` whose tokens the model writes.
    """
    if tokenizer.size != model.config.num_text:
        raise ValueError(
            f"the text tokenizer has {tokenizer.size} ids and the model was made for {model.config.num_text}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, str(folder / WEIGHTS), metadata={"format": "pt"})
    ours = {
        **to_dict(model.config),
        "text_fingerprint": fingerprint(tokenizer.json),
        "speech_fingerprint": speech_fingerprint,
    }
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write_json(folder / HF_CONFIG, hugging_face_config(model.config.llama, model.vocab, dtype=dtype))
    write_json(folder / OURS, ours)
    tokenizer.save(folder / TEXT)


@dataclass(frozen=True, kw_only=True)
class LoadedTextToToken:
    """A model folder in memory."""

    model: TextToTokenLM
    tokenizer: TextTokenizer
    speech_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model folder without its weights, for engines that read those themselves."""

    config: TextToTokenConfig
    tokenizer: TextTokenizer
    speech_fingerprint: str


def load(folder: Path) -> LoadedTextToToken:
    """Read what `save` wrote. Raises FileNotFoundError or ValueError naming the file that is missing or does not fit."""
    described = describe(folder)
    model = TextToTokenLM(described.config)
    try:
        model.load_state_dict(read_weights(Path(folder) / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{Path(folder) / WEIGHTS} does not fit {OURS} beside it: {error}") from error
    return LoadedTextToToken(
        model=model.eval(), tokenizer=described.tokenizer, speech_fingerprint=described.speech_fingerprint
    )


def describe(folder: Path) -> Description:
    """What `load` knows before it reads the weights. Raises like `load`."""
    folder = Path(folder)
    for name in (OURS, WEIGHTS, TEXT):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; {folder} is not a complete text-to-token model folder"
            )
    try:
        ours = json.loads((folder / OURS).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / OURS} is not JSON ({error}); restore it or save the model again") from error
    text_fingerprint, speech_fingerprint = ours.pop("text_fingerprint", ""), ours.pop("speech_fingerprint", "")
    tokenizer = TextTokenizer.load(folder / TEXT)
    if fingerprint(tokenizer.json) != text_fingerprint:
        raise ValueError(
            f"{folder / TEXT} is not the text tokenizer the model was trained with "
            f"({fingerprint(tokenizer.json)}, expected {text_fingerprint}); restore the file"
        )
    return Description(
        config=from_dict(TextToTokenConfig, ours), tokenizer=tokenizer, speech_fingerprint=speech_fingerprint
    )
