"""The text-to-token model of the real story: what it learns from, its sizes and its run.

It speaks in one voice, and a clear one. Whoever learns from all voices has to guess at the start of every answer who
speaks, and of these voices some are hardly understood by anybody. So its recordings are made once more: as many as it
goes through two or three times, of sentences that other voices say as well.
Trap: fewer than one speech token per piece of text is refused as too short (`span_length.py`), so the pieces of its text
tokenizer may not be as small as letters.
"""

from dataclasses import dataclass, replace

from speechquilt.nn.llama import LlamaConfig
from speechquilt.stages.spoken_corpus import SpokenCorpusConfig
from speechquilt.stages.train_text_to_token import TextToTokenRecipe
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.train.trainer import TrainConfig

TEXT_IDS = (
    512  # two or three pieces a word: unknown words are spelled, and a sentence is not much longer than its speech
)

TEXT_TO_TOKEN = TextToTokenRecipe(
    llama=LlamaConfig(width=256, num_layers=6, num_heads=4, num_kv_heads=4, ffn_width=704),
    data=TextToTokenDataConfig(rows=8, row_tokens=384, spans_per_utterance=1),
    train=TrainConfig(
        steps=1000,
        lr=2e-3,
        warmup_steps=60,
        log_every=20,
        checkpoint_every=100,
        keep_checkpoints=1,
        dtype="bfloat16",  # products are 2.5 times as fast where the CPU has AVX-512 BF16
        num_threads=2,
    ),
    engine=EngineConfig(temperature=0.3),
    codebook_rows=True,
)


@dataclass(frozen=True, kw_only=True)
class SpeakerVoiceConfig:
    """Recordings that the text-to-token model learns from."""

    voice: str = "flite:slt"
    """The voice that it learns to speak in, as `VoiceBankConfig` names it."""
    sentences: int = 12_000
    """Most sentences; 12,000 of the dictionary's are about nine hours."""

    def __post_init__(self) -> None:
        if self.sentences < 1:
            raise ValueError(f"sentences={self.sentences} must be at least 1")

    def corpus(self, all_voices: SpokenCorpusConfig) -> SpokenCorpusConfig:
        """One voice saying sentences of the corpus `all_voices`; what is held out there is held out here."""
        return replace(
            all_voices,
            voices=(self.voice,),
            unseen_voice="",
            passes=1,
            speed_spread=0.0,
            sentences=min(self.sentences, all_voices.sentences or self.sentences),
        )
