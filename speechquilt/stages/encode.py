"""Utterances -> speech tokens with word ends, in batches: what every recipe does before it writes shards.

Tokens of a batch are those of each utterance alone, so batching by length is only speed, never a change of result.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from speechquilt import audio
from speechquilt.data.interleaving.parallel import tokens_of_words
from speechquilt.nn.batching import longest_first
from speechquilt.nn.hub import local_folder
from speechquilt.protocols import SpeechTokenizer
from speechquilt.text import TextTokenizer
from speechquilt.types import AlignedTokens, Utterance, Waveform

BATCH_SECONDS = 60.0  # audio in one forward pass, padding included; more only costs memory on a CPU
TEXT_TOKENIZERS = ("tokenizer.json", "text_tokenizer.json")  # of a Hugging Face folder, and of a run
PROGRESS_FROM_S = 600  # audio that takes long enough to be worth a progress bar


def encode_all(
    tokenizer: SpeechTokenizer,
    waves: Sequence[Waveform],
    *,
    batch_seconds: float = BATCH_SECONDS,
    what: str = "tokenize",
) -> list[np.ndarray]:
    """Waveforms at the tokenizer's rate -> int32 ids each, in the order given; longest first, so memory fails early."""
    result: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * len(waves)
    total_s = round(sum(w.duration_s for w in waves))
    progress = tqdm(total=total_s, desc=what, unit="s audio", mininterval=5.0, disable=total_s < PROGRESS_FROM_S)
    for rows in longest_first([w.duration_s for w in waves], budget=batch_seconds):
        for i, ids_T in zip(rows, encode_batch(tokenizer, [waves[i].samples_S for i in rows])):
            result[i] = ids_T
        progress.update(round(sum(waves[i].duration_s for i in rows)))
    progress.close()
    return result


def encode_batch(
    tokenizer: SpeechTokenizer, waves: Sequence[np.ndarray], device: torch.device | str = "cpu"
) -> list[np.ndarray]:
    """Samples at the tokenizer's rate, as one padded batch on `device` -> int32 ids of each."""
    num_samples_B = torch.tensor([len(samples_S) for samples_S in waves])
    wav_BS = pad_sequence([torch.from_numpy(samples_S) for samples_S in waves], batch_first=True)
    ids_BT, num_tokens_B = tokenizer.encode(wav_BS.to(device), num_samples_B.to(device))
    return [ids_T[:n].astype(np.int32) for ids_T, n in zip(ids_BT.cpu().numpy(), num_tokens_B.tolist())]


def encode_utterances(tokenizer: SpeechTokenizer, utterances: Sequence[Utterance]) -> list[AlignedTokens]:
    """Utterances at any rate -> tokens with their words. Without word times the whole utterance is one unit."""
    waves = [audio.resample(u.audio, tokenizer.sample_rate) for u in utterances]
    return [
        aligned_tokens(u, ids_T, tokenizer.frame_rate) for u, ids_T in zip(utterances, encode_all(tokenizer, waves))
    ]


def aligned_tokens(utterance: Utterance, ids_T: np.ndarray, frame_rate: float) -> AlignedTokens:
    """Give each token its word (SILENCE for none) by the utterance's word times."""
    words: tuple[str, ...] = (utterance.text,)
    word_T = np.zeros(len(ids_T), dtype=np.int64)
    if utterance.alignment:
        words = tuple(w.text for w in utterance.alignment)
        word_T = tokens_of_words(utterance.alignment, len(ids_T), frame_rate)
    return AlignedTokens(id=utterance.id, text=utterance.text, words=words, ids_T=ids_T, word_T=word_T)


def own_text_tokenizer(tokenizer: SpeechTokenizer) -> TextTokenizer | None:
    """The one that the speech tokenizer's ASR heads spell with; None: it has no such heads, as the released ones."""
    return getattr(tokenizer, "text_tokenizer", None)


def text_tokenizer_of(tokenizer: SpeechTokenizer | None, given: str | Path | None = None) -> TextTokenizer:
    """The text tokenizer at `given`, else the speech tokenizer's own. Raises ValueError when there is neither."""
    if given:
        return load_text_tokenizer(Path(given))
    own = own_text_tokenizer(tokenizer) if tokenizer else None
    if own is None:
        what = "the speech tokenizer's folder has no text tokenizer" if tokenizer else "no text tokenizer is given"
        raise ValueError(
            f"{what}; give one by --text-tokenizer, a Hugging Face folder with tokenizer.json or such a file"
        )
    return own


def load_text_tokenizer(path: Path) -> TextTokenizer:
    """A tokenizers JSON file, or a folder with one: of Hugging Face, or a run of ours. Texts are never cut or padded.

    Raises FileNotFoundError or ValueError saying what is there instead.
    """
    path = local_folder(path)
    file = next((path / name for name in TEXT_TOKENIZERS if (path / name).is_file()), path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no {TEXT_TOKENIZERS[0]}; give a Hugging Face folder with that file, or the file. Of a folder with "
            "tokenizer.model alone, AutoTokenizer.from_pretrained(old).save_pretrained(new) in transformers makes one"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file} is no text tokenizer ({error}); give a tokenizers JSON file") from error
    tokenizer.no_truncation()  # which some are published with
    tokenizer.no_padding()
    return TextTokenizer(tokenizer)
