"""What can be heard at the end of the toy story: recordings, the same from their tokens, and speech that no one recorded."""

from pathlib import Path

import numpy as np

from speechquilt import audio
from speechquilt.data.sources.micro_world import MicroWorld
from speechquilt.decoder import speech_decoder
from speechquilt.recipes import defaults
from speechquilt.recipes.story_parts import audios
from speechquilt.recipes.toy.fact_transfer import WITH
from speechquilt.reports.story_page import Audio
from speechquilt.stages.encode import encode_utterances
from speechquilt.stages.speak import Parts, said
from speechquilt.stages.train_lm import load_scorer
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.espeak import EspeakTTS
from speechquilt.types import Segment, Waveform

MAX_ANSWER = 60  # speech tokens


def players(run_dir: Path, world: MicroWorld, speaker: EspeakTTS, tokenizer: SupervisedTokenizer) -> list[Audio]:
    """Recordings first, then what the run's models say."""
    texts = world.held_out_sentences(len(speaker.voices) + 1)
    spoken = {f"voice {voice}": speaker.speak(text, voice) for text, voice in zip(texts, speaker.voices)}
    decoder = speech_decoder.load(run_dir / "decoder")
    again = decoder.speak([tokens.ids_T for tokens in encode_utterances(tokenizer, list(spoken.values()))])
    found = audios(spoken, tokenizer)
    for label, wav, u in zip(spoken, again, spoken.values()):
        found.append(_player(f"{label}, made again from its tokens", wav, u.text))
    return [*found, *_sentence(run_dir, texts[-1], tokenizer), *_answer(run_dir, world, speaker, tokenizer, decoder)]


def _sentence(run_dir: Path, text: str, tokenizer: SupervisedTokenizer) -> list[Audio]:
    """By the text-to-token model; nothing where it refuses, which is printed."""
    try:
        wav, span = said(text, Parts(run=run_dir), defaults.TEXT_TO_TOKEN.engine)
    except ValueError as error:
        print(f"  no sentence in the report: {error}")
        return []
    note = f"read back from its tokens: {tokenizer.read_back([span.ids_T])[0]}"
    return [_player("a sentence that nobody recorded, by the text-to-token model", wav, text, note)]


def _answer(
    run_dir: Path,
    world: MicroWorld,
    speaker: EspeakTTS,
    tokenizer: SupervisedTokenizer,
    decoder: speech_decoder.SpeechDecoder,
) -> list[Audio]:
    """One question, aloud, about a fact whose text was interleaved, and what the model says."""
    scorer, _ = load_scorer(run_dir / "lm" / WITH)
    fact = world.facts_of("interleaved")[0]
    question = speaker.speak(fact.question(), speaker.voices[0])
    (tokens,) = encode_utterances(tokenizer, [question])
    prompt = (Segment(modality="speech", ids_T=tokens.ids_T, unit_end_T=tokens.unit_end_T),)
    (ids_T,) = scorer.generate([prompt], "speech", MAX_ANSWER)
    if not len(ids_T):
        print(f"  no answer in the report: {WITH} says nothing to {fact.question()!r}")
        return []
    heard = tokenizer.read_back([ids_T])[0]
    (wav,) = decoder.speak([np.asarray(ids_T)])
    return [
        _player("a spoken question", question.audio, fact.question()),
        _player(f"what {WITH} answers", wav, heard, f"right would be: {fact.answer_sentence}"),
    ]


def _player(label: str, wav: Waveform, transcript: str, note: str = "") -> Audio:
    return Audio(label=label, wav=audio.to_wav_bytes(wav), transcript=transcript, note=note)
