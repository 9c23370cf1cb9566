"""Parallel interleaving at load time against its rule as a plain loop over words and tokens, same documents, same run.

    python benchmarks/interleave.py [--documents 300] [--words 200] [--rounds 5]

Both sides draw the same blocks from the same seeds and give the same documents (checked here and in the tests). The plain
loop walks through every token and spells every block with the text tokenizer. Prints tokens per CPU second and the ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from speechquilt.data.interleaving.parallel import interleave_parallel, word_by_word
from speechquilt.text import TextTokenizer
from speechquilt.types import SILENCE, AlignedTokens, Document, Modality, Segment, UnitEnd

Interleave = Callable[[AlignedTokens, np.random.Generator], Document]


def plain_blocks(num_words: int, rng: np.random.Generator) -> list[tuple[Modality, int, int]]:
    """The block rule of spec latent-speech-text 3.2, one block at a time."""
    blocks: list[tuple[Modality, int, int]] = []
    most_text = max(2, min(30, int(0.6 * num_words)))
    modality: Modality = "text" if rng.random() < 0.5 else "speech"
    done = length = 0
    while done < num_words:
        if modality == "text":
            length = int(rng.integers(min(5, most_text), most_text, endpoint=True))
        else:
            length = max(2, length // 2) if blocks else int(rng.integers(2, 15, endpoint=True))
        end = min(done + length, num_words)
        if blocks and end == num_words and end - done < 3:
            blocks[-1] = (blocks[-1][0], blocks[-1][1], end)
        else:
            blocks.append((modality, done, end))
        done, modality = end, "speech" if modality == "text" else "text"
    return blocks


def plain_interleave(
    spoken: AlignedTokens, rng: np.random.Generator, text_encode: Callable[[str], Sequence[int]]
) -> Document:
    """The rule read token by token. Every word must have a token."""
    blocks = plain_blocks(len(spoken.words), rng)
    word_T = spoken.word_T.tolist()
    segments = []
    for modality, a, b in blocks:
        if modality == "text":
            ids_T = np.asarray(text_encode(" ".join(spoken.words[a:b])), dtype=np.int32)
            segments.append(Segment(modality="text", ids_T=ids_T))
            continue
        first = next(t for t, word in enumerate(word_T) if word == a)
        last = max(t for t, word in enumerate(word_T) if word == b - 1)
        before = after = 0
        while first - before > 0 and word_T[first - before - 1] == SILENCE:
            before += 1
        while last + after < len(word_T) - 1 and word_T[last + after + 1] == SILENCE:
            after += 1
        low = first - (before if a == 0 else (before + 1) // 2)
        high = last + 1 + (after if b == len(spoken.words) else (after + 1) // 2)
        ends = []
        for t in range(low, high):
            ended = t == high - 1 or word_T[t] != word_T[t + 1]
            kind = UnitEnd.SILENCE if word_T[t] == SILENCE else UnitEnd.WORD
            ends.append(kind if ended else UnitEnd.NONE)
        segments.append(
            Segment(
                modality="speech",
                ids_T=np.asarray(spoken.ids_T[low:high], dtype=np.int32),
                unit_end_T=np.asarray(ends, dtype=np.uint8),
            )
        )
    return Document(id=spoken.id, source="parallel", segments=tuple(segments))


def invented(num_documents: int, num_words: int) -> tuple[list[AlignedTokens], TextTokenizer]:
    """Documents of invented words, 2 to 8 tokens per word, a pause of 1 to 6 tokens after half of them."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "en", "i", "or", "u")]
    lexicon = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(3000)]
    documents = []
    for i in range(num_documents):
        words = tuple(rng.choice(lexicon, num_words).tolist())
        pause_W = rng.integers(1, 7, num_words) * (rng.random(num_words) < 0.5)
        lengths_R = np.stack([rng.integers(2, 9, num_words), pause_W], axis=1).ravel()
        word_T = np.repeat(np.stack([np.arange(num_words), np.full(num_words, SILENCE)], axis=1).ravel(), lengths_R)
        ids_T = rng.integers(0, 500, len(word_T)).astype(np.int32)
        documents.append(
            AlignedTokens(id=f"d{i}", text=" ".join(words), words=words, ids_T=ids_T, word_T=word_T.astype(np.int32))
        )
    return documents, TextTokenizer.train([" ".join(d.words) for d in documents[:50]], 2000)


def tokens_per_s(interleave: Interleave, documents: Sequence[AlignedTokens], epoch: int) -> float:
    started = time.process_time()
    made = [interleave(spoken, np.random.default_rng([epoch, i])) for i, spoken in enumerate(documents)]
    return sum(document.num_tokens() for document in made) / (time.process_time() - started)


def check_equal(a: Document, b: Document) -> None:
    assert len(a.segments) == len(b.segments)
    for x, y in zip(a.segments, b.segments):
        assert x.modality == y.modality
        np.testing.assert_array_equal(x.ids_T, y.ids_T)
        assert (x.unit_end_T is None) == (y.unit_end_T is None)
        if x.unit_end_T is not None:
            np.testing.assert_array_equal(x.unit_end_T, y.unit_end_T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--words", type=int, default=200, help="words per document; 200 are about 80 s of speech")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    documents, tokenizer = invented(args.documents, args.words)
    encode = word_by_word(tokenizer)

    def plain(spoken: AlignedTokens, rng: np.random.Generator) -> Document:
        return plain_interleave(spoken, rng, tokenizer.encode)

    def vectorised(spoken: AlignedTokens, rng: np.random.Generator) -> Document:
        return interleave_parallel(spoken, rng, encode)

    for i, spoken in enumerate(documents[:20]):  # also warms up both
        check_equal(plain(spoken, np.random.default_rng(i)), vectorised(spoken, np.random.default_rng(i)))
    rates: dict[str, list[float]] = {"plain loop": [], "vectorised": []}
    for epoch in range(args.rounds):
        rates["plain loop"].append(tokens_per_s(plain, documents, epoch))
        rates["vectorised"].append(tokens_per_s(vectorised, documents, epoch))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:<11} {rate:>12,.0f} tokens/s")
    print(f"ratio: {medians['vectorised'] / medians['plain loop']:.1f}")


if __name__ == "__main__":
    main()
