"""What a language model's run is asked for (`LMRecipe`), and what its folder remembers beside the weights (`LMRun`)."""

from dataclasses import dataclass, field
from typing import Literal

from speechquilt.data.feed.mixture import MixtureConfig
from speechquilt.data.feed.pack import PackConfig
from speechquilt.data.feed.spoken_documents import JoinConfig
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.stages.budget import Budget
from speechquilt.train.trainer import TrainConfig
from speechquilt.vocab import Vocab

RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class LMRecipe:
    """How one speech-text language model is trained.

    The number of steps is train.steps, or follows from a budget in units or tokens, which then replaces it.
    """

    model: PlainLMConfig | LatentLMConfig
    """Kind and sizes of the model; its vocabulary comes from the shards."""
    patcher: PatcherConfig
    """How speech tokens are grouped into patches."""
    weights: dict[str, float]
    """Share of the tokens for each source, by name; sources without shards are left out."""
    pack: PackConfig
    """The size of a batch."""
    train: TrainConfig
    """The run: its steps, learning rate, devices and checkpoints."""
    budget: Budget = "steps"
    """How the length of the run is given: in "steps" (train.steps), or as budget_amount of "units" (equal compute for
    every patcher) or of "tokens" (equal data).
    """
    budget_amount: int = 0
    """Units or tokens to train for, over all ranks; tokens are base speech tokens, text and special tokens. 0 with a
    budget in steps.
    """
    speech_pieces: int | None = None
    """Read speech as pieces of a BPE of this size, learned from the shards; None reads the speech tokens as they are.
    """
    warm_start: str = ""
    """Hugging Face folder, or hub:OWNER/NAME, of a Llama, Qwen2 or Qwen3 to start from; "" starts from random weights. A plain model
    takes its sizes from there, a latent one those of its global transformer.
    """
    bos_token: str = ""
    """Token of the warm start's base that stands for the beginning of a document, as its tokenizer.json writes it, such
    as <|endoftext|> of SmolLM2; "" is the bos_token_id of its config.json.
    """
    eos_token: str = ""
    """Token of the warm start's base that stands for the end of a document; "" is the eos_token_id of its config.json.
    """
    codebook_rows: bool = False
    """Learn the speech rows of embedding and head as a map of the speech tokenizer's codebook plus a free part: for short
    runs, in which most codes are rare (docs/decisions/0022-codebook-rows.md). Needs a tokenizer whose codes are vectors.
    """
    continue_from: str = ""
    """Run folder of a language model of ours whose weights this run starts with: more steps or other data, with a
    schedule and an optimizer of its own. Its vocabulary, kind and sizes must be those of this run. "" continues none.
    """
    opening_marker: Literal["auto", "on", "off"] = "auto"
    """Whether text that opens a document has its marker. "on": as in the papers. "off": as a text model knows it.
    "auto": as in what the run starts from, so off for a warm start and on for random weights.
    """
    max_epochs: dict[str, float] = field(default_factory=dict)
    """How often each source may be gone through before it leaves the mixture; a source that is not named has no
    bound.
    """
    join: JoinConfig = JoinConfig()
    """Which recordings of one session are interleaved as one document."""
    held_out: float = 0.0
    """Share of each source's documents that are never trained on and measured instead, 0 to 1; the same ones in every
    run, by a hash of their ids. 0 trains on all.
    """
    evaluate_every: int = 0
    """Steps between measurements of the held-out loss of each source, written to held_out.json; each costs a
    checkpoint. 0 measures at the end only.
    """

    def __post_init__(self) -> None:
        MixtureConfig(weights=self.weights, max_epochs=self.max_epochs)  # refuses bad values before any work
        if self.warm_start and self.continue_from:
            raise ValueError(
                f"continue_from={self.continue_from!r} with warm_start={self.warm_start!r}: a run has one start; leave one "
                "of them empty"
            )
        if self.codebook_rows and (self.speech_pieces is not None or self.train.shard != "none"):
            raise ValueError(
                f"codebook_rows=true with speech_pieces={self.speech_pieces} and train.shard={self.train.shard!r}: pieces have no "
                "code of their own, and shards of a table no whole map; leave one out"
            )
        if not 0 <= self.held_out < 1 or self.evaluate_every < 0:
            raise ValueError(
                f"held_out={self.held_out} must be a share from 0 to below 1, evaluate_every={self.evaluate_every} at least 0"
            )
        if self.evaluate_every and not self.held_out:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} has nothing to measure: no document is held out; "
                "set held_out, for example 0.01"
            )
        for key in ("bos_token", "eos_token"):
            if getattr(self, key) and not self.warm_start:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} names a token of a base; set warm_start, or leave it out"
                )
        if self.warm_start and isinstance(self.model, LatentLMConfig) and not self.model.bypass:
            raise ValueError(
                f"warm_start={self.warm_start!r} with text_path={self.model.text_path!r}: a text model can take the place of "
                "the global transformer only when text bypasses the local modules; set model.text_path=bypass"
            )
        if self.budget == "steps" and self.budget_amount:
            raise ValueError(
                f"budget_amount={self.budget_amount} has no meaning with budget='steps'; "
                "set train.steps, or budget='units' or 'tokens'"
            )
        if self.budget != "steps" and self.budget_amount < 1:
            raise ValueError(
                f"budget_amount={self.budget_amount} must be at least 1 with budget={self.budget!r}; "
                f"say how many {self.budget} to train for"
            )
        if self.speech_pieces is not None and self.patcher.kind in ("aligned", "mixed", "curriculum"):
            raise ValueError(
                f"speech_pieces={self.speech_pieces} with patcher.kind={self.patcher.kind!r}: BPE pieces do not end where "
                "words end; use patcher.kind='none' or 'static'"
            )


@dataclass(frozen=True, kw_only=True)
class LMRun:
    """`run.json`: what is needed to use a trained model beside its weights."""

    num_text: int
    """Ids of the text tokenizer."""
    num_speech: int
    """Ids of the speech tokenizer."""
    text_fingerprint: str
    """Of the text tokenizer."""
    speech_fingerprint: str
    """Of the speech tokenizer that made the shards."""
    patcher: PatcherConfig
    """How speech tokens were grouped into patches."""
    speech_pieces: int | None = None
    """Number of BPE pieces that the model reads instead of speech tokens; None when it reads the tokens."""
    bpe_fingerprint: str = ""
    """Of the BPE that makes the pieces; "" without one."""
    tokenizer: str = ""
    """The speech tokenizer's folder, seen from the run's; "" when it was not noted (`tokenizer_folder`)."""
    opening_marker: bool = True
    """Whether text that opens a document has its marker."""
    continued_from: str = ""
    """The run whose weights this one began with, seen from its folder; "" when it began with none."""
    tokens_per_row: int = 0
    """Most tokens of a row in training: how far the model can look back. 0: not noted, in runs of before."""
    units_per_row: int = 0
    """Most units (patches of speech, and single tokens) of a row in training. 0: not noted."""

    @property
    def vocab(self) -> Vocab:
        """The model's ids."""
        return Vocab(
            num_text=self.num_text,
            num_speech=self.speech_pieces or self.num_speech,
            opening_marker=self.opening_marker,
        )
