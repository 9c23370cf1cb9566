"""The page of a story: what happened in three sentences and one chart, then what the tokens are, then every number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from speechquilt.evals.measures import Verdict
from speechquilt.reports import charts
from speechquilt.reports.charts import Curve, Point, UtteranceView
from speechquilt.reports.page import Table, write_page
from speechquilt.types import Modality

MAX_TOKENS = 72  # speech tokens shown of one run of a sample; the rest is counted


@dataclass(frozen=True, kw_only=True)
class IntervalChart:
    """Scores with their intervals. `note`: how to read it. `paints`: colours of the series, in turn."""

    title: str
    points: Sequence[Point]
    note: str = ""
    paints: Sequence[str] = charts.RUNS


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline; `made` says what came out; `seconds` None when it was not run this time."""

    name: str
    made: str
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """One span of an interleaved sample. Text: its `text`. Speech: the `text` read back from its tokens, the ids, and
    per token whether it opens a patch (empty: every token does) and whether it ends a word (empty: unknown)."""

    modality: Modality
    text: str
    ids_T: Sequence[int] = ()
    opens_T: Sequence[bool] = ()
    word_end_T: Sequence[bool] = ()

    def __post_init__(self) -> None:
        for name in ("opens_T", "word_end_T"):
            if len(getattr(self, name)) not in (0, len(self.ids_T)):
                raise ValueError(f"sample run: {name} has {len(getattr(self, name))} entries for {len(self.ids_T)} ids")

    @property
    def patches(self) -> list[list[tuple[int, bool]]]:
        """The first `MAX_TOKENS` tokens as patches of (id, whether it ends a word)."""
        found: list[list[tuple[int, bool]]] = []
        for t, i in enumerate(self.ids_T[:MAX_TOKENS]):
            if t == 0 or not len(self.opens_T) or self.opens_T[t]:  # without patches every token is a unit
                found.append([])
            found[-1].append((i, bool(len(self.word_end_T) and self.word_end_T[t])))
        return found

    @property
    def hidden(self) -> int:
        return max(0, len(self.ids_T) - MAX_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document of the training data."""

    label: str
    runs: Sequence[SampleRun]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """A player: `wav` is the content of a WAV file, `transcript` what is (meant to be) heard."""

    label: str
    wav: bytes
    transcript: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StoryPage:
    """Everything the page shows, in the order of its sections; an empty part leaves its section out.

    `sentences`: what happened, beside `headline`. `curves`: one per training run. `table_sections`: heading -> tables.
    `facts`: what was run, as (name, value): config, machine, versions.
    """

    title: str
    sentences: Sequence[str]
    headline: IntervalChart | None = None
    utterance: UtteranceView | None = None
    utterance_note: str = ""
    samples: Sequence[Sample] = ()
    samples_note: str = ""
    audios: Sequence[Audio] = ()
    audios_note: str = ""
    verdicts: Sequence[Verdict] = ()
    curves: Sequence[Curve] = ()
    curves_note: str = ""
    scores: Sequence[IntervalChart] = ()
    scores_note: str = ""
    table_sections: Sequence[tuple[str, Sequence[Table]]] = ()
    stages: Sequence[Stage] = ()
    facts: Sequence[tuple[str, str]] = ()

    @property
    def promises(self) -> str:
        met = sum(v.met for v in self.verdicts)
        missed = len(self.verdicts) - met
        return f"{met} of {len(self.verdicts)} promised results met" + (f", {missed} MISSED" if missed else "")


def write_story_page(path: Path, page: StoryPage) -> Path:
    """Write one HTML file that needs no other file and no network; returns its path."""
    return write_page(
        path,
        "story.html",
        page=page,
        title=page.title,
        headline=_intervals(page.headline) if page.headline else None,
        utterance=charts.utterance_chart(page.utterance) if page.utterance else None,
        curves=_curves(page.curves),
        scores=[(chart, _intervals(chart)) for chart in page.scores],
        longest_s=max((stage.seconds or 0 for stage in page.stages), default=0) or 1,
        total_s=sum(stage.seconds or 0 for stage in page.stages),
    )


def _intervals(chart: IntervalChart) -> Markup:
    return charts.interval_chart(chart.points, chart.title, chart.paints)


def _curves(curves: Sequence[Curve]) -> list[tuple[Modality, Markup]]:
    """Loss of both modalities against global units and against compute."""
    modalities: tuple[Modality, ...] = ("speech", "text") if curves else ()
    axes = (("units", "global units seen in training"), ("flops", "training compute, FLOPs"))
    return [
        (m, charts.line_chart([(c.name, getattr(c, axis), getattr(c, f"{m}_loss")) for c in curves], label))
        for m in modalities
        for axis, label in axes
    ]
