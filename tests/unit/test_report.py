"""The report: one file that needs nothing else, escapes everything, and prints every miss."""

import base64
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.reports import figures
from speechquilt.reports.figures import Curve, Score, UtteranceView, line_chart, mel_png, si
from speechquilt.reports.report import Audio, ReportData, Sample, SampleRun, Stage, Table, Verdict, write_report
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


def report(word="mira"):
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
    return ReportData(
        title=word,
        lead=word,
        verdicts=[
            Verdict(name=word, target=word, value="1 %", met=True, note=word),
            Verdict(name="reach", target="≤ 10 %", value="13.4 %", met=False),
        ],
        stages=[Stage(icon=icon, name=word, made=word, seconds=1.0) for icon in figures.ICONS],
        curves=[curve, replace(curve, name=word + "2")],
        curves_note=word,
        utterance=view,
        utterance_note=word,
        samples=[Sample(label=word, note=word, runs=[SampleRun(modality="text", text=word), run])],
        samples_note=word,
        table_sections=[(word, [Table(title=word, columns=[word, "S→T", "n", word], rows=[[word, score, "1", word]])])],
        audios=[Audio(label=word, wav=b"RIFFxyz", transcript=word, note=word)],
        audios_note=word,
        facts=[(word, word)],
    )


def written(tmp_path, data):
    html = write_report(tmp_path / "report.html", data).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return html, checker


def test_self_contained_and_well_formed(tmp_path):
    html, checker = written(tmp_path, report())
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
    html, checker = written(tmp_path, report(EVIL))
    assert "script" not in checker.tags
    assert not any(name.startswith("on") for name, _ in checker.attrs)
    assert checker.text.count("<script>alert('x')") >= 20
    assert html.count("<title>") == html.count("</title>")


def test_misses_are_printed_with_their_numbers(tmp_path):
    _, checker = written(tmp_path, report())
    assert "1 of 2 promised results met, 1 MISSED" in checker.text
    after = checker.text[checker.text.index("MISSED", checker.text.index("1 MISSED") + 8) :]
    assert re.search(r"MISSED\s+reach\s+13\.4 %\s+promised ≤ 10 %", after)
    all_met = ReportData(title="t", lead="l", verdicts=report().verdicts[:1])
    assert "MISSED" not in written(tmp_path, all_met)[1].text


def test_every_section_is_there_and_empty_ones_are_not(tmp_path):
    _, full = written(tmp_path, report())
    for heading in ("Pipeline", "Learning curves", "One utterance", "Interleaved samples", "Listen", "What was run"):
        assert heading in full.text
    _, empty = written(tmp_path, ReportData(title="t", lead="l"))
    assert "section" not in empty.tags


def test_audio_and_spectrogram_come_through_whole(tmp_path):
    html, _ = written(tmp_path, report())
    wav = re.search(r"data:audio/wav;base64,([^\"]+)", html)
    assert base64.b64decode(wav[1]) == b"RIFFxyz"
    png = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html)[1])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_holds_the_mel_upside_down():
    """Checks every chunk's CRC and reads the palette indices back: low bands are the last lines."""
    png, chunks, at = mel_png(np.arange(12.0).reshape(3, 4)), {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (4, 3, 8, 3, 0, 0, 0)
    assert len(chunks[b"PLTE"]) == 768
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(3, 5)[:, 1:].astype(int)
    assert (np.diff(pixels, axis=1) >= 0).all()
    assert (np.diff(pixels, axis=0) < 0).all()


@pytest.mark.parametrize("mel", [np.zeros((4, 5)), np.full((4, 5), np.nan), np.full((4, 5), -np.inf)])
def test_png_of_a_silent_or_broken_mel(mel):
    assert mel_png(mel)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e6) | st.just(float("nan")) | st.just(float("inf")), max_size=300), max_size=4)
)
def test_charts_draw_any_numbers(ys):
    svg = line_chart([(k, range(len(y)), y) for k, y in enumerate(ys)], "x")
    assert "nan" not in svg
    assert "inf" not in svg
    Checker().feed(svg)


def test_chart_ends_in_the_last_values_and_spreads_them():
    svg = line_chart([(0, [0, 1, 2], [5, 3, 2.01]), (1, [0, 1, 2], [5, 3, 2.02])], "units")
    heights = [float(y) for y in re.findall(r'class="end" x="[\d.]+" y="([\d.]+)"', svg)]
    assert ">2.01<" in svg
    assert ">2.02<" in svg
    assert abs(heights[0] - heights[1]) >= 12


def test_si():
    assert [si(x) for x in (0, 12, 1234, 1.2e6, 3.45e13)] == ["0", "12", "1.23 k", "1.2 M", "34.5 T"]


def test_bad_data_is_refused():
    with pytest.raises(ValueError, match="same number"):
        Curve(name="a", steps=[1], units=[1, 2], flops=[1], speech_loss=[1], text_loss=[1])
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table(title="t", columns=["a", "b"], rows=[["x"]])
    with pytest.raises(ValueError, match="2 entries for 1 ids"):
        SampleRun(modality="speech", text="", ids_T=[1], opens_T=[True, True])
    with pytest.raises(ValueError, match="known icons: world"):
        figures.stage_icon("wrld")
    with pytest.raises(ValueError, match="patching 'static'"):
        UtteranceView(
            mel_MF=np.zeros((2, 2)), duration_s=1, words=[], ids_T=[1], frame_rate=12.5, patchings={"static": []}
        )
