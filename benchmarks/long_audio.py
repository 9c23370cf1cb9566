"""What carried context buys and costs on audio longer than a window: word errors of a trained tokenizer's tokens, read back.

    python benchmarks/long_audio.py [--tokenizer runs/toy/tokenizer] [--recordings 24] [--sentences 24] [--seed 7]

Held-out sentences of the micro-world, spoken by espeak-ng, joined to recordings of several windows in one voice each. The
same weights tokenize them with more and more carried context; half of a window is the most that is tried. "alone" is every sentence
by itself, as in training. `encoded` is the audio that goes through the encoder per second of recording, its price. The error
rate has its standard error from recordings drawn again (bootstrap); differences are taken within recordings.

`changed` is the share of tokens that are not those of a window which begins as early as it can, so that it carries all of a window but
one block: in the first block that a window after the first gives, and in the others.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.evals.wer import wer
from speechquilt.stages.corpus import speak
from speechquilt.stages.encode import encode_all
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.types import Waveform

DRAWS = 1000


def recordings(num_recordings: int, num_sentences: int, seed: int) -> list[tuple[list[str], list[Waveform]]]:
    """The sentences of each recording and their audio, one voice to a recording."""
    voices = EspeakTTSConfig()
    sentences = MicroWorldConfig().build().held_out_sentences(num_recordings * num_sentences, seed)
    made = []
    for i in range(num_recordings):
        voice = voices.voices[i % len(voices.voices)]
        texts = sentences[i * num_sentences : (i + 1) * num_sentences]
        made.append((texts, [u.audio for u in speak(replace(voices, voices=(voice,)).build(), texts)]))
    return made


def with_context(model: SupervisedTokenizer, context_frames: int) -> SupervisedTokenizer:
    changed = SupervisedTokenizer(replace(model.config, context_frames=context_frames), model.text_tokenizer)
    changed.load_state_dict(model.state_dict())
    return changed.eval()


def errors(model: SupervisedTokenizer, texts: Sequence[str], waves: Sequence[Waveform]) -> np.ndarray:
    """Wrong words and all words of each wave, `[N, 2]`."""
    read = model.read_back(encode_all(model, waves))
    rates = [wer([pair]) for pair in zip(texts, read)]
    return np.array([(rate.errors, rate.length) for rate in rates])


def rate(errors_N2: np.ndarray) -> float:
    return float(errors_N2[:, 0].sum() / errors_N2[:, 1].sum())


def drawn(errors_N2: np.ndarray, base_N2: np.ndarray) -> tuple[float, float]:
    """Standard errors of the rate and of its difference to the base's, recordings drawn again."""
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(errors_N2), len(errors_N2)) for _ in range(DRAWS)]
    rates = np.array([rate(errors_N2[pick]) for pick in picks])
    bases = np.array([rate(base_N2[pick]) for pick in picks])
    return float(rates.std()), float((rates - bases).std())


def changed_tokens(
    model: SupervisedTokenizer, waves: Sequence[Waveform], expected: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Share of tokens that differ from `expected`: in the first blocks after the edges of windows, and elsewhere."""
    block = model.config.block_frames // model.config.pooling
    first, other = [], []
    for ids_T, expected_T in zip(encode_all(model, waves), expected, strict=True):
        differs_T, after_edge_T = ids_T != expected_T, np.zeros(len(ids_T), dtype=bool)
        for window in list(model.rule.windows(len(ids_T)))[1:]:
            after_edge_T[window.first : window.first + block] = True
        first.append(differs_T[after_edge_T])
        other.append(differs_T[~after_edge_T])
    return float(np.concatenate(first).mean()), float(np.concatenate(other).mean())


def encoded_share(model: SupervisedTokenizer, waves: Sequence[Waveform]) -> float:
    num_tokens = [-(-len(wave.samples_S) // model.token_samples) for wave in waves]
    read = sum(window.stop - window.start for n in num_tokens for window in model.rule.windows(n))
    return read / sum(num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/toy/tokenizer"))
    parser.add_argument("--recordings", type=int, default=24)
    parser.add_argument("--sentences", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SupervisedTokenizer.load(options.tokenizer)
    made = recordings(options.recordings, options.sentences, options.seed)
    texts = [" ".join(texts) for texts, _ in made]
    joined = [
        Waveform(samples_S=np.concatenate([wave.samples_S for wave in waves]), sample_rate=model.sample_rate)
        for _, waves in made
    ]
    window_s = model.window_samples / model.sample_rate
    print(f"{len(made)} recordings of {np.mean([w.duration_s for w in joined]):.1f} s, windows of {window_s:.1f} s")
    print("| context, s | encoded | WER | less than hard cuts | changed after an edge | changed elsewhere |")
    print("| --- | --- | --- | --- | --- | --- |")
    block = model.config.block_frames
    expected = encode_all(with_context(model, model.config.max_frames - block), joined)
    base_N2 = errors(model, texts, joined)
    for context in range(0, model.config.max_frames // 2 + 1, block):
        changed = with_context(model, context)
        errors_N2 = errors(changed, texts, joined)
        spread, difference = drawn(errors_N2, base_N2)
        after_edge, elsewhere = changed_tokens(changed, joined, expected)
        gain = rate(base_N2) - rate(errors_N2)
        print(
            f"| {context / 50:.1f} | {encoded_share(changed, joined):.2f} | {rate(errors_N2):.1%} ± {spread:.1%} "
            f"| {gain:.1%} ± {difference:.1%} | {after_edge:.1%} | {elsewhere:.1%} |"
        )
    alone_N2 = errors(
        model, [text for texts, _ in made for text in texts], [wave for _, waves in made for wave in waves]
    )
    print(f"| alone | 1.00 | {rate(alone_N2):.1%} | | | |")


if __name__ == "__main__":
    main()
