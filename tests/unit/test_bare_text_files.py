"""Files without a suffix in a folder of text: read when they begin as text, whatever else lies around."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.sources import text_files
from speechquilt.data.sources.text_files import TextReader, open_corpus
from speechquilt.types import Reject, TextDocument


def names(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in open_corpus(str(folder)).files]


def test_licences_and_readmes_are_text_and_other_bare_files_are_not(tmp_path):
    text = ["LICENSE", "GPL-3", "Apache-2.0", "LGPL-2.1", "below/README", "known.txt"]
    other = ["libx-1.2.so", "page.1", "x-1.0.log", "a.b", ".hidden", ".git/HEAD"]
    for name in [*text, *other]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Some words.")
    (tmp_path / "program").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin1").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    assert names(tmp_path) == sorted(text)


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("aé東\U0001f600\n"), min_size=1, max_size=40), head=st.integers(1, 12))
def test_a_head_that_ends_within_a_character_is_still_text(tmp_path_factory, text, head):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "NOTICE").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_HEAD_BYTES", head)
        assert names(folder) == ["NOTICE"]


def test_what_is_broken_behind_the_head_is_rejected_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_HEAD_BYTES", 4)
    (tmp_path / "good").write_text("fine words")
    (tmp_path / "late").write_bytes(b"fine \xff words")
    corpus = open_corpus(str(tmp_path))
    found = [read.found for piece in corpus.slices() for read in TextReader(root=str(corpus.root)).read(piece)]
    assert found == [TextDocument(id="good", text="fine words"), Reject(id="late", reason="not UTF-8")]
