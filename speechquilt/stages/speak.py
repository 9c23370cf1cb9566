"""Sound out of a run: a text spoken by its text-to-token model, a recording made again from its tokens.

A story's folder holds all parts under their usual names; each can also be given by itself.
"""

from dataclasses import dataclass
from pathlib import Path

from speechquilt import audio
from speechquilt.decoder import speech_decoder
from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import encode_all
from speechquilt.text_to_token import network
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer import loading
from speechquilt.types import SpokenSpan, Waveform

TOKENIZER, TEXT_TO_TOKEN, DECODER = "tokenizer", "text_to_token", "decoder"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Folders of the parts, as far as they are needed."""

    run: Path | None = None
    """Folder of a finished story, which holds all parts."""
    tokenizer: Path | None = None
    """Speech tokenizer; none: that of the run."""
    text_to_token: Path | None = None
    """Text-to-token model; none: that of the run."""
    decoder: Path | None = None
    """Speech decoder; none: that of the run."""

    def folder(self, part: str) -> Path:
        """Where it is. Raises ValueError when neither it nor a run was named."""
        given: Path | None = getattr(self, part)
        if given is None and self.run is None:
            flag = part.replace("_", "-")
            raise ValueError(f"{part} is not set; give --run FOLDER of a finished story, or --{flag} FOLDER")
        return given if given is not None else self.run / part  # type: ignore[operator]


def said(text: str, parts: Parts, engine: EngineConfig, seed: int = 0) -> tuple[Waveform, SpokenSpan]:
    """The sound of a text, and its tokens. Raises ValueError for an empty text, one that the text-to-token model will not
    say, or parts that do not belong together."""
    if not text.strip():
        raise ValueError("text is empty; give a sentence to say")
    loaded = network.load(parts.folder(TEXT_TO_TOKEN))
    decoder = speech_decoder.load(parts.folder(DECODER))
    num_codes = loaded.model.vocab.num_speech
    if num_codes != decoder.flow.config.codebook_size:
        raise ValueError(
            f"the text-to-token model writes {num_codes} codes, the decoder hears {decoder.flow.config.codebook_size}; "
            "give parts that were trained with the same tokenizer"
        )
    (span,) = engine.build(loaded.model, loaded.tokenizer).generate([text], [seed])
    if span.reject:
        raise ValueError(f"the text-to-token model does not say {text[:80]!r}: {span.reject}; say it in other words")
    return decoder.speak([span.ids_T], [seed])[0], span


def made_again(wav: Waveform, parts: Parts, seed: int = 0) -> Waveform:
    """A recording as its tokens sound. Raises ValueError on audio that cannot be used and on parts of two tokenizers."""
    tokenizer: SpeechTokenizer = loading.load(parts.folder(TOKENIZER))
    decoder: SpeechDecoder = speech_decoder.load(parts.folder(DECODER))
    decoder.flow.config.require_tokenizer(tokenizer.fingerprint)
    heard = audio.resample(audio.check(wav), tokenizer.sample_rate)
    return decoder.speak(encode_all(tokenizer, [heard]), [seed])[0]
