"""Text corpora as slices: every document exactly once whatever the slices, and what is broken is counted."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.interleaving.synthetic import split_words
from speechquilt.data.sources.text_files import TextReader, open_corpus, parts, read_texts
from speechquilt.types import Reject, TextDocument


def read(source: Path | str, *, slice_bytes: int = 2**20, **keywords) -> list[TextDocument | Reject]:
    """All documents and rejects of a corpus, slice by slice; checks that the shares of a slice rise to 1."""
    corpus = open_corpus(str(source))
    reader = TextReader(root=str(corpus.root), **keywords)
    found = []
    column = keywords.get("text_column", "text")
    for piece in corpus.slices(text_column=column, slice_bytes=slice_bytes):
        rows = list(reader.read(json.loads(json.dumps(piece))))  # slices travel as JSON
        shares = [row.share for row in rows]
        assert shares == sorted(shares)
        assert all(0 <= share <= 1 for share in shares)
        found += [row.found for row in rows]
    return found


def texts(found: list[TextDocument | Reject]) -> dict[str, str]:
    return {d.id: d.text for d in found if isinstance(d, TextDocument)}


def reasons(found: list[TextDocument | Reject]) -> dict[str, str]:
    return {r.id: r.reason for r in found if isinstance(r, Reject)}


LINES = st.lists(
    st.tuples(st.text(max_size=30), st.sampled_from(["\n", "\r\n", "\n\n", "\r\n \n"])), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, final=st.booleans(), slice_bytes=st.integers(1, 200), escape=st.booleans())
def test_slices_of_lines_cover_a_file_exactly_once(tmp_path_factory, lines, final, slice_bytes, escape):
    """Line ends of both kinds, blank lines, no final newline, characters of several bytes, line separators inside texts."""
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    rows = [json.dumps({"text": f"a{text}"}, ensure_ascii=escape) + end for text, end in lines]
    data = "".join(rows) if final else "".join(rows).rstrip("\r\n ")
    path.write_bytes(data.encode())
    slices = list(open_corpus(str(path)).slices(slice_bytes=slice_bytes))
    assert [s["start"] for s in slices] == [0, *(s["stop"] for s in slices[:-1])]
    assert slices[-1]["stop"] == path.stat().st_size
    found = read(path, slice_bytes=slice_bytes)
    assert [d.text for d in found] == [f"a{text}" for text, _ in lines]
    assert found == read(path)  # ids too


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 40), group=st.integers(1, 40), batch=st.integers(1, 40), slice_bytes=st.integers(1, 2000)
)
def test_slices_of_tables_cover_them_exactly_once(tmp_path_factory, num_rows, group, batch, slice_bytes):
    folder = tmp_path_factory.mktemp("tables")
    table = pa.table({"text": pa.array([f"text {'x' * i}" for i in range(num_rows)], pa.string())})
    pq.write_table(table, folder / "x.parquet", row_group_size=group)
    with pa.OSFile(str(folder / "y.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=batch)
    expected = {f"{name}:{i}": f"text {'x' * i}" for name in ("x.parquet", "y.arrow") for i in range(num_rows)}
    found = read(folder, slice_bytes=slice_bytes)
    assert list(texts(found).items()) == list(expected.items())
    assert len(found) == len(expected)


def test_large_row_groups_are_several_slices(tmp_path):
    pq.write_table(pa.table({"text": ["word " * 100] * 64}), tmp_path / "x.parquet", use_dictionary=False)
    slices = list(open_corpus(str(tmp_path)).slices(slice_bytes=8000))
    assert len(slices) > 3
    assert slices[0]["group"] == slices[-1]["group"] == 0


def test_fineweb_edu_rows_keep_their_ids(tmp_path):
    """The schema of FineWeb-Edu, other columns are not read."""
    names = [
        "text",
        "id",
        "dump",
        "url",
        "file_path",
        "language",
        "language_score",
        "token_count",
        "score",
        "int_score",
    ]
    row = {name: ["x", "y"] for name in names}
    row.update(text=["One page.", "Another page."], id=["<urn:uuid:1>", "<urn:uuid:2>"])
    pq.write_table(pa.table(row), tmp_path / "000_00000.parquet")
    assert texts(read(tmp_path)) == {"<urn:uuid:1>": "One page.", "<urn:uuid:2>": "Another page."}


def test_every_kind_in_one_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_bytes("\ufeffplain  text\r\n".encode())
    (tmp_path / "b.md").write_text("more")
    (tmp_path / "c.jsonl").write_text('{"id": 7, "text": "seven"}\n')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as packed:
        packed.write('{"text": "packed"}\n{"text": "twice"}\n')
    (tmp_path / "e.jsonl.zst").write_bytes(pa.compress(b'{"text": "dense"}\n', "zstd", asbytes=True))
    (tmp_path / "ignored.json").write_text("{}")
    assert texts(read(tmp_path)) == {
        "b.md": "more",
        "7": "seven",
        "d.jsonl.gz@0": "packed",
        "d.jsonl.gz@19": "twice",
        "e.jsonl.zst@0": "dense",
        "deep/a.txt": "plain  text\r\n",  # byte for byte, but for the byte order mark
    }


def test_small_text_files_share_a_slice(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 30)
    slices = list(open_corpus(str(tmp_path)).slices(slice_bytes=100))
    assert [len(s["paths"]) for s in slices] == [3, 3, 3, 1]


def test_a_data_set_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra `corpora`")
    data = datasets.Dataset.from_dict({"text": [f"page {i}" for i in range(5)], "id": list("abcde")})
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"left over")
    assert texts(read(tmp_path / "saved")) == dict(zip("abcde", (f"page {i}" for i in range(5))))


def test_a_state_of_something_else_hides_no_table(tmp_path):
    table = pa.table({"text": ["one"]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "state.json").write_text('{"step": 3}')
    assert texts(read(tmp_path)) == {"x.arrow:0": "one"}


def test_a_data_set_by_its_name(tmp_path, monkeypatch):
    """A folder has a name for `load_dataset` too; nothing is downloaded."""
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra `corpora`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = texts(read(f"hub:{tmp_path / 'mine'}"))
    assert list(found.values()) == ["one", "two"]
    assert not any(str(tmp_path) in id for id in found)  # the same ids on every machine


def test_documents_without_a_name_are_named_by_their_place(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"id": "", "text": "two"}\n{"id": 0, "text": "three"}\n')
    pq.write_table(pa.table({"text": ["four", "five"], "id": ["", None]}), tmp_path / "y.parquet")
    assert list(texts(read(tmp_path))) == ["x.jsonl@0", "x.jsonl@16", "0", "y.parquet:0", "y.parquet:1"]


def test_a_whole_corpus_in_order_and_in_one_piece(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 5000)
    (tmp_path / "b.md").write_text("   ")
    (tmp_path / "c.jsonl").write_text('{"id": 7, "text": "seven"}\nnot json\n')
    found = list(read_texts(str(tmp_path)))
    assert texts(found) == {"a.txt": "word " * 5000, "7": "seven"}
    assert reasons(found) == {"b.md": "empty text", "c.jsonl@27": "not JSON"}


BROKEN_LINES = [
    (b'{"text": "good"}', None),
    (b"{not json}", "not JSON"),
    (b"[1, 2]", "no `text`"),
    (b'{"txt": "x"}', "no `text`"),
    (b'{"text": 5}', "the text is not a string"),
    (b'{"text": null}', "empty text"),
    (b'{"text": " \\n "}', "empty text"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"text": "half \\ud83d"}', "not UTF-8"),
    (b'{"text": null, "id": "half \\ud83d"}', "empty text"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
]


def test_broken_lines_are_counted_and_the_others_read(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(line for line, _ in BROKEN_LINES))
    found = read(tmp_path, slice_bytes=50)
    assert [r.reason if isinstance(r, Reject) else None for r in found] == [reason for _, reason in BROKEN_LINES]
    assert len({r.id.encode() for r in found}) == len(BROKEN_LINES)  # and each can be written to a file


def test_texts_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("fine")
    found = read(tmp_path)
    assert reasons(found) == {"a.txt": "not UTF-8", "b.txt": "empty text"}
    assert texts(found) == {"c.txt": "fine"}


def test_tables_with_bad_cells(tmp_path):
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": pa.chunked_array([not_utf8, pa.array(["good", None])])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    found = read(tmp_path)
    assert texts(found) == {"a.parquet:1": "good"}
    assert reasons(found) == {
        "a.parquet:0": "not UTF-8",
        "a.parquet:2": "empty text",
        "b.parquet:0": "the text is not a string",
        "b.parquet:1": "the text is not a string",
    }


def damaged(tmp_path: Path, name: str, data: bytes) -> list[TextDocument | Reject]:
    (tmp_path / name).write_bytes(data)
    return read(tmp_path / name, slice_bytes=400)


def test_truncated_and_damaged_files_are_counted(tmp_path):
    """What can be read before the damage is read."""
    rows = [f"row {i} of some length" for i in range(100)]
    table = pa.table({"text": rows})
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=10, compression="none", use_dictionary=False)
    whole = (tmp_path / "whole.parquet").read_bytes()
    assert reasons(damaged(tmp_path, "cut.parquet", whole[:-50])) == {"cut.parquet": "damaged file"}
    hurt = bytearray(whole)
    hurt[4:40] = bytes(36)  # the header of the first page
    found = damaged(tmp_path, "hurt.parquet", bytes(hurt))
    assert set(reasons(found).values()) == {"damaged file"}
    assert [d.text for d in found if isinstance(d, TextDocument)] == rows[10:]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    packed = {".gz": gzip.compress(lines), ".zst": pa.compress(lines, "zstd", asbytes=True)}
    for suffix, data in packed.items():
        found = damaged(tmp_path, f"cut.jsonl{suffix}", data[: len(data) // 2])
        assert list(reasons(found).values()) == ["damaged file"]
        kept = [d.text for d in found if isinstance(d, TextDocument)]
        assert kept == rows[: len(kept)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    data = sink.getvalue().to_pybytes()
    found = damaged(tmp_path, "cut.arrow", data[: len(data) // 2])
    assert list(reasons(found).values()) == ["damaged file"]
    kept = [d.text for d in found if isinstance(d, TextDocument)]
    assert kept == rows[: len(kept)]
    assert kept


def test_a_file_that_went_away_is_no_broken_document(tmp_path):
    for name, write in (
        ("x.txt", lambda path: path.write_text("text")),
        ("x.jsonl", lambda path: path.write_text('{"text": "x"}')),
        ("x.parquet", lambda path: pq.write_table(pa.table({"text": ["x"]}), path)),
    ):
        write(tmp_path / name)
        (piece,) = open_corpus(str(tmp_path / name)).slices()
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError):
            list(TextReader(root=str(tmp_path)).read(piece))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a text file"):
        open_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no text; files that end in"):
        open_corpus(str(tmp_path))
    pq.write_table(pa.table({"content": ["x"], "url": ["u"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has no column 'text', only content, url; .*--text-column"):
        list(open_corpus(str(tmp_path)).slices())
    assert texts(read(tmp_path, text_column="content")) == {"x.parquet:0": "x"}
    with pytest.raises(ValueError, match="slice_bytes=0 must be at least 1"):
        list(open_corpus(str(tmp_path)).slices(slice_bytes=0))
    with pytest.raises(ValueError, match="max_words=0 must be at least 1"):
        TextReader(root="", max_words=0)


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "bee", "東", "."]), max_size=60),
    spaces=st.lists(st.sampled_from([" ", "\n", "\n\n", " \r\n \r\n"]), min_size=60, max_size=60),
    max_words=st.integers(1, 12),
)
def test_parts_joined_are_the_document(words, spaces, max_words):
    text = "".join(word + space for word, space in zip(words, spaces))
    made = list(parts(TextDocument(id="d", text=text), max_words))
    assert "".join(part.text for part in made) == text
    num_words = [len(split_words(part.text)) for part in made]
    assert max(num_words, default=0) <= max_words
    assert sum(num_words) == len(split_words(text))
    assert [part.id for part in made] == (["d"] if len(made) == 1 else [f"d/part{i}" for i in range(len(made))])


def test_parts_end_with_paragraphs_then_lines_then_words():
    def lengths(text: str) -> list[int]:
        return [len(part.text.split()) for part in parts(TextDocument(id="d", text=text), 10)]

    paragraph = "a b c d e f g"
    assert lengths("\n\n".join([paragraph] * 3)) == [7, 7, 7]
    assert lengths("\n".join([paragraph] * 3)) == [7, 7, 7]
    assert lengths("a b c d e f\n\ng h\ni j k l") == [6, 6]  # the paragraph before the line
    assert lengths("a b\n\n" + " ".join("abcdefghijkl")) == [10, 4]  # too early: half of a part is the least
    assert lengths(" ".join("abcdefghijklmnopqrstuvwxyz")) == [10, 10, 6]
