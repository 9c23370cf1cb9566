"""Recorded sentences cut between two words: the first part as speech and as text, the second as text.

Trap: tokens hear ahead (`lookahead_s`), so tokens of the whole recording that end at the cut may know the next word. Here the sound
ends at the cut, and only then becomes tokens.
"""

from collections.abc import Sequence

from speechquilt import audio
from speechquilt.evals.continuations import SplitSentence
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_all
from speechquilt.stages.training_documents import text_segment
from speechquilt.text import TextTokenizer
from speechquilt.types import Segment, Utterance, Waveform

MIN_WORDS = 3  # on either side of the cut


def split_sentences(
    utterances: Sequence[Utterance], speech: SpeechTokenizer, text: TextTokenizer, min_words: int = MIN_WORDS
) -> list[SplitSentence]:
    """Every recording with word times and at least `min_words` words on either side of its middle, cut there."""
    fitting = [u for u in utterances if len(u.alignment) >= 2 * min_words]
    waves = [sound_until(u, len(u.alignment) // 2, speech.sample_rate) for u in fitting]
    sentences = []
    for utterance, ids_T in zip(fitting, encode_all(speech, waves)):
        words, cut = [word.text for word in utterance.alignment], len(utterance.alignment) // 2
        sentences.append(
            SplitSentence(
                id=utterance.id,
                spoken=Segment(modality="speech", ids_T=ids_T),
                written=text_segment(text, " ".join(words[:cut])),
                ending=text_segment(text, " ".join(words[cut:]), inside=True),
            )
        )
    return sentences


def sound_until(utterance: Utterance, word: int, sample_rate: int) -> Waveform:
    """The recording up to where the word before `word` ends, at this rate."""
    end = round(utterance.alignment[word - 1].end_s * utterance.audio.sample_rate)
    samples_S = utterance.audio.samples_S[:end]
    return audio.resample(Waveform(samples_S=samples_S, sample_rate=utterance.audio.sample_rate), sample_rate)
