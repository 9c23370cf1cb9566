"""A page about a folder of shards: its numbers, small histograms, and documents coloured by modality with their words.

Trap: texts come from corpora that nobody has read; the templates escape all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from speechquilt.evals.measures import si
from speechquilt.reports import charts
from speechquilt.reports.page import Table, write_page
from speechquilt.text import spoken_form
from speechquilt.types import Modality

MAX_TEXT = 6000  # characters of an original text that are shown

UnitKind = Literal["word", "silence", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A word or silence of a spoken run: its local ids, its `text` when known, and after how many ids a piece ends."""

    kind: UnitKind
    ids_T: Sequence[int]
    text: str = ""
    pieces: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one modality. `text`: what is written or was to be spoken, "" when unknown; speech has its `units` and what
    was `heard` in its tokens (None: nobody listened)."""

    modality: Modality
    text: str
    num_tokens: int
    units: Sequence[Unit] = ()
    heard: str | None = None

    @property
    def names(self) -> list[str]:
        return [unit.text for unit in self.units if unit.text]

    @property
    def written(self) -> str:
        """What is written, where the boxes do not say it: not told word by word, or spoken in another form."""
        return self.text if self.text.split() != self.names else ""

    @property
    def misheard(self) -> str | None:
        """What was heard, where it is not what was said."""
        if self.heard is None or spoken_form(self.heard) == spoken_form(" ".join(self.names) or self.text):
            return None
        return self.heard or "nothing"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document with the original `text` behind it."""

    id: str
    source: str
    text: str
    runs: Sequence[Run]

    @property
    def shortened(self) -> str:
        return self.text if len(self.text) <= MAX_TEXT else self.text[:MAX_TEXT] + " …"

    @property
    def untold(self) -> bool:
        """Whether a run of text is unknown, so that its words stand in the original text alone."""
        return any(run.modality == "text" and not run.text for run in self.runs)


HISTOGRAMS: dict[str, tuple[str, str]] = {  # name of `inspect`'s lengths -> (title, colour)
    "document_tokens": ("tokens per document", "muted"),
    "text_run_tokens": ("text tokens per text run", "text"),
    "speech_run_words": ("words per spoken run", "speech"),
    "speech_run_tokens": ("speech tokens per spoken run", "speech"),
    "speech_unit_tokens": ("speech tokens per word or silence", "speech"),
}


def write_shard_page(
    path: Path,
    title: str,
    found: Mapping[str, Any],
    lengths: Mapping[str, Mapping[int, int]],
    samples: Sequence[Sample],
) -> Path:
    """Write one HTML file that needs no other file and no network; returns its path.

    `found`: what `inspect --json` prints; `lengths`: how often each length came, by the names in `HISTOGRAMS`.
    """
    tokens = found["tokens"]
    total = max(1, tokens["text"] + tokens["speech"])
    drawn = [(*HISTOGRAMS[name], counts) for name, counts in lengths.items() if sum(counts.values()) > 1]
    return write_page(
        path,
        "shards.html",
        title=title,
        numbers=_numbers(found),
        shares=[(m, tokens[m] / total) for m in ("text", "speech") if tokens[m]],
        samples=samples,
        charts=[(label, charts.histogram(counts, label, colour)) for label, colour, counts in drawn],
        tables=_tables(found),
        facts={**{k: v for k, v in found["info"].items() if k != "made_by"}, **found["info"]["made_by"]},
    )


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(colour, value, what it is) of the cards at the top."""
    tokens, ratio = found["tokens"], found["stage"].get("ratio", found["ratio"])
    noise = found["noise"].get("all")
    numbers = [
        ("", si(found["documents"]), found["kind"]),
        ("text", si(tokens["text"]), "text tokens"),
        ("speech", si(tokens["speech"]), "speech tokens"),
        ("", _duration(found["speech_seconds"]), "of speech"),
        ("", "" if ratio is None else f"{ratio:.1%}", "of the words are speech"),
        ("", _figure(found["speech_tokens_per_word"]), "speech tokens per word"),
        ("", _figure(found["words_per_second"]), "words per second"),
        ("", _figure(found["tokens_per_unit"]), "tokens per word or silence"),
        ("", f"{noise['wer']:.1%}" if noise else "", "word errors when read back"),
        ("", si(sum(found["rejects"].values())), "rejected"),
    ]
    return [number for number in numbers if number[1]]


def _tables(found: Mapping[str, Any]) -> list[Table]:
    sources = [
        [name, f"{s['documents']}", f"{s['text_tokens']}", f"{s['speech_tokens']}", _share(s["ratio"])]
        for name, s in found["sources"].items()
    ]
    columns = ["source", "documents", "text tokens", "speech tokens", "words spoken"]
    note = "Words spoken: word ends in the speech against words of the original texts, of documents that hold both."
    tables = [Table(title="By source", columns=columns, rows=sources, note=note)]
    lengths = [
        [HISTOGRAMS[name][0], f"{of['mean']:.1f}", f"{of['p5']}", f"{of['p50']}", f"{of['p95']}", f"{of['most']}"]
        for name, of in found["lengths"].items()
        if of["n"]
    ]
    tables.append(Table(title="Lengths", columns=["", "mean", "5 %", "median", "95 %", "most"], rows=lengths))
    noise = [
        [kind, f"{of['wer']:.1%}", f"{of['low']:.1%} – {of['high']:.1%}", f"{of['spans']}", f"{of['words']}"]
        for kind, of in found["noise"].items()
    ]
    note = "A sample of the spoken spans, read back by the speech tokenizer's ASR head; its own errors are included."
    title, columns = "Noise by kind of text", ["kind", "WER", "95 % interval", "spans", "words"]
    tables.append(Table(title=title, columns=columns, rows=noise, note=note))
    for title, counts in (
        ("Rejected documents", found["rejects"]),
        ("Spans left as text", found["stage"].get("rejects") or {}),
        ("Words that cannot be spoken", found["stage"].get("unspeakable") or {}),
    ):
        rows = [[reason, f"{n}"] for reason, n in sorted(counts.items(), key=lambda item: -item[1])]
        tables.append(Table(title=title, columns=["reason", "count"], rows=rows))
    return [table for table in tables if table.rows]


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
