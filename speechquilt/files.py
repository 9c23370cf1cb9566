"""Files that appear whole or not at all, JSON, and folders for output."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when the block ends well; until then, and after a kill, the old file stays."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Indented JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())


def make_folder(folder: Path) -> None:
    """Create an output folder. Raises ValueError naming the path that cannot be written and what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: cannot create {folder} ({error.strerror}); choose a writable folder") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"run_dir: {folder} is not writable; choose another folder or change its permissions")
