"""The frame-rate study: the rates are those asked for, a small one runs to its table and figure, and is not run twice."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from speechquilt.studies.frame_rates import FrameRatesConfig, name_of, study
from speechquilt.studies.rate_figure import RatePoint, rate_svg
from speechquilt.tokenizer.whisper_sizes import RATES

SVG = "{http://www.w3.org/2000/svg}"


def tiny(run_dir: Path) -> FrameRatesConfig:
    plain = FrameRatesConfig().tokenizer
    model = replace(
        plain.model, width=32, num_heads=2, ffn_width=64, layers_below=1, layers_above=1, codebook_size=8,
        vq_warmup_updates=5,
    )  # fmt: skip
    train = replace(plain.train, steps=20, warmup_steps=2, checkpoint_every=10)
    return FrameRatesConfig(
        run_dir=str(run_dir),
        rates=(50.0, 6.25),
        codebook_sizes=(16, 32),
        sentences=40,
        held_out=6,
        tokenizer=replace(plain, model=model, train=train, batch_seconds=12.0),
    )


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_is_the_one_that_the_model_has(rate: float) -> None:
    config = FrameRatesConfig()
    recipe = config.recipe(rate)
    model = recipe.model.build()
    assert model.frame_rate == rate
    same = {"pooling": 4, "codebook_size": recipe.model.codebook_size}
    assert replace(recipe.model, **same) == replace(config.tokenizer.model, **same)  # nothing else differs


def test_a_small_study_ends_in_a_table_and_a_figure_and_is_not_repeated(tmp_path: Path) -> None:
    table = study(tiny(tmp_path))
    rows = json.loads((tmp_path / "results.json").read_text())["rates"]
    assert [(row["frame_rate"], row["bit_rate"]) for row in rows] == [(50.0, 200.0), (6.25, 31.25)]
    assert all(row["wer"] > 0 and row["wer_n"] == 6 for row in rows)
    assert rows[0]["left_out"] <= rows[1]["left_out"]
    assert [row["paper"]["bit_rate"] for row in rows] == [600, 100]
    lines = table.read_text().splitlines()
    assert lines[2].startswith("| 50 | 16 | 200 |")
    assert lines[3].endswith("| 100 | ? | ? |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert {
        (text.text or "").split(",")[0] for text in ElementTree.parse(tmp_path / "frame_rates.svg").iter(SVG + "text")
    } >= {
        "50 Hz",
        "6.25 Hz",
    }
    weights = [tmp_path / "rates" / name_of(rate) / "tokenizer" / "model.safetensors" for rate in (50.0, 6.25)]
    made = [path.stat().st_mtime_ns for path in weights]
    before = table.read_text()
    (tmp_path / "rates" / "done.json").unlink()  # killed before the last mark: the finished tokenizers stay
    assert study(tiny(tmp_path)).read_text() == before
    assert [path.stat().st_mtime_ns for path in weights] == made


def test_points_stand_where_their_numbers_say() -> None:
    points = [RatePoint(frame_rate=50 / 2**i, bit_rate=400 / 2**i, wer=0.01 * (i + 1)) for i in range(4)]
    circles = list(ElementTree.fromstring(rate_svg(points[::-1])).iter(SVG + "use"))[-4:]
    x, y = ([float(circle.attrib[key]) for circle in circles] for key in ("x", "y"))
    x, y = x[::-1], y[::-1]  # from 50 bits per second up, which is from 4 % down
    gaps = [a - b for a, b in itertools.pairwise(x)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2)  # twice the bits, one step to the right
    assert gaps[0] > 0
    assert [b - a for a, b in itertools.pairwise(y)] == pytest.approx([y[1] - y[0]] * 3, abs=0.2)
    assert y[0] > y[-1]  # 4 % stands above 1 %
    svg = rate_svg([RatePoint(frame_rate=50, bit_rate=400, wer=0.0)])
    assert "prefers-color-scheme: dark" in svg  # a file of its own brings its own colours
    assert "var(--speech)" in svg
    with pytest.raises(ValueError, match="at least one"):
        rate_svg([])


def test_settings_are_checked() -> None:
    for wrong in ({"rates": (50.0,)}, {"rates": (50.0, 50.0), "codebook_sizes": (2, 2)}):
        with pytest.raises(ValueError, match="must differ, with one of codebook_sizes"):
            FrameRatesConfig(**wrong)
    with pytest.raises(ValueError, match=r"10\.0 must be one of 50\.0, 25\.0, 12\.5, 6\.25 Hz"):
        FrameRatesConfig(rates=(10.0,), codebook_sizes=(2,))
