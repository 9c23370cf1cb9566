"""Who is understood: word errors of speech tokens read back as text, by group of speakers, beside two floors.

Trap: the reader is trained with the codebook, so its errors without one (`no_codebook`) are those of a reader that expects codes;
the original Whisper on the same recordings is the floor that no training of ours has touched.
"""

from collections.abc import Mapping, Sequence

from speechquilt import audio
from speechquilt.evals.error_rates import error_rate, rate_measures, rate_results
from speechquilt.evals.measures import Chart, Promise, Value, at_most
from speechquilt.stages.encode import encode_all
from speechquilt.stages.train_tokenizer import transcribe
from speechquilt.stages.whisper_reader import WhisperReader
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Utterance

TOKENS, NO_CODEBOOK, WHISPER = "tokens", "no_codebook", "whisper"
GROUPS = {
    "held_out": "held-out sentences, seen voices",
    "unseen_voice": "a voice left out of training",
    "human": "people (LibriVox)",
    "kokoro": "Kokoro's voices",
}
LIMITS = {"held_out": 0.10, "unseen_voice": 0.20, "human": 0.25}
READERS = {
    TOKENS: "tokens read back",
    NO_CODEBOOK: "the same model without its codebook",
    WHISPER: "the original Whisper",
}
WORDS = GROUPS | READERS

MEASURES = rate_measures(
    "heard.<group>.<by>",
    "recordings heard",
    promise=tuple(
        Promise(
            name="Tokens read back, <group>: word error rate",
            bound=at_most(limit),
            where={"group": (group,), "by": (TOKENS,)},
            words=WORDS,
        )
        for group, limit in LIMITS.items()
    ),
    chart=Chart(title="Words heard wrong, by speaker", series="by", words=WORDS),
)


def heard(
    tokenizer: SupervisedTokenizer, groups: Mapping[str, Sequence[Utterance]], whisper: WhisperReader | None = None
) -> dict[str, Value]:
    """`heard.<group>.<by>.*` of every group; `groups` are named as in `GROUPS`. Without `whisper` one floor is missing."""
    found: dict[str, Value] = {}
    for group, utterances in groups.items():
        said = [u.text for u in utterances]
        for by, texts in readings(tokenizer, utterances, whisper).items():
            found |= rate_results(f"heard.{group}.{by}", error_rate(zip(said, texts)))
    return found


def readings(
    tokenizer: SupervisedTokenizer, utterances: Sequence[Utterance], whisper: WhisperReader | None = None
) -> dict[str, list[str]]:
    """What each reader makes of the recordings, in order."""
    waves = [audio.resample(u.audio, tokenizer.sample_rate) for u in utterances]
    found = {
        TOKENS: tokenizer.read_back(encode_all(tokenizer, waves, what="held-out")),
        NO_CODEBOOK: transcribe(tokenizer, utterances, codebook=False),
    }
    return found if whisper is None else {**found, WHISPER: whisper.read(utterances)}
