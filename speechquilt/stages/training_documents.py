"""The kinds of training documents, each from what it needs, written as shards.

Trap: an ASR or TTS pair opens with its instruction, because without one it would look like an interleaved document that
repeats itself (spec synthetic-interleaved, 6.2).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechquilt import config
from speechquilt.data.interleaving import synthetic
from speechquilt.data.shards.documents import ShardWriter
from speechquilt.data.shards.parquet import Item, ItemWriter, ShardInfo
from speechquilt.data.shards.spoken import SpokenWriter
from speechquilt.evals.measures import Measure
from speechquilt.protocols import TextToToken
from speechquilt.text import TextTokenizer
from speechquilt.types import AlignedTokens, Document, Reject, Segment, SpokenSpan, TextDocument
from speechquilt.vocab import Vocab

INSTRUCTIONS = {"asr": "transcribe:", "tts": "say:"}
SOURCES = ("text", "speech", "asr", "tts", "interleaved", "parallel")
MEASURES = (
    Measure(key="shards.<source>.documents", kind="count", meaning="documents of this source"),
    Measure(key="shards.<source>.speech_tokens", kind="count", meaning="speech tokens of this source"),
    Measure(key="shards.<source>.text_tokens", kind="count", meaning="text tokens of this source"),
    Measure(key="shards.<source>.rejects", kind="count", meaning="items that did not become documents"),
    Measure(key="shards.<source>.ratio", kind="share", meaning="realised share of words that became speech"),
)


def text_fingerprint(tokenizer: TextTokenizer) -> str:
    """What shards store of the text tokenizer."""
    return config.fingerprint(tokenizer.json)


def shard_info(vocab: Vocab, tokenizer: TextTokenizer, speech_fingerprint: str, **made_by: object) -> ShardInfo:
    return ShardInfo(
        num_text=vocab.num_text,
        num_speech=vocab.num_speech,
        text_fingerprint=text_fingerprint(tokenizer),
        speech_fingerprint=speech_fingerprint,
        made_by=dict(made_by),
    )


def write_documents(
    folder: Path, info: ShardInfo, documents: Iterable[tuple[Document, str] | Reject]
) -> dict[str, int]:
    """Write all documents (with their text) and count the rejects; returns documents, rejects and tokens by modality."""
    return _write(ShardWriter(folder, info, overwrite=True), documents)


def write_spoken(folder: Path, info: ShardInfo, spoken: Iterable[tuple[AlignedTokens, str]]) -> dict[str, int]:
    """Write what a run will interleave at load time, as `write` does. These shards hold no text tokens."""
    return _write(SpokenWriter(folder, replace(info, num_text=0, text_fingerprint=""), overwrite=True), spoken)


def _write(writer: ItemWriter[Item], items: Iterable[tuple[Item, str] | Reject]) -> dict[str, int]:
    with writer:
        for item in items:
            if isinstance(item, Reject):
                writer.reject(item.id, item.reason, item.detail)
            else:
                writer.write(*item)
    counts = {f"{modality}_tokens": n for modality, n in writer.num_tokens.items()}
    return {"documents": writer.num_documents, "rejects": sum(writer.rejects.values()), **counts}


def text_documents(texts: Iterable[TextDocument], tokenizer: TextTokenizer) -> Iterable[tuple[Document, str]]:
    for text in texts:
        yield Document(id=text.id, source="text", segments=(text_segment(tokenizer, text.text),)), text.text


def speech_documents(spoken: Iterable[AlignedTokens]) -> Iterable[tuple[Document, str]]:
    for tokens in spoken:
        yield Document(id=tokens.id, source="speech", segments=(tokens.segment(),)), tokens.text


def pair_documents(
    task: str, spoken: Iterable[AlignedTokens], tokenizer: TextTokenizer
) -> Iterable[tuple[Document, str]]:
    """`task` "asr": instruction, speech -> text; "tts": instruction and text -> speech. Loss on the target alone."""
    for tokens in spoken:
        if task == "asr":
            context = [text_segment(tokenizer, INSTRUCTIONS["asr"], loss=False), tokens.segment(loss=False)]
            target = text_segment(tokenizer, tokens.text, inside=True)
        else:
            context = [text_segment(tokenizer, f"{INSTRUCTIONS['tts']} {tokens.text}", loss=False)]
            target = tokens.segment()
        yield Document(id=f"{task}/{tokens.id}", source=task, segments=(*context, target)), tokens.text


def spoken_texts(spoken: Iterable[AlignedTokens]) -> Iterable[tuple[AlignedTokens, str]]:
    """What parallel interleaving cuts into blocks: the recordings whose words have times."""
    return ((tokens, tokens.text) for tokens in spoken if tokens.has_word_times)


def interleaved_documents(
    texts: Sequence[TextDocument],
    speaker: TextToToken,
    tokenizer: TextTokenizer,
    passes: int,
    settings: synthetic.InterleaveConfig,
    stats: synthetic.InterleaveStats,
    chunk: int = 512,
) -> Iterable[tuple[Document, str]]:
    """Plain text `passes` times with other spans spoken each time; documents in chunks, so memory stays small."""
    plans = (
        (text, synthetic.plan(text.id, text.text, pass_index, settings))
        for pass_index in range(passes)
        for text in texts
    )
    progress = tqdm(total=passes * len(texts), desc="interleave", unit="doc", mininterval=5.0)
    while batch := [p for _, p in zip(range(chunk), plans)]:
        for (text, plan), spans in zip(batch, speak_spans([plan for _, plan in batch], speaker)):
            document = synthetic.assemble(plan, spans, tokenizer.encode_run, frame_rate=speaker.frame_rate, stats=stats)
            yield document, text.text
        progress.update(len(batch))
    progress.close()


def speak_spans(plans: Sequence[synthetic.InterleavePlan], speaker: TextToToken) -> list[list[SpokenSpan]]:
    """The spans of all plans in one call, so that its rows stay full -> those of each plan."""
    texts = [(span, plan.seed + i) for plan in plans for i, span in enumerate(plan.spoken_spans)]
    spoken = iter(speaker.generate([text for text, _ in texts], [seed for _, seed in texts]))
    return [[next(spoken) for _ in plan.spans] for plan in plans]


def text_segment(tokenizer: TextTokenizer, text: str, *, loss: bool = True, inside: bool = False) -> Segment:
    """A text as it is; `inside`: it does not open its document, so a space stands before it."""
    ids = tokenizer.encode_inside(text) if inside else tokenizer.encode(text)
    return Segment(modality="text", ids_T=np.asarray(ids, dtype=np.int32), loss=loss)
