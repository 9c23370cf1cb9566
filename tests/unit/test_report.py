"""The pages: files that need nothing else, escape everything, open with the result, and print every miss."""

import base64
import builtins
import io
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speechquilt.evals.measures import Chart, Measure, Promise, Verdict, at_most, si
from speechquilt.evals.results import Schema
from speechquilt.reports import charts
from speechquilt.reports.charts import Curve, Point, UtteranceView, histogram, interval_chart, line_chart
from speechquilt.reports.page import FOLD, Score, Table, write_page
from speechquilt.reports.result_tables import result_tables, score_charts
from speechquilt.reports.story_page import (
    Audio,
    IntervalChart,
    Sample,
    SampleRun,
    Stage,
    StoryPage,
    write_story_page,
)
from speechquilt.types import AlignedWord

EVIL = """<script>alert('x')</script>" onload='y' & é"""
VOID = {"meta", "br", "img", "input", "hr", "link"}


class Checker(HTMLParser):
    """Every tag closed in order; collects tags, attributes and visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attrs, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def page(word="mira"):
    n = 9
    curve = Curve(
        name=word,
        steps=range(1, 501),
        units=[100.0 * k for k in range(1, 501)],
        flops=[1e9 * k for k in range(1, 501)],
        speech_loss=[6 / k + 2 for k in range(1, 501)],
        text_loss=[float("nan")] * 499 + [1.25],
    )
    view = UtteranceView(
        mel_MF=np.random.default_rng(0).normal(size=(20, 70)),
        duration_s=0.7,
        words=[AlignedWord(text=word, start_s=0.1, end_s=0.5)],
        ids_T=list(range(n)),
        frame_rate=12.5,
        patchings={word: [t % 4 == 0 for t in range(n)]},
    )
    run = SampleRun(modality="speech", text=word, ids_T=range(n), opens_T=[t % 4 == 0 for t in range(n)])
    score = Score(value=0.75, low=0.6, high=0.85, chance=0.5)
    points = [Point(row=word, series=f"{word}{k}", value=0.5, low=0.4, high=0.6, chance=0.25) for k in range(2)]
    chart = IntervalChart(title=word, points=points, note=word)
    return StoryPage(
        title=word,
        sentences=[word, word, word],
        headline=chart,
        verdicts=[
            Verdict(name=word, target=word, value="1 %", met=True, note=word),
            Verdict(name="reach", target="≤ 10 %", value="13.4 %", met=False),
        ],
        stages=[Stage(name=word, made=word, seconds=1.0), Stage(name=word, made=word)],
        curves=[curve, replace(curve, name=word + "2")],
        curves_note=word,
        utterance=view,
        utterance_note=word,
        samples=[Sample(label=word, note=word, runs=[SampleRun(modality="text", text=word), run])] * 2,
        samples_note=word,
        scores=[chart],
        scores_note=word,
        table_sections=[(word, [Table(title=word, columns=[word, "S→T", "n", word], rows=[[word, score, "1", word]])])],
        audios=[Audio(label=word, wav=b"RIFFxyz", transcript=word, note=word)],
        audios_note=word,
        facts=[(word, word)],
    )


def written(tmp_path, data):
    html = write_story_page(tmp_path / "report.html", data).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return html, checker


def test_self_contained_and_well_formed(tmp_path):
    html, checker = written(tmp_path, page())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    for name, value in checker.attrs:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), value
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert ("content", "width=device-width, initial-scale=1") in checker.attrs


def test_everything_is_escaped(tmp_path):
    """The same evil string in every text of the data: no tag and no attribute of it survives."""
    html, checker = written(tmp_path, page(EVIL))
    assert "script" not in checker.tags
    assert not any(name.startswith("on") for name, _ in checker.attrs)
    assert checker.text.count("<script>alert('x')") >= 20
    assert html.count("<title>") == html.count("</title>")


def test_misses_are_printed_with_their_numbers(tmp_path):
    _, checker = written(tmp_path, page())
    assert "1 of 2 promised results met, 1 MISSED" in checker.text
    after = checker.text[checker.text.index("MISSED", checker.text.index("1 MISSED") + 8) :]
    assert re.search(r"MISSED\s+reach\s+13\.4 %\s+promised ≤ 10 %", after)
    all_met = StoryPage(title="t", sentences=["l"], verdicts=page().verdicts[:1])
    assert "MISSED" not in written(tmp_path, all_met)[1].text


def test_every_section_is_there_and_empty_ones_are_not(tmp_path):
    _, full = written(tmp_path, page())
    for heading in ("Pipeline", "Learning curves", "One utterance", "Interleaved samples", "Listen", "What was run"):
        assert heading in full.text
    _, empty = written(tmp_path, StoryPage(title="t", sentences=["l"]))
    assert "section" not in empty.tags


def test_audio_and_spectrogram_come_through_whole(tmp_path):
    html, _ = written(tmp_path, page())
    wav = re.search(r"data:audio/wav;base64,([^\"]+)", html)
    assert base64.b64decode(wav[1]) == b"RIFFxyz"
    png = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html)[1])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"


def drawn_pixels(mel_MF):
    """The spectrogram's brightness as it is seen, top line first."""
    n = 3
    view = UtteranceView(mel_MF=mel_MF, duration_s=0.24, words=[], ids_T=range(n), frame_rate=12.5)
    svg = charts.utterance_chart(view)
    found = re.search(r'<image ([^>]*)href="data:image/png;base64,\s*([^"]+)"([^>]*)>', svg)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[2]))).convert("L")).astype(int)
    matrix = re.search(r"matrix\(([^)]*)\)|scale\(([^)]*)\)", found[1] + found[3])
    numbers = [float(x) for x in re.split(r"[ ,]+", (matrix[1] or matrix[2]).strip())] if matrix else [1, 0, 0, 1]
    return pixels[::-1] if numbers[3 if len(numbers) > 2 else -1] < 0 else pixels


def test_the_mel_is_drawn_upside_down():
    """Every pixel is there, and low bands are the last lines."""
    pixels = drawn_pixels(np.arange(12.0).reshape(3, 4))
    assert pixels.shape == (3, 4)
    assert (np.diff(pixels, axis=1) >= 0).all()
    assert (np.diff(pixels, axis=0) < 0).all()


@pytest.mark.parametrize("mel", [np.zeros((4, 5)), np.full((4, 5), np.nan), np.full((4, 5), -np.inf)])
def test_a_silent_or_broken_mel_is_drawn(mel):
    assert drawn_pixels(mel).shape == (4, 5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e6) | st.just(float("nan")) | st.just(float("inf")), max_size=300), max_size=4)
)
def test_charts_draw_any_numbers(ys):
    svg = line_chart([(str(k), range(len(y)), y) for k, y in enumerate(ys)], "x")
    assert "nan" not in svg
    assert "inf" not in svg
    Checker().feed(svg)


def end_heights(svg, *ends):
    """Where the labels of the last values stand."""
    return [float(re.search(rf'<text [^>]*\by="([\d.]+)"[^>]*>{end}<', svg)[1]) for end in ends]


def test_chart_ends_in_the_last_values_and_spreads_them():
    svg = line_chart([("a", [0, 1, 2], [5, 3, 2.01]), ("b", [0, 1, 2], [5, 3, 2.02])], "units")
    assert ">2.01<" in svg
    assert ">2.02<" in svg
    heights = end_heights(svg, "2.01", "2.02")
    assert abs(heights[0] - heights[1]) >= 12


def test_many_ends_in_one_place_stay_apart():
    lines = [(f"run {k}", [0, 1, 2], [5, 3, 2 + k / 100]) for k in range(6)]
    heights = sorted(end_heights(line_chart(lines, "units"), *(f"{2 + k / 100:.2f}" for k in range(6))))
    assert min(np.diff(heights)) >= 12


def test_every_chart_takes_its_colours_from_the_page():
    """No colour of its own but those of the spectrogram and the white lines on it: it reads in light and in dark."""
    _, points = page(), [Point(row="$a_1$", series=s, value=0.5, low=0.4, high=0.6) for s in "ab"]
    view = charts.utterance_chart(page().utterance)
    lines = line_chart([("a", [0, 1], [2, 1])], "x")
    for svg in (view, lines, interval_chart(points, "x"), histogram({1: 2, 3: 4}, "x", "text")):
        assert "var(--" in svg
        bare = re.sub(r'"data:[^"]*"', "", svg)
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", bare)) <= ({"#ffffff"} if svg is view else set())
        assert "font-family" not in bare
        checker = Checker()
        checker.feed(svg)
        checker.close()
        assert not checker.open
    assert "$a_1$" in interval_chart(points, "x")  # no TeX
    odd = "font-family: #0a0b05 xlink:href > id="
    assert f">{escape(odd)}<" in interval_chart([replace(points[0], row=odd), points[1]], "x")  # texts are left alone
    with pytest.raises(ValueError, match="unknown colour 'speach'; did you mean speech"):
        charts.colour("speach")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install speechquilt\[report\]"):
        line_chart([("a", [0, 1], [2, 1])], "x")


def test_the_page_opens_with_the_chart_and_what_follows_is_in_order(tmp_path):
    html, _ = written(tmp_path, page())
    found = [
        html.index(part) for part in ('<svg class="chart"', "<nav>", 'id="utterance"', 'id="samples"', 'id="listen"')
    ]
    found += [html.index(part) for part in ('id="promises"', 'id="curves"', 'id="scores"', "<table")]
    assert found == sorted(found)


@pytest.mark.parametrize("rows", [FOLD, FOLD + 1])
def test_tables_of_more_than_ten_rows_are_folded(tmp_path, rows):
    table = Table(title="t", columns=["a", "b"], rows=[[f"r{k}", "1"] for k in range(rows)])
    html, checker = written(tmp_path, StoryPage(title="t", sentences=[], table_sections=[("Tables", [table])]))
    assert ('<details class="table">' in html) == (rows > 10)
    assert "open" not in dict(checker.attrs)
    assert f"r{rows - 1}" in checker.text


def test_a_value_that_a_template_misses_is_an_error(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="title"):
        write_page(tmp_path / "p.html", "base.html")


def test_a_declared_measure_is_in_its_table_its_chart_and_its_promise(tmp_path):
    """Nothing but its declaration says so."""
    where = {"run": ("b",), "pair": ("ST",)}
    promise = Promise(name="noise of <run>, <pair>", bound=at_most(0.2), where=where)
    schema = Schema(
        (
            Measure(
                key="x.<run>.<pair>.noise",
                kind="share",
                meaning="how loud",
                promise=promise,
                chart=Chart(title="Noise"),
            ),
            Measure(key="x.<run>.<pair>.low", kind="share", meaning="lower end"),
            Measure(key="x.<run>.<pair>.high", kind="share", meaning="upper end"),
            Measure(key="y.<run>.loudness", kind="amount", unit="dB", meaning="mean level"),
            Measure(key="z.words", kind="count", meaning="words heard"),
        )
    )
    flat = {f"x.{run}.ST.{key}": v for run in "ab" for key, v in {"noise": 0.5, "low": 0.4, "high": 0.6}.items()}
    flat |= {"y.a.loudness": 12.5, "y.b.loudness": 13.0, "z.words": 1234}
    tables = result_tables(schema, flat, {"x.<run>.<pair>": "Noise by run"}, order=("b", "a"))
    assert [(t.title, [row[0] for row in t.rows]) for t in tables] == [
        ("Noise by run", ["b", "a"]),
        ("y.<run>", ["b", "a"]),
        ("z", ["words"]),
    ]
    assert tables[0].rows[0][1] == Score(value=0.5, low=0.4, high=0.6)
    assert tables[1].rows[1] == ["a", "12.5 dB"]
    assert tables[2].rows[0] == ["words", "1,234", "words heard"]
    (chart,) = score_charts(schema, flat)
    assert [(p.row, p.series, p.value, p.low) for p in chart.points] == [("S→T", "a", 0.5, 0.4), ("S→T", "b", 0.5, 0.4)]
    story = StoryPage(title="t", sentences=[], verdicts=schema.verdicts(flat), table_sections=[("Tables", tables)])
    _, checker = written(tmp_path, story)
    assert re.search(r"MISSED\s+noise of b,\s+S\s+→\s+T\s+50\.0 % \[40, 60\]\s+promised ≤ 20 %", checker.text)


def test_si():
    assert [si(x) for x in (0, 12, 1234, 1.2e6, 3.45e13)] == ["0", "12", "1.23 k", "1.2 M", "34.5 T"]


def test_bad_data_is_refused():
    with pytest.raises(ValueError, match="same number"):
        Curve(name="a", steps=[1], units=[1, 2], flops=[1], speech_loss=[1], text_loss=[1])
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table(title="t", columns=["a", "b"], rows=[["x"]])
    with pytest.raises(ValueError, match="2 entries for 1 ids"):
        SampleRun(modality="speech", text="", ids_T=[1], opens_T=[True, True])
    with pytest.raises(ValueError, match="patching 'static'"):
        UtteranceView(
            mel_MF=np.zeros((2, 2)), duration_s=1, words=[], ids_T=[1], frame_rate=12.5, patchings={"static": []}
        )
