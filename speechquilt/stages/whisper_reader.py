"""What the Whisper that a tokenizer started from hears of a recording: the floor under every reading of its tokens.

It is transformers' own model with the checkpoint's own decoding rules (ids that it suppresses), greedy, one window (30 s).
Trap: Whisper writes what it hears (digits, abbreviations); `evals.error_rates.plain_words` says how that is compared.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, logging

from speechquilt import audio
from speechquilt.nn.batching import longest_first
from speechquilt.nn.hub import local_folder
from speechquilt.stages.encode import load_text_tokenizer
from speechquilt.types import Utterance

ROWS = 8  # recordings per forward pass; every one costs the encoder 30 s
FRAMES_PER_S = 50  # of the encoder's output
IDS_PER_S = 12  # more are a loop: people say three words a second, of less than two ids each
PROMPT_IDS = 4  # start, language, task, no timestamps


class WhisperReader:
    """`folder`: Hugging Face folder of a Whisper; `language`: of a multilingual one, None for the English-only ones."""

    def __init__(self, folder: Path, language: str | None = None) -> None:
        self._model = WhisperForConditionalGeneration.from_pretrained(local_folder(folder), dtype=torch.float32).eval()
        config = self._model.config
        self.window_s = config.max_source_positions // FRAMES_PER_S
        self._most_ids = config.max_target_positions - PROMPT_IDS
        self._features = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=self.window_s)
        self._texts = load_text_tokenizer(folder)
        self._language = {} if language is None else {"language": language, "task": "transcribe"}

    @torch.no_grad()
    def read(self, utterances: Sequence[Utterance]) -> list[str]:
        """What it hears of each, in order. Raises ValueError for a recording longer than its window."""
        for utterance in utterances:
            if utterance.duration_s > self.window_s:
                raise ValueError(
                    f"{utterance.id} lasts {utterance.duration_s:.1f} s, Whisper hears {self.window_s} s; cut it"
                )
        heard = [""] * len(utterances)
        for rows in longest_first([u.duration_s for u in utterances], rows=ROWS):
            for i, text in zip(rows, self._read([utterances[i] for i in rows])):
                heard[i] = text
        return heard

    def _read(self, utterances: Sequence[Utterance]) -> list[str]:
        rate = self._features.sampling_rate
        waves = [audio.resample(u.audio, rate).samples_S for u in utterances]
        found = self._features(waves, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
        limits = [min(self._most_ids, round(IDS_PER_S * u.duration_s) + PROMPT_IDS) for u in utterances]
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of its own checkpoint's settings at every call
        try:
            ids_BL = self._model.generate(
                found.input_features,
                attention_mask=found.attention_mask,
                max_new_tokens=max(limits),
                do_sample=False,
                num_beams=1,
                **self._language,
            )
        finally:
            logging.set_verbosity(verbosity)
        return [self._texts.decode(ids_L[:limit]) for ids_L, limit in zip(ids_BL.tolist(), limits)]
