"""Shards: a folder of Parquet files of Documents, with the fingerprints of the tokenizers that made them.

pandas and DuckDB read the files as they are. `ItemWriter` and `ItemFolder` hold the discipline for any kind of item:
Documents here, spoken texts in `spoken`.
Trap: a folder counts only when `shards.json` is there. It is written last, so a stage that was killed leaves a folder
that is refused, never one that is silently short.
"""

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechquilt.types import Modality

SCHEMA_VERSION = 2
MANIFEST = "shards.json"
REJECTS = "rejects.jsonl"
_METADATA_KEY = b"speechquilt"
_ROWS = 256  # items in memory at once where a folder is read from end to end


class Identified(Protocol):
    """What every stored item has."""

    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


@dataclass(frozen=True, kw_only=True)
class ShardKind(Generic[Item]):
    """How items of one kind lie in Parquet."""

    name: str
    """What the items are called."""
    schema: pa.Schema
    """Columns of a file: `id`, `text` (the words behind the item, for people) and those of the kind itself."""
    columns: Callable[[list[Item]], dict[str, list[Any]]]
    """items -> values of all columns but `text`."""
    open: Callable[[dict[str, Any]], Callable[[int], Item]]
    """The arrays of one shard by column name -> "row -> item"."""
    ids_of: Callable[[Item], Iterable[tuple[Modality, np.ndarray]]]
    """Item -> its runs of LOCAL ids, which are counted and checked."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the ids of a folder of shards mean."""

    num_text: int
    """Size of the text tokenizer's vocabulary; 0 in shards without text tokens."""
    num_speech: int
    """Size of the speech tokenizer's codebook."""
    text_fingerprint: str
    """Of the text tokenizer that made the ids; "" in shards without text tokens."""
    speech_fingerprint: str
    """Of the speech tokenizer that made the ids; "" in shards without speech tokens."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Plain JSON data about the stage that wrote the shards (its name, its config)."""


def is_complete(folder: Path) -> bool:
    """Whether a writer finished this folder; a stage that finds True has nothing to do."""
    return (Path(folder) / MANIFEST).is_file()


class ItemWriter(Generic[Item]):
    """Writes items of one kind to `folder` as `shard-00000.parquet` ...; use it in a `with` block.

    Every file is written under a temporary name and renamed; `shards.json` comes last, when the block ends well.
    Left-overs of an unfinished run are removed; a finished folder is only replaced with `overwrite=True`.
    Raises OSError when the folder cannot be written, FileExistsError when it is finished, and ValueError at the end when
    rejects / (documents + rejects) is above `max_reject_ratio` (the folder then stays unfinished).
    """

    kind: ShardKind[Item]  # a subclass names it

    def __init__(
        self,
        folder: Path,
        info: ShardInfo,
        *,
        documents_per_shard: int = 10_000,
        max_reject_ratio: float = 0.1,
        overwrite: bool = False,
    ) -> None:
        if documents_per_shard < 1:
            raise ValueError(f"documents_per_shard={documents_per_shard} must be at least 1")
        if not 0 <= max_reject_ratio <= 1:
            raise ValueError(f"max_reject_ratio={max_reject_ratio} must be between 0 and 1")
        self.folder, self.info = Path(folder), info
        self.documents_per_shard, self.max_reject_ratio, self.overwrite = (
            documents_per_shard,
            max_reject_ratio,
            overwrite,
        )
        self.num_documents = 0
        self.num_tokens: Counter[str] = Counter()  # by modality
        self.rejects: Counter[str] = Counter()  # by reason
        self._pending: list[tuple[Item, str]] = []
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        if is_complete(self.folder) and not self.overwrite:
            raise FileExistsError(f"{self.folder} already holds finished shards; delete it or pass overwrite=True")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            for old in [
                old for left in ("shard-*.parquet", "shard-*.arrow", "*.tmp") for old in self.folder.glob(left)
            ]:
                old.unlink()
            self._rejects_file = (self.folder / REJECTS).open("w", encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"cannot write shards to {self.folder} ({error}); choose a folder that you may write to"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._rejects_file.close()

    def write(self, item: Item, text: str = "") -> None:
        """Add one item; `text` is the original text, kept for inspection. Raises ValueError on an id out of range."""
        for modality, ids_T in self.kind.ids_of(item):
            limit = self.info.num_text if modality == "text" else self.info.num_speech
            if ids_T.size and (ids_T.min() < 0 or ids_T.max() >= limit):
                raise ValueError(
                    f"document {item.id!r}: {modality} ids span {ids_T.min()}..{ids_T.max()}, but the shard's "
                    f"info allows 0..{limit - 1}; give ShardInfo the sizes of the tokenizers that made the ids"
                )
            self.num_tokens[modality] += ids_T.size
        self._pending.append((item, text))
        self.num_documents += 1
        if len(self._pending) == self.documents_per_shard:
            self._write_shard()

    def reject(self, id: str, reason: str, detail: str = "") -> None:
        """Note an item that did not become a document; `reason` is a short class of fault, it is counted. `detail`: for people, what is
        wrong where, and how to mend it."""
        self.rejects[reason] += 1
        row = {"id": id, "reason": reason, "detail": detail} if detail else {"id": id, "reason": reason}
        self._rejects_file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _write_shard(self) -> None:
        name = f"shard-{len(self._shards):05d}.parquet"
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        try:
            pq.write_table(self._table(), temporary, compression="zstd")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {path} ({error}); free space or permissions, then run the stage again"
            ) from error
        self._shards.append({"file": name, "documents": len(self._pending), "bytes": path.stat().st_size})
        self._pending = []

    def _table(self) -> pa.Table:
        columns = self.kind.columns([item for item, _ in self._pending])
        columns["text"] = [text for _, text in self._pending]
        metadata = {_METADATA_KEY: json.dumps(_metadata(self.info))}
        return pa.table(columns, schema=self.kind.schema.with_metadata(metadata))

    def _finish(self) -> None:
        if self._pending:
            self._write_shard()
        self._rejects_file.flush()
        rejected = sum(self.rejects.values())
        ratio = rejected / max(1, rejected + self.num_documents)
        if ratio > self.max_reject_ratio:
            raise ValueError(
                f"{rejected} of {rejected + self.num_documents} items were rejected ({ratio:.1%}), above "
                f"max_reject_ratio={self.max_reject_ratio}: {dict(self.rejects.most_common(5))}; "
                f"read {self.folder / REJECTS}, mend the input or raise the limit"
            )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind.name,
            "info": asdict(self.info),
            "documents": self.num_documents,
            "tokens": dict(self.num_tokens),
            "rejects": dict(self.rejects),
            "shards": self._shards,
        }
        temporary = self.folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / MANIFEST)


class ItemFolder(Generic[Item]):
    """Random access to the items of a finished folder; a shard is read when one of its items is first wanted.

    `mapped`: shards lie in memory-mapped Arrow files beside the Parquet ones (`_mapped`), for corpora larger than memory.
    Raises FileNotFoundError when the folder is missing or unfinished, ValueError when it holds another kind of item or
    a file is damaged.
    """

    kind: ShardKind[Item]  # a subclass names it

    def __init__(self, folder: Path, *, mapped: bool = False) -> None:
        self.folder, self._mapped = Path(folder), mapped
        self.manifest = _read_manifest(self.folder)
        found = _kind_of(self.manifest)
        if found != self.kind.name:
            raise ValueError(
                f"{self.folder} holds {found} shards, {self.kind.name} shards are expected here; "
                f"give a folder of {self.kind.name}, or open it as {found}"
            )
        self.info = ShardInfo(**self.manifest["info"])
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise _damaged(path, f"it has {size} bytes, {MANIFEST} says {shard['bytes']}")
        counts = [shard["documents"] for shard in self.manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._loaded: dict[int, _Shard[Item]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Item:
        shard, row = self._find(index)
        return shard.item(row)

    def ids(self) -> list[str]:
        """The ids of all items, in order; nothing else is read."""
        found: list[str] = []
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            try:
                found += pq.read_table(path, columns=["id"]).column("id").to_pylist()
            except (pa.ArrowException, OSError, KeyError) as error:
                raise _damaged(path, str(error).splitlines()[0]) from error
        return found

    def in_order(self) -> Iterator[Item]:
        """All items, with one shard in memory at a time; access by index keeps every shard that it has read (or mapped)."""
        for entry in self.manifest["shards"]:
            yield from map(self._read(entry).item, range(entry["documents"]))

    def with_texts(self) -> Iterator[tuple[Item, str]]:
        """All items with their original texts, in order, a few rows at a time: memory does not grow with the folder."""
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            try:
                for batch in pq.ParquetFile(path).iter_batches(_ROWS):
                    row = self.kind.open({name: batch.column(name) for name in batch.schema.names})
                    for i, text in enumerate(batch.column("text")):
                        yield row(i), text.as_py()
            except (pa.ArrowException, OSError, KeyError) as error:
                raise _damaged(path, str(error).splitlines()[0]) from error

    def text(self, index: int) -> str:
        """The original text behind item `index`, "" when the writer gave none."""
        shard, row = self._find(index)
        return shard.text[row].as_py()

    def check(self, *, speech_fingerprint: str, text_fingerprint: str) -> None:
        """Raises ValueError when these shards were made with other tokenizers than the ones given."""
        pairs = (
            ("speech tokenizer", "--tokenizer", self.info.speech_fingerprint, speech_fingerprint),
            ("text tokenizer", "--text-tokenizer", self.info.text_fingerprint, text_fingerprint),
        )
        for name, flag, ours, wanted in pairs:
            if ours and ours != wanted:
                raise ValueError(
                    f"{self.folder} was made with the {name} {ours!r}, this run uses {wanted!r}; "
                    f"give the one that made them ({flag}), or make the shards again with this {name}"
                )

    def _find(self, index: int) -> tuple["_Shard[Item]", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {self.folder}, which has {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if shard not in self._loaded:
            self._loaded[shard] = self._read(self.manifest["shards"][shard])
        return self._loaded[shard], index - int(self._starts[shard])

    def _read(self, entry: dict[str, Any]) -> "_Shard[Item]":
        return _read_shard(self.folder / entry["file"], self.kind, self.info, entry["documents"], self._mapped)


def kind_of(folder: Path) -> str:
    """The kind of item in a finished folder; raises FileNotFoundError when it is missing or unfinished."""
    return _kind_of(_read_manifest(Path(folder)))


@dataclass(frozen=True)
class _Shard(Generic[Item]):
    """One shard in memory."""

    item: Callable[[int], Item]
    text: pa.Array


def _read_shard(
    path: Path, kind: ShardKind[Item], info: ShardInfo, num_items: int, mapped: bool = False
) -> _Shard[Item]:
    table = _map(path) if mapped else _read(path)
    metadata = (table.schema.metadata or {}).get(_METADATA_KEY)
    expected = metadata is not None and json.loads(metadata) == _metadata(info)
    if not expected or len(table) != num_items or table.column_names != kind.schema.names:
        raise _damaged(path, f"its rows, columns or metadata are not those that {MANIFEST} describes")
    column = {name: _one_array(table.column(name)) for name in kind.schema.names}
    return _Shard(kind.open(column), column["text"])


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies even a single chunk


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _map(path: Path) -> pa.Table:
    """The rows of a shard in an uncompressed Arrow file beside it, made when it is missing or older than the shard.

    Its pages come and go with use, and all processes of a machine share them.
    """
    arrow = path.with_suffix(".arrow")
    if not arrow.is_file() or arrow.stat().st_mtime_ns < path.stat().st_mtime_ns:
        _copy_uncompressed(path, arrow)
    try:
        return pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{arrow} is damaged ({error}); delete it, it is made again from {path.name}") from error


def _copy_uncompressed(path: Path, arrow: Path) -> None:
    table = _read(path).combine_chunks()
    temporary = arrow.with_name(f"{arrow.name}.{uuid.uuid4().hex}.tmp")  # several processes may make the same copy
    try:
        with pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, arrow)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {arrow} ({error}); mapped shards need room beside them, or read them without mapping"
        ) from error


def _metadata(info: ShardInfo) -> dict[str, Any]:
    return json.loads(json.dumps({"schema_version": SCHEMA_VERSION, "info": asdict(info)}))


def _kind_of(manifest: dict[str, Any]) -> str:
    return manifest.get("kind", "documents")  # folders written before there were kinds hold documents


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; run the stage that writes these shards, or check the path")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the stage that writes this folder did not finish, run it again; "
            "or the folder does not hold shards, check the path"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _damaged(path, str(error)) from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {manifest.get('schema_version')}, this version of SpeechQuilt reads "
            f"{SCHEMA_VERSION}; make the shards again"
        )
    return manifest


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is truncated or damaged ({what}); delete its folder and run the stage that made it again"
    )
