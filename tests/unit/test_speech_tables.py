"""Tables of recordings: every form says the same, nothing that is in one is lost, and no two rows share a sound."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_rows import list_audio, sound_of, text_of
from tests.spoken_files import dump, faults, good, heard, wave, write


@pytest.mark.parametrize(
    "form", [".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"]
)
@pytest.mark.parametrize("name", ["metadata", "list"])
def test_every_form_of_table_says_the_same(tmp_path: Path, form: str, name: str) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.wav", seed=i)
    dump(tmp_path, name + form, [{"file_name": f"{i}.wav", "text": f"text {i}"} for i in range(3)])
    for source in (tmp_path, tmp_path / (name + form)):
        rows = list(list_audio(source))
        assert [(row["id"], row["text"]) for row in rows] == [(f"{i}.wav", f"text {i}") for i in range(3)]
        assert all(row["where"].startswith(name + form) for row in rows)
        for i, row in enumerate(rows):
            np.testing.assert_allclose(heard(tmp_path, row), wave(seed=i), atol=1e-4)


FIELD = st.text("ab ,;\"'é\n", min_size=1, max_size=8).map(lambda text: f"x{text}x")


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(FIELD, min_size=1, max_size=6), delimiter=st.sampled_from(",;"))
@example(texts=['a "quoted" word', "two\nlines"], delimiter=",")
def test_what_a_csv_writer_wrote_is_read(tmp_path_factory, texts: list[str], delimiter: str) -> None:
    import csv

    folder = tmp_path_factory.mktemp("csv")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("file_name", "text"), *((f"{i}.wav", text) for i, text in enumerate(texts))])
    assert [row["text"] for row in list_audio(folder)] == [text.strip() for text in texts]


@settings(max_examples=80, deadline=None)
@given(
    stray=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["start", "end"])), min_size=1, max_size=3, unique=True)
)
def test_no_stray_quote_loses_a_row(tmp_path_factory, stray: list[tuple[int, str]]) -> None:
    """All rows with their own texts, or an error that names a line that holds such a quote."""
    folder = tmp_path_factory.mktemp("stray")
    lines = []
    for i in range(10):
        before, behind = ('"' if (i, end) in stray else "" for end in ("start", "end"))
        lines.append(f"{i}.wav,{before}text {i}{behind}\n")
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    try:
        rows = list(list_audio(folder))
    except ValueError as error:
        named = int(str(error).split(" line ")[1].split(":")[0])
        assert named - 2 in {i for i, _ in stray}
    else:
        assert [row["text"].strip('"') for row in rows] == [f"text {i}" for i in range(10)]


def test_broken_rows_are_faults_with_their_line(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    lines = [
        b"file_name,text,start,end",
        b"a.wav,hello,0,0.1",
        b"a.wav,one, two,0.1,0.2",
        b"b.wav,caf\xe9",
        b"c.wav,x,5,soon",
        b"d.wav,x,2,1",
    ]
    (tmp_path / "metadata.csv").write_bytes(b"\n".join(lines))
    rows = list(list_audio(tmp_path))
    assert [row["id"] for row in good(rows)] == ["a.wav#0-0.1"]
    assert list(faults(rows).values()) == [
        "more fields than columns",
        "not UTF-8",
        "start, end or duration is no time",
        "start, end or duration is no time",
    ]
    assert [row["detail"].split(":")[0] for row in rows[1:]] == [f"metadata.csv line {i}" for i in (3, 4, 5, 6)]


def test_a_utf16_table_needs_its_mark(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.wav,größe\n".encode("utf-16"))
    assert [row["text"] for row in list_audio(tmp_path)] == ["größe"]
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.wav,größe\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="NUL characters: UTF-16 without its mark"):
        list(list_audio(tmp_path))


def test_a_table_without_paths_or_damaged_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("name,words\nx,hello\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: its first line 'name,words' names no column of paths"):
        list(list_audio(tmp_path))
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl.gz").write_bytes(gzip.compress(b'{"path": "a.wav"}\n' * 100)[:-10])
    with pytest.raises(ValueError, match=r"metadata\.jsonl\.gz is damaged"):
        list(list_audio(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="truncated or damaged"):
        list(list_audio(tmp_path / "x.parquet"))


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=60) | st.text('a,;|\t"{}[]:\n\0é', max_size=60).map(str.encode),
    name=st.sampled_from(
        ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.jsonl.gz", "metadata.csv.zst"]
    ),
    header=st.booleans(),
)
@example(data=b"\r\x01", name="metadata.csv", header=False)
@example(data=b'{"path": "\\u0000"}\n', name="metadata.jsonl", header=False)
@example(data=b'{"path": "' + b"a" * 5000 + b'"}\n', name="metadata.jsonl", header=False)
def test_any_table_gives_rows_or_says_why_not(tmp_path_factory, data: bytes, name: str, header: bool) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes((b"file_name,text\n" if header else b"") + data)
    try:
        rows = list(list_audio(folder))
    except ValueError:
        with pytest.raises(ValueError, match=rf"{name}|holds no audio"):
            list(list_audio(folder))
        return
    json.dumps(rows, ensure_ascii=False).encode()
    for row in good(rows):
        with pytest.raises(BrokenAudio, match="missing file"):
            sound_of(folder, row)
        text_of(folder, {**row, "text": "x"})


# --- one file, one id, many rows


ROWS = st.lists(
    st.fixed_dictionaries({"file": st.sampled_from("ab"), "id": st.sampled_from(["", "", "i", "j"]), "text": st.sampled_from("xy"), "part": st.sampled_from([None, 0, 1])}),
    min_size=1,
    max_size=7,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(rows=ROWS)
def test_no_two_rows_share_a_sound_or_an_id(tmp_path_factory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    table = []
    for row in rows:
        part = {} if row["part"] is None else {"start": row["part"], "end": row["part"] + 1}
        table.append(
            {"path": f"{row['file']}.wav", "text": row["text"], **({"id": row["id"]} if row["id"] else {}), **part}
        )
    dump(folder, "metadata.jsonl", table)
    found = list(list_audio(folder))
    assert len(found) == len(rows)
    kept = good(found)
    assert len({row["id"] for row in kept}) == len(kept)
    assert len({(row["path"], row.get("start")) for row in kept}) == len(kept)
    texts: dict[tuple[str, Any], set[str]] = {}
    for row in table:
        texts.setdefault((row["path"], row.get("start")), set()).add(row["text"])
    for row in kept:  # what is contradicted is kept by nobody
        assert len(texts[row["path"], row.get("start")]) == 1
    assert set(faults(found).values()) <= {"several rows for one recording", "duplicate id"}
