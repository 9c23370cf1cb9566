"""Five LibriVox clips through a trained tokenizer: what it makes of human speech, beside the same texts spoken by espeak-ng.

    make clips
    python benchmarks/human_speech.py [--tokenizer runs/toy/tokenizer]

A tokenizer of the micro-world has heard four synthetic voices and about a hundred words, few of which are in these texts. So the
error rates say how far it is from understanding people, and the same texts in its own voice say how much of that is words.
"""

import argparse
from pathlib import Path

import numpy as np

from speechquilt import audio
from speechquilt.data.sources.clips import read_clips
from speechquilt.evals.wer import EditErrors, cer, wer
from speechquilt.stages.encode import encode_all
from speechquilt.stages.train_tokenizer import stream
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.types import Utterance

CLIPS = Path(__file__).parents[1] / ".cache" / "clips"


def clips() -> list[Utterance]:
    """The recordings with their texts. Raises FileNotFoundError when they were not fetched."""
    return read_clips(CLIPS)


def measure(tokenizer: SupervisedTokenizer, utterances: list[Utterance]) -> tuple[list[str], EditErrors, EditErrors]:
    """-> what is read back of each, word and character errors. Streams each clip and compares."""
    waves = [audio.resample(u.audio, tokenizer.sample_rate) for u in utterances]
    tokens = encode_all(tokenizer, waves)
    for wave, ids_T in zip(waves, tokens):
        assert np.array_equal(stream(tokenizer, wave.samples_S, 1111), ids_T), "streaming differs from offline"
    heard = tokenizer.read_back(tokens)
    pairs = [(u.text, text) for u, text in zip(utterances, heard)]
    return heard, wer(pairs), cer(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/toy/tokenizer"))
    tokenizer = SupervisedTokenizer.load(parser.parse_args().tokenizer)
    people, speaker = clips(), EspeakTTSConfig().build()
    for name, utterances in (
        ("LibriVox", people),
        ("espeak-ng", [speaker.speak(u.text, speaker.voices[0]) for u in people]),
    ):
        heard, words, characters = measure(tokenizer, utterances)
        seconds = sum(u.duration_s for u in utterances)
        print(
            f"{name}: {seconds:.1f} s, WER {100 * words.rate:.0f} %, CER {100 * characters.rate:.0f} %, n={words.length} words"
        )
        for utterance, text in zip(utterances, heard):
            print(f"  said  {utterance.text}\n  heard {text}")


if __name__ == "__main__":
    main()
