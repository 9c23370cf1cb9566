"""What a speech decoder's sound is worth: held-out recordings made again from their tokens, and read.

Trap: the sound is read by a recogniser that makes errors of its own, so its word errors stand beside those of the tokens
themselves, of the recordings, and of the same tokens in another order, which nobody must understand: else the decoder
does not listen to its tokens.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from speechquilt import audio
from speechquilt.decoder.joints import jumps
from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.evals.error_rates import error_rate, rate_measures, rate_results
from speechquilt.evals.measures import Chart, Measure, Promise, Value, at_most, is_true
from speechquilt.evals.sound_distance import sound_distance
from speechquilt.types import Utterance, Waveform

RECORDED, TOKENS, SOUND, SHUFFLED = "recorded", "tokens", "sound", "shuffled"
WORDS = {
    RECORDED: "the recordings",
    TOKENS: "their tokens",
    SOUND: "sound made again from the tokens",
    SHUFFLED: "sound of the tokens in another order",
    "own": "our tokenizer",
    "whisper": "Whisper",
}
LIMIT, ABOVE_TOKENS = 0.10, 0.05
CHUNKS = (1, 7, 3, 16)  # tokens per step when streaming is compared, in turn
STREAMED = 5  # recordings that are streamed
Reader = Callable[[Sequence[Waveform]], list[str]]

MEASURES = (
    *rate_measures(
        "decoder.heard.<by>.<what>",
        "held-out recordings, as sound or tokens, read",
        promise=Promise(
            name="Speech decoder: word error rate of the sound, read by <by>",
            bound=at_most(LIMIT), where={"by": ("own",), "what": (SOUND,)}, words=WORDS,
        ),
        chart=Chart(title="Words heard wrong in what the decoder says", series="what", words=WORDS),
    ),
    Measure(
        key="decoder.above_tokens", kind="difference",
        meaning="word error rate of the sound minus that of its tokens, both read by our tokenizer",
        promise=Promise(name="Speech decoder: word error rate of the sound above that of the tokens", bound=at_most(ABOVE_TOKENS)),
    ),
    Measure(key="decoder.log_mel", kind="amount", unit="nats", meaning="mean difference of the log-mel of sound made again and recording"),
    Measure(key="decoder.mcd_db", kind="amount", unit="dB", meaning="mel-cepstral distortion of the same, coefficients 1 to 13"),
    Measure(key="decoder.f0_cents", kind="amount", unit="cents", meaning="median difference of pitch where both are voiced"),
    Measure(key="decoder.voicing", kind="share", meaning="share of the time in which one is voiced and the other is not"),
    Measure(
        key="decoder.streaming_equals_offline", kind="flag", meaning="streamed in chunks, every sample is the offline one",
        promise=Promise(name="Speech decoder: streaming gives the same samples", bound=is_true()),
    ),
    Measure(key="decoder.joint_amplitude", kind="amount", meaning="largest amplitude jump at a block's joint, in units of the largest elsewhere, the median recording"),
    Measure(key="decoder.joint_spectrum", kind="amount", meaning="the same of the spectrum"),
    Measure(key="decoder.delay_s", kind="amount", unit="s", meaning="longest time from a token's start until its samples are given"),
    Measure(key="decoder.real_time_factor", kind="amount", meaning="seconds of this machine for a second of sound, flow and vocoder, many sentences at once"),
)  # fmt: skip


def heard_sound(
    decoder: SpeechDecoder, held_out: Sequence[Utterance], tokens: Sequence[np.ndarray], readers: Mapping[str, Reader],
    read_tokens: Callable[[Sequence[np.ndarray]], list[str]], same_voice: Sequence[bool],
) -> dict[str, Value]:  # fmt: skip
    """`decoder.*`. `readers`: by name, sound -> text; `read_tokens`: tokens -> text, by the reader named "own". Only recordings
    in the decoder's voice are compared with their sound (`same_voice`)."""
    begin = time.monotonic()
    made = decoder.speak(tokens)
    seconds = time.monotonic() - begin
    draw = np.random.default_rng(0)
    shuffled = decoder.speak([draw.permutation(ids_T) for ids_T in tokens])
    said = [u.text for u in held_out]
    found: dict[str, Value] = {}
    for by, read in readers.items():
        for what, waves in ((RECORDED, [u.audio for u in held_out]), (SOUND, made), (SHUFFLED, shuffled)):
            found |= rate_results(f"decoder.heard.{by}.{what}", error_rate(zip(said, read(waves))))
    found |= rate_results(f"decoder.heard.own.{TOKENS}", error_rate(zip(said, read_tokens(tokens))))
    found["decoder.above_tokens"] = found["decoder.heard.own.sound.wer"] - found["decoder.heard.own.tokens.wer"]  # type: ignore[operator]
    return {
        **found,
        **_distances(decoder, [(wav, u) for wav, u, same in zip(made, held_out, same_voice) if same]),
        **_joints(decoder, made),
        "decoder.streaming_equals_offline": streams_alike(decoder, tokens[:STREAMED]),
        "decoder.delay_s": decoder.delay_s,
        "decoder.real_time_factor": seconds / sum(wav.duration_s for wav in made),
    }


def streams_alike(decoder: SpeechDecoder, tokens: Sequence[np.ndarray]) -> bool:
    """Whether tokens that come in chunks give the samples of the whole utterance, decoded alone: many at once round otherwise, and
    phases that were found step by step drift apart from the last digit on."""
    for ids_T in tokens:
        (wav,) = decoder.speak([ids_T])
        state, parts, at, turn = decoder.init_state(), [], 0, 0
        while at < len(ids_T):
            chunk = CHUNKS[turn % len(CHUNKS)]
            wav_S, state = decoder.step(torch.as_tensor(ids_T[at : at + chunk], dtype=torch.long), state)
            parts.append(wav_S)
            at, turn = at + chunk, turn + 1
        wav_S, state = decoder.step(torch.zeros(0, dtype=torch.long), state, final=True)
        streamed_S = torch.cat([*parts, wav_S]).clamp(-1, 1).cpu().numpy()
        if not np.array_equal(streamed_S, wav.samples_S):
            return False
    return True


def _distances(decoder: SpeechDecoder, pairs: Sequence[tuple[Waveform, Utterance]]) -> dict[str, Value]:
    """Means over recordings, of what has a number there."""
    mel, rows = decoder.flow.config.mel.build(), []
    for wav, meant in pairs:
        meant_wav = audio.resample(meant.audio, wav.sample_rate)
        both = [mel(torch.from_numpy(w.samples_S)[None])[0].numpy() for w in (wav, meant_wav)]
        rows.append(sound_distance(both[0], both[1], wav, meant_wav))
    if not rows:
        return {}
    return {
        f"decoder.{key}": float(np.nanmean([getattr(row, key) for row in rows]))
        for key in ("log_mel", "mcd_db", "f0_cents", "voicing")
    }


def _joints(decoder: SpeechDecoder, made: Sequence[Waveform]) -> dict[str, Value]:
    """The median recording's worst joint: where one block's samples end and the next one's begin."""
    flow, found = decoder.flow, []
    edge_s = 0.1
    for wav in made:
        joints, token = [], 0
        while (sample := flow.time.num_frames(token) * flow.config.mel.hop) < len(wav.samples_S):
            if edge_s * wav.sample_rate < sample < len(wav.samples_S) - edge_s * wav.sample_rate:
                joints.append(sample)
            token = flow.config.stream.end_of_chunk(token)
        if joints:
            found.append(jumps(torch.from_numpy(wav.samples_S), wav.sample_rate, torch.tensor(joints)))
    if not found:
        return {}
    return {
        "decoder.joint_amplitude": float(np.median([j.amplitude_worst for j in found])),
        "decoder.joint_spectrum": float(np.median([j.spectrum_worst for j in found])),
    }
