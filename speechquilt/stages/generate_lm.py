"""`speechquilt generate`: a trained language model goes on from a text, a recording, or both, in text and in sound.

Trap: speech tokens become sound with a decoder of the tokenizer that made the model's shards, and of no other; without one
they are shown as ids, and as the words that the tokenizer reads in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import audio, config
from speechquilt.decoder import speech_decoder
from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.files import make_folder, write_json
from speechquilt.model.generation import Generated, GenerationConfig, GenerationEngine
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_all, own_text_tokenizer
from speechquilt.stages.evaluate import speech_tokenizer_of, text_tokenizer_in
from speechquilt.stages.lm_recipe import RUN, LMRun
from speechquilt.stages.train_lm import load_scorer
from speechquilt.stages.training_documents import text_segment
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Segment

RESULT = "result.json"
WAV = "continuation_{}.wav"


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is asked of a run. Raises ValueError when that makes no sense, before anything is loaded."""

    lm: Path
    text: str
    audio: Path | None
    settings: GenerationConfig
    number: int
    tokenizer: Path | None
    decoder: Path | None
    out: Path | None
    device: str

    def __post_init__(self) -> None:
        if not self.text.strip() and self.audio is None:
            raise ValueError(
                f"text={self.text!r} without audio is nothing to go on from; give --text, --audio, or both: the recording, "
                "then the text"
            )
        if self.audio is not None and not self.audio.is_file():
            raise FileNotFoundError(f"audio={self.audio} is missing; give a WAV, FLAC, OGG or MP3 file")
        if self.number < 1:
            raise ValueError(f"number={self.number} must be at least 1")
        if self.number > 1 and not self.settings.temperature:
            raise ValueError(
                f"number={self.number} with temperature=0 gives the likeliest continuation {self.number} times; "
                "set --temperature above 0, for example 0.8"
            )
        if self.decoder is not None and self.settings.answer == "text":
            raise ValueError(f"decoder={self.decoder} with answer='text': no speech may come; leave one of them out")
        if self.decoder is not None and self.out is None:
            raise ValueError(f"decoder={self.decoder} without out: sound needs a place; give --out FOLDER")
        if self.device not in ("auto", "cpu") and not (self.device == "cuda" and torch.cuda.is_available()):
            raise ValueError(f"device={self.device!r} must be 'auto', 'cpu' or, on a machine with CUDA, 'cuda'")

    @property
    def hears(self) -> bool:
        """Whether speech has a part in it."""
        return self.audio is not None or self.settings.answer != "text"


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A run with what it needs for one request."""

    engine: GenerationEngine
    text: TextTokenizer
    speech: SpeechTokenizer | None
    decoder: SpeechDecoder | None


def generate(request: GenerationRequest) -> dict[str, Any]:
    """Print the continuations and write them to `request.out`; -> what `result.json` holds.

    Raises FileNotFoundError or ValueError on what is missing, of another tokenizer, or too long for the model.
    """
    loaded = _load(request)
    prompt = _prompt(request, loaded)
    made = loaded.engine.generate([prompt] * request.number, request.settings)
    told = [continuation(prompt, one, loaded.text, loaded.speech) for one in made]
    if request.out is not None:
        make_folder(request.out)
    for i, (one, row) in enumerate(zip(made, told)):
        ids_T = one.ids("speech")
        if loaded.decoder is not None and request.out is not None and len(ids_T):
            row["audio"] = WAV.format(i)
            (wave,) = loaded.decoder.speak([ids_T], seeds=[request.settings.seed])
            audio.save(request.out / row["audio"], wave)
    found = {
        "lm": str(request.lm),
        "prompt": {
            "text": request.text,
            "audio": None if request.audio is None else str(request.audio),
            "tokens": {s.modality: len(s.ids_T) for s in prompt},
        },
        "settings": {**config.to_dict(request.settings), "number": request.number},
        "decoder": None if request.decoder is None else str(request.decoder),
        "continuations": told,
    }
    if request.out is not None:
        write_json(request.out / RESULT, found)
    _print(request, told)
    return found


def load_engine(lm: Path, device: str = "cpu") -> tuple[GenerationEngine, LMRun]:
    """A run's model, ready to go on from prompts within the rows that it was trained on.

    Raises FileNotFoundError when the folder is no run, with the runs that lie in it.
    """
    if not (lm / RUN).is_file():
        inside = sorted(str(path.parent) for path in lm.glob(f"lm/*/{RUN}"))
        remedy = (
            f"it holds {', '.join(inside)}" if inside else "give a finished run of `train lm`, or lm/NAME of a story"
        )
        raise FileNotFoundError(f"{lm / RUN} is missing, so {lm} is no run of a language model; {remedy}")
    scorer, run = load_scorer(lm, device)
    return within_rows(scorer.engine, run), run


def within_rows(engine: GenerationEngine, run: LMRun) -> GenerationEngine:
    """The same, held to the rows that the run was trained on, where they were noted."""
    return replace(engine, row_tokens=run.tokens_per_row, row_units=run.units_per_row)


def text_behind(tokenizer: TextTokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as it goes on from that of `before`: with its space where a new word begins, without one inside a word."""
    start, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids)


def spelled(prompt: Sequence[Segment], made: Generated, tokenizer: TextTokenizer) -> list[str | None]:
    """The text of every segment, None for speech; the first goes on from the prompt's text where it is of its span."""
    goes_on = bool(prompt) and prompt[-1].modality == "text"
    before = prompt[-1].ids_T.tolist() if goes_on else []
    return [
        text_behind(tokenizer, [] if i else before, s.ids_T.tolist()) if s.modality == "text" else None
        for i, s in enumerate(made.segments)
    ]


def continuation(
    prompt: Sequence[Segment], made: Generated, text: TextTokenizer, speech: SpeechTokenizer | None
) -> dict[str, Any]:
    """One continuation as plain data. `read_back` is there when the speech tokenizer can read."""
    spans: list[dict[str, Any]] = []
    for segment, said in zip(made.segments, spelled(prompt, made, text), strict=True):
        span: dict[str, Any] = {"modality": segment.modality, "ids": segment.ids_T.tolist()}
        if said is not None:
            span["text"] = said
        elif speech is not None:
            span["seconds"] = len(segment.ids_T) / speech.frame_rate
        spans.append(span)
    if isinstance(speech, SupervisedTokenizer) and own_text_tokenizer(speech) is not None:
        spoken = [span for span in spans if span["modality"] == "speech"]
        for span, heard in zip(spoken, speech.read_back([np.array(span["ids"]) for span in spoken]), strict=True):
            span["read_back"] = heard
    return {
        "ended": made.ended,
        "tokens": made.num_tokens,
        "global_steps": made.global_steps,
        "segments": spans,
    }


def _load(request: GenerationRequest) -> _Loaded:
    device = "cuda" if request.device == "auto" and torch.cuda.is_available() else request.device
    engine, run = load_engine(request.lm, "cpu" if device == "auto" else device)
    if request.audio is not None and not run.num_speech:
        raise ValueError(f"audio={request.audio}: {request.lm} was trained on text alone; give --text")
    decoder = None if request.decoder is None else _decoder(request.decoder, request.lm, run)
    hears = request.hears and run.num_speech > 0
    speech = speech_tokenizer_of(request.lm, run, request.tokenizer) if hears else None
    if decoder is not None and speech is not None and decoder.flow.config.token_rate != speech.frame_rate:
        raise ValueError(
            f"decoder={request.decoder} has token_rate={decoder.flow.config.token_rate}, the tokenizer of {request.lm} makes "
            f"{speech.frame_rate} tokens a second; give a decoder of this tokenizer"
        )
    return _Loaded(engine=engine, text=text_tokenizer_in(request.lm, run), speech=speech, decoder=decoder)


def _decoder(folder: Path, lm: Path, run: LMRun) -> SpeechDecoder:
    """Raises ValueError when it was not made for the model's speech tokens."""
    decoder = speech_decoder.load(folder)
    decoder.flow.config.require_tokenizer(run.speech_fingerprint)
    if decoder.flow.config.codebook_size != run.num_speech:
        raise ValueError(
            f"decoder={folder} has codebook_size={decoder.flow.config.codebook_size}, {lm} has {run.num_speech} speech tokens; "
            "give a decoder of the tokenizer that made the model's shards"
        )
    return decoder


def _prompt(request: GenerationRequest, loaded: _Loaded) -> tuple[Segment, ...]:
    """The recording, then the text. Raises ValueError when a recording is broken or longer than a row."""
    segments = []
    if request.audio is not None:
        assert loaded.speech is not None
        segments.append(_heard(request.audio, loaded.speech, loaded.engine))
    if request.text.strip():
        segments.append(text_segment(loaded.text, request.text, inside=bool(segments)))
    return tuple(segments)


def _heard(path: Path, speech: SpeechTokenizer, engine: GenerationEngine) -> Segment:
    try:
        wave = audio.check(audio.load(path))
    except ValueError as error:
        raise ValueError(f"audio={path}: {error}") from error
    room_s = engine.row_tokens / speech.frame_rate
    if engine.row_tokens and engine.pieces is None and wave.duration_s > room_s:  # before an hour of it is encoded
        raise ValueError(
            f"audio={path} lasts {wave.duration_s:.1f} s, the model was trained on rows of {engine.row_tokens} tokens, "
            f"{room_s:.1f} s of speech; give a shorter recording"
        )
    wave = audio.resample(wave, speech.sample_rate)
    return Segment(modality="speech", ids_T=encode_all(speech, [wave], what=path.name)[0])


def _print(request: GenerationRequest, told: Sequence[dict[str, Any]]) -> None:
    for i, row in enumerate(told):
        print(f"{i:<9}{_line(row['segments']) or '(nothing)'}")
        print(f"         {ENDS[row['ended']]}, {row['tokens']} tokens, {row['global_steps']} steps of the large model")
        if "audio" in row and request.out is not None:
            print(f"sound    {request.out / row['audio']}")
    if request.decoder is None and any(span["modality"] == "speech" for row in told for span in row["segments"]):
        print("sound    none; give --decoder FOLDER (a speech decoder of this tokenizer) and --out FOLDER to hear it")
    print(f"results  {request.out / RESULT if request.out else 'give --out FOLDER to keep them'}")


ENDS = {
    "eos": "the model ended it",
    "marker": "the span ended",
    "limit": "max_tokens ended it",
    "row": "the row that the model was trained on is full",
}


def _line(spans: Sequence[dict[str, Any]]) -> str:
    """All spans in one line: text as it is, speech as [speech 1.2 s: "the words read back"]."""
    return " ".join(span["text"].strip() if span["modality"] == "text" else _spoken(span) for span in spans)


def _spoken(span: dict[str, Any]) -> str:
    words = f'"{span["read_back"]}"' if "read_back" in span else " ".join(map(str, span["ids"]))
    return f"[speech {span['seconds']:.1f} s: {words}]"
