"""Shards: documents come back as they were written, and every kind of damage is named."""

import json
import os
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.shards import parquet
from speechquilt.data.shards.documents import ShardFolder, ShardWriter, read_documents
from speechquilt.data.shards.parquet import MANIFEST, SCHEMA_VERSION, ShardInfo, is_complete
from speechquilt.types import Document, Segment, UnitEnd

INFO = ShardInfo(
    num_text=100, num_speech=50, text_fingerprint="text-a", speech_fingerprint="speech-a", made_by={"stage": "test"}
)


@st.composite
def segments(draw):
    modality = draw(st.sampled_from(["text", "speech"]))
    ids = draw(st.lists(st.integers(0, 99 if modality == "text" else 49), max_size=12))
    ends = draw(st.none() | st.lists(st.sampled_from(UnitEnd), min_size=len(ids), max_size=len(ids)))
    return Segment(
        modality=modality,
        ids_T=np.asarray(ids, dtype=np.int32),
        unit_end_T=None if ends is None or modality == "text" else np.asarray(ends, dtype=np.uint8),
        loss=draw(st.booleans()),
    )


documents = st.builds(
    Document,
    id=st.text(max_size=8),
    segments=st.lists(segments(), max_size=4).map(tuple),
    source=st.sampled_from(["a", "b"]),
)


def assert_same(a: Document, b: Document) -> None:
    assert (a.id, a.source, len(a.segments)) == (b.id, b.source, len(b.segments))
    for x, y in zip(a.segments, b.segments):
        assert (x.modality, x.loss) == (y.modality, y.loss)
        assert y.ids_T.dtype == np.int32
        np.testing.assert_array_equal(x.ids_T, y.ids_T)
        assert (x.unit_end_T is None) == (y.unit_end_T is None)
        if x.unit_end_T is not None:
            assert y.unit_end_T.dtype == np.uint8
            np.testing.assert_array_equal(x.unit_end_T, y.unit_end_T)


def plain(i: int) -> Document:
    return Document(id=f"d{i}", source="a", segments=(Segment(modality="text", ids_T=np.arange(i % 7)),))


def write(folder, docs, rejected=(), **options):
    with ShardWriter(folder, INFO, **options) as writer:
        for document in docs:
            writer.write(document, text=f"text of {document.id}")
        for id in rejected:
            writer.reject(id, "empty audio")


@settings(max_examples=25, deadline=None)
@given(docs=st.lists(documents, max_size=9), per_shard=st.integers(1, 4), mapped=st.booleans())
def test_round_trip(tmp_path_factory, docs, per_shard, mapped):
    folder = tmp_path_factory.mktemp("shards")
    write(folder, docs, documents_per_shard=per_shard)
    shards = ShardFolder(folder, mapped=mapped)
    assert len(shards) == len(docs)
    assert len(list(folder.glob("*.parquet"))) == -(-len(docs) // per_shard)
    assert not list(folder.glob("*.tmp"))
    for i in reversed(range(len(docs))):  # random access, not only in order
        assert_same(docs[i], shards[i])
        assert shards.text(i) == f"text of {docs[i].id}"
    assert [d.id for d in read_documents(folder)] == [d.id for d in docs]
    assert shards.info == INFO
    tokens = shards.manifest["tokens"]
    assert tokens.get("text", 0) == sum(d.num_tokens("text") for d in docs)
    assert tokens.get("speech", 0) == sum(d.num_tokens("speech") for d in docs)


def test_other_tools_read_the_files(tmp_path):
    write(tmp_path / "s", [plain(3)])
    table = pq.read_table(tmp_path / "s" / "shard-00000.parquet")
    assert table.column_names == ["id", "source", "modality", "ids", "unit_end", "loss", "text"]
    assert json.loads(table.schema.metadata[b"speechquilt"])["info"]["speech_fingerprint"] == "speech-a"


def test_shards_are_read_lazily(tmp_path, monkeypatch):
    write(tmp_path / "s", [plain(i) for i in range(9)], documents_per_shard=3)
    shards = ShardFolder(tmp_path / "s")
    read = []
    real = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path: read.append(path.name) or real(path))
    assert shards[4].id == "d4"
    assert shards[5].id == "d5"
    assert read == ["shard-00001.parquet"]
    for outside in (-1, 9):
        with pytest.raises(IndexError, match="which has 9"):
            shards[outside]


def test_missing_and_unfinished_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage"):
        ShardFolder(tmp_path / "nowhere")
    folder = tmp_path / "killed"

    class Killed(Exception):
        pass

    def doomed():
        yield plain(1)
        raise Killed

    with pytest.raises(Killed):
        write(folder, doomed(), documents_per_shard=1)
    assert not is_complete(folder)
    with pytest.raises(FileNotFoundError, match="did not finish"):
        ShardFolder(folder)
    (folder / "shard-00007.parquet.tmp").write_bytes(b"half")
    write(folder, [plain(2)])  # the second run starts clean
    assert [d.id for d in read_documents(folder)] == ["d2"]
    assert is_complete(folder)
    assert not list(folder.glob("*.tmp"))


def test_a_finished_folder_is_not_replaced_by_accident(tmp_path):
    write(tmp_path / "s", [plain(1)])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(tmp_path / "s", [plain(2)])
    write(tmp_path / "s", [plain(2)], overwrite=True)
    assert [d.id for d in read_documents(tmp_path / "s")] == ["d2"]


def test_truncated_file_is_named(tmp_path):
    write(tmp_path / "s", [plain(i) for i in range(50)])
    path = tmp_path / "s" / "shard-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is truncated.*run the stage"):
        ShardFolder(tmp_path / "s")
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # right size, no footer
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is truncated"):
        ShardFolder(tmp_path / "s")[0]
    path.unlink()
    with pytest.raises(ValueError, match="has 0 bytes"):
        ShardFolder(tmp_path / "s")


def test_a_shard_from_another_folder_is_refused(tmp_path):
    other = ShardInfo(num_text=100, num_speech=50, text_fingerprint="text-b", speech_fingerprint="speech-a")
    write(tmp_path / "s", [plain(1)])
    with ShardWriter(tmp_path / "t", other) as writer:
        writer.write(plain(1))
    data = (tmp_path / "t" / "shard-00000.parquet").read_bytes()
    (tmp_path / "s" / "shard-00000.parquet").write_bytes(data)
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    manifest["shards"][0]["bytes"] = len(data)
    (tmp_path / "s" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="metadata"):
        ShardFolder(tmp_path / "s")[0]


def test_a_shard_with_other_rows_is_refused(tmp_path):
    for name, count in (("s", 2), ("t", 3)):
        write(tmp_path / name, [plain(i) for i in range(count)])
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    manifest["shards"][0]["bytes"] = (tmp_path / "t" / "shard-00000.parquet").stat().st_size
    (tmp_path / "s" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "t" / "shard-00000.parquet").rename(tmp_path / "s" / "shard-00000.parquet")
    with pytest.raises(ValueError, match="its rows"):
        ShardFolder(tmp_path / "s")[0]


def test_damaged_or_newer_manifest(tmp_path):
    write(tmp_path / "s", [plain(1)])
    path = tmp_path / "s" / MANIFEST
    good = path.read_text()
    path.write_text(good[:40])
    with pytest.raises(ValueError, match=r"shards\.json is truncated"):
        ShardFolder(tmp_path / "s")
    path.write_text(good.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 9'))
    with pytest.raises(ValueError, match="schema_version 9"):
        ShardFolder(tmp_path / "s")


def test_tokenizers_are_checked(tmp_path):
    write(tmp_path / "s", [plain(1)])
    shards = ShardFolder(tmp_path / "s")
    shards.check(speech_fingerprint="speech-a", text_fingerprint="text-a")
    with pytest.raises(ValueError, match=r"speech tokenizer 'speech-a'.*'speech-b'.*make the shards again"):
        shards.check(speech_fingerprint="speech-b", text_fingerprint="text-a")
    with pytest.raises(ValueError, match=r"text tokenizer 'text-a'.*'text-b'"):
        shards.check(speech_fingerprint="speech-a", text_fingerprint="text-b")


def test_text_only_shards_fit_every_speech_tokenizer(tmp_path):
    info = ShardInfo(num_text=100, num_speech=0, text_fingerprint="text-a", speech_fingerprint="")
    with ShardWriter(tmp_path / "s", info) as writer:
        writer.write(plain(1))
    ShardFolder(tmp_path / "s").check(speech_fingerprint="any", text_fingerprint="text-a")


def test_rejects_are_kept_counted_and_limited(tmp_path):
    with ShardWriter(tmp_path / "s", INFO, max_reject_ratio=0.5) as writer:
        writer.write(plain(1))
        writer.reject("clip 7", "empty audio")
    lines = [json.loads(line) for line in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert lines == [{"id": "clip 7", "reason": "empty audio"}]
    assert ShardFolder(tmp_path / "s").manifest["rejects"] == {"empty audio": 1}
    with pytest.raises(ValueError, match=r"2 of 3 items.*max_reject_ratio=0\.5.*empty audio"):
        write(tmp_path / "t", [plain(1)], rejected=["clip 0", "clip 1"], max_reject_ratio=0.5)
    assert not is_complete(tmp_path / "t")
    assert len((tmp_path / "t" / "rejects.jsonl").read_text().splitlines()) == 2


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write shards to .*choose a folder"):
        write(tmp_path / "file" / "s", [plain(1)])


def test_full_disk_leaves_no_shard(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match=r"cannot write .*shard-00000\.parquet.*No space"):
        write(tmp_path / "s", [plain(1)])
    assert not is_complete(tmp_path / "s")


def test_ids_outside_the_vocabulary_are_refused_when_written(tmp_path):
    bad = Document(id="x", source="a", segments=(Segment(modality="speech", ids_T=np.asarray([50])),))
    with pytest.raises(ValueError, match=r"document 'x': speech ids span 50\.\.50.*0\.\.49"):
        write(tmp_path / "s", [bad])


def test_reading_in_order_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    """Counted where shards are read and where they are freed."""
    write(tmp_path / "s", [plain(i) for i in range(9)], documents_per_shard=2)
    read_one, alive, most = parquet._read_shard, weakref.WeakSet(), []

    class Counted:
        def __init__(self, shard):
            self.shard = shard

        def item(self, row):
            return self.shard.item(row)

    def counting(*arguments):
        most.append(len(alive))
        alive.add(counted := Counted(read_one(*arguments)))
        return counted

    monkeypatch.setattr(parquet, "_read_shard", counting)
    for document, expected in zip(ShardFolder(tmp_path / "s").in_order(), map(plain, range(9)), strict=True):
        assert_same(expected, document)
    assert len(most) == 5
    assert max(most) <= 1  # the one before, until the new one has its name


def test_mapped_shards_stay_out_of_memory(tmp_path):
    """What Arrow has allocated after all documents were read and kept: everything, or nothing."""
    segments = (Segment(modality="text", ids_T=np.arange(500) % 100),)
    write(
        tmp_path / "s",
        [Document(id=str(i), source="a", segments=segments) for i in range(800)],
        documents_per_shard=100,
    )
    list(ShardFolder(tmp_path / "s", mapped=True).in_order())  # makes the copies

    def allocated(mapped: bool) -> int:
        before = pa.total_allocated_bytes()
        folder = ShardFolder(tmp_path / "s", mapped=mapped)
        kept = [folder[i] for i in range(800)]
        assert len(kept) == 800
        return pa.total_allocated_bytes() - before

    assert allocated(mapped=False) > 800 * 500 * 4
    assert allocated(mapped=True) < 100_000


def test_the_copy_of_a_mapped_shard_is_made_once_and_again_for_a_new_shard(tmp_path):
    folder, copy = tmp_path / "s", tmp_path / "s" / "shard-00000.arrow"
    write(folder, [plain(3)])
    assert ShardFolder(folder, mapped=True)[0].id == "d3"
    made = copy.stat().st_mtime_ns
    assert ShardFolder(folder, mapped=True)[0].id == "d3"
    assert copy.stat().st_mtime_ns == made
    stale = copy.read_bytes()
    write(folder, [plain(4)], overwrite=True)
    assert not copy.exists()
    copy.write_bytes(stale)
    os.utime(copy, ns=(0, 0))
    assert ShardFolder(folder, mapped=True)[0].id == "d4"


def test_a_damaged_or_unwritable_copy_is_named(tmp_path, monkeypatch):
    folder, copy = tmp_path / "s", tmp_path / "s" / "shard-00000.arrow"
    write(folder, [plain(i) for i in range(50)])
    copy.write_bytes(b"ARROW1 and no more")
    with pytest.raises(ValueError, match=r"shard-00000.arrow is damaged .* delete it"):
        ShardFolder(folder, mapped=True)[0]
    copy.unlink()
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="mapped shards need room beside them"):
        ShardFolder(folder, mapped=True)[0]
    assert not list(folder.glob("*.tmp"))


def failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_reject_says_more_to_people_than_what_is_counted(tmp_path):
    with ShardWriter(tmp_path / "s", INFO, max_reject_ratio=1) as writer:
        writer.reject("a", "missing file", "table.csv line 7: a.wav is missing")
        writer.reject("b", "missing file", "table.csv line 8: b.wav is missing")
    lines = [json.loads(line) for line in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert [line["detail"] for line in lines] == [
        f"table.csv line {n}: {f}.wav is missing" for n, f in ((7, "a"), (8, "b"))
    ]
    assert ShardFolder(tmp_path / "s").manifest["rejects"] == {"missing file": 2}
