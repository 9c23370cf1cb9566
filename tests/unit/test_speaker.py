"""The recordings of the real story's text-to-token model: one voice, and nothing that is held out elsewhere."""

import pytest

from speechquilt.recipes.real.speaker import SpeakerVoiceConfig
from speechquilt.stages.spoken_corpus import HELD_OUT, TRAIN, SpokenCorpusConfig, split

SENTENCES = [f"sentence number {i}" for i in range(60)]
ALL = SpokenCorpusConfig(sentences=30, held_out=10, seed=3)


@pytest.mark.parametrize("sentences", [20, 50])
def test_the_voice_says_sentences_that_the_others_say(sentences):
    alone = SpeakerVoiceConfig(voice="flite:awb", sentences=sentences).corpus(ALL)
    assert alone.voices == ("flite:awb",)
    ours, theirs = split(SENTENCES, alone), split(SENTENCES, ALL)
    assert ours[HELD_OUT] == theirs[HELD_OUT]
    assert ours[TRAIN] == theirs[TRAIN][:sentences]


def test_a_voice_without_sentences_is_an_error():
    with pytest.raises(ValueError, match="sentences=0 must be at least 1"):
        SpeakerVoiceConfig(sentences=0)
