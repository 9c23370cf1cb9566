"""What every story's page shows of its models: curves, an utterance under its tokens, training documents and sound.

Trap: what is read back is the tokenizer's opinion of its own tokens; a wrong word may be the reader's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.feed.spoken_documents import as_documents
from speechquilt.data.shards.spoken import open_shards
from speechquilt.model.patcher import PatcherConfig
from speechquilt.protocols import Patcher
from speechquilt.reports.charts import Curve, UtteranceView
from speechquilt.reports.story_page import Audio, Sample, SampleRun
from speechquilt.stages.encode import encode_utterances
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.metrics import read_metrics
from speechquilt.types import Document, Segment, Utterance
from speechquilt.vocab import Vocab


def curve(folder: Path, name: str) -> Curve:
    """What `metrics.jsonl` of a language model's run tells."""
    lines = read_metrics(folder)

    def column(key: str) -> list[float]:
        return [float("nan") if line.get(key) is None else line[key] for line in lines]

    return Curve(
        name=name,
        steps=column("step"),
        units=column("total_units"),
        flops=column("total_flops"),
        speech_loss=column("speech_loss"),
        text_loss=column("text_loss"),
    )


def utterance_view(spoken: Utterance, tokenizer: SupervisedTokenizer, patch_size: int) -> UtteranceView:
    """A recording with word times, its tokens, and how static and aligned patches group them."""
    (tokens,) = encode_utterances(tokenizer, [spoken])
    wave = audio.resample(spoken.audio, tokenizer.sample_rate)
    mel_MF = audio.LogMel(num_mels=80, mode="stream")(torch.from_numpy(wave.samples_S)[None])[0].numpy()
    segment = Segment(modality="speech", ids_T=tokens.ids_T, unit_end_T=tokens.unit_end_T)
    vocab = Vocab(num_text=1, num_speech=tokenizer.vocab_size)
    patchers = {name: PatcherConfig(kind=name, patch_size=patch_size).build() for name in ("static", "aligned")}
    return UtteranceView(
        mel_MF=mel_MF,
        duration_s=wave.duration_s,
        words=spoken.alignment,
        ids_T=tokens.ids_T.tolist(),
        frame_rate=tokenizer.frame_rate,
        patchings={name: _opens(vocab, segment, patcher) for name, patcher in patchers.items()},
    )


def samples(
    shards: Mapping[str, Path], tokenizer: SupervisedTokenizer, texts: TextTokenizer, patch_size: int, each: int = 2
) -> list[Sample]:
    """`each` documents of every source, evenly spaced, in static patches; `texts` spells their text."""
    vocab = Vocab(num_text=texts.size, num_speech=tokenizer.vocab_size)
    static = PatcherConfig(kind="static", patch_size=patch_size).build()
    found = []
    for source, path in shards.items():
        folder = open_shards(path)
        documents = as_documents(folder, texts.encode_run)
        for i in np.linspace(0, len(folder) - 1, each + 2, dtype=int)[1:-1].tolist():
            runs = []
            for segment in documents[i].segments:
                if segment.modality == "text":
                    runs.append(SampleRun(modality="text", text=texts.decode(segment.ids_T.tolist())))
                    continue
                runs.append(
                    SampleRun(
                        modality="speech",
                        text=tokenizer.read_back([segment.ids_T])[0],
                        ids_T=segment.ids_T.tolist(),
                        opens_T=_opens(vocab, segment, static),
                        word_end_T=() if segment.unit_end_T is None else (segment.unit_end_T > 0).tolist(),
                    )
                )
            found.append(Sample(label=f"{source}: {folder[i].id}", runs=runs, note=folder.text(i)))
    return found


def audios(recordings: Mapping[str, Utterance], tokenizer: SupervisedTokenizer) -> list[Audio]:
    """Players, by label, each with what its tokens are read back as."""
    spoken: Sequence[Utterance] = list(recordings.values())
    heard = tokenizer.read_back([t.ids_T for t in encode_utterances(tokenizer, spoken)])
    return [
        Audio(
            label=label,
            wav=audio.to_wav_bytes(audio.resample(u.audio, tokenizer.sample_rate)),
            transcript=u.text,
            note=f"read back from its tokens: {text}",
        )
        for (label, u), text in zip(recordings.items(), heard)
    ]


def _opens(vocab: Vocab, segment: Segment, patcher: Patcher) -> list[bool]:
    """Patch borders of one speech segment standing alone."""
    out = vocab.lay_out(Document(id="view", segments=(segment,), source="view"))
    return patcher(out, 0.0)[0][out.is_speech_T].tolist()
