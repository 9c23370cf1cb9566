"""A stage of a story: a folder that is made once, marked when complete, and skipped from then on.

A stage's fingerprint covers its own settings and those of the stages before it, so a finished folder can be trusted
without opening it.
Trap: a folder made with other settings is never overwritten: that is an error which says what to do.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechquilt import config
from speechquilt.evals.measures import Measure
from speechquilt.files import make_folder, replacing, write_json

MARK = "done.json"
SETTINGS = "settings.json"  # of a command, for --config
MEASURES = (Measure(key="stage.<stage>.seconds", kind="amount", unit="s", meaning="wall time of the stage"),)


@dataclass
class Story:
    """The stages of one run folder, in order. `fingerprint` covers all stages so far."""

    run_dir: Path
    fingerprint: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str, settings: Any, make: Callable[[Path], dict[str, Any]], *, what: str) -> Path:
        """Run `make(folder) -> flat results` unless the folder is complete; returns the folder.

        `settings` is everything that decides the outcome (a config or plain JSON data). `what` says in a few words what
        the stage makes. Raises ValueError when the folder was made with other settings.
        """
        self.fingerprint = config.fingerprint([self.fingerprint, name, _plain(settings)])
        folder = self.run_dir / name
        mark = folder / MARK
        started = folder / "started.json"
        made_with = _fingerprint_of(mark) or _fingerprint_of(started)
        if made_with and made_with != self.fingerprint:
            raise ValueError(
                f"{folder} was made with other settings (fingerprint {made_with}, now {self.fingerprint}); "
                f"choose another --run-dir, or delete {self.run_dir} to start again"
            )
        if mark.is_file():
            done = json.loads(mark.read_text())
            print(f"[{name}] complete, skipped ({what}; took {done['seconds']:.0f} s)", flush=True)
        else:
            print(f"[{name}] {what}", flush=True)
            make_folder(folder)
            earlier_s = json.loads(started.read_text())["seconds"] if started.is_file() else 0.0
            write_json(started, {"fingerprint": self.fingerprint, "seconds": earlier_s})
            begin = time.monotonic()
            try:
                results = make(folder)
            finally:
                seconds = earlier_s + time.monotonic() - begin
                write_json(started, {"fingerprint": self.fingerprint, "seconds": seconds})
            done = {"fingerprint": self.fingerprint, "seconds": seconds, "results": results}
            write_json(mark, done)
            print(f"[{name}] done in {seconds:.0f} s -> {folder}", flush=True)
        self.seconds[name] = done["seconds"]
        self.results.update(done["results"])
        return folder


@contextmanager
def remembered(settings: Any, folder: Path, *, writes: bool = True) -> Iterator[None]:
    """Makes the output folder and keeps the settings of the command in it, for `--config`, while the block runs and after.

    When the block refuses them (ValueError), what the folder held before comes back. `writes` False: another rank does it.
    """
    make_folder(folder)
    path = folder / SETTINGS
    before = path.read_bytes() if path.is_file() else None
    if writes:
        write_json(path, config.to_dict(settings))
    try:
        yield
    except ValueError:
        if writes and before is not None:
            with replacing(path) as file:
                file.write(before)
        elif writes:
            path.unlink(missing_ok=True)
        raise


def required(key: str, value: str) -> Path:
    """A folder that must be named. Raises ValueError when the setting is empty."""
    if not value:
        raise ValueError(f"{key} is not set; give --{key.replace('_', '-')} FOLDER")
    return Path(value)


def report(found: dict[str, Any], folder: Path, following: str) -> None:
    """The last lines of a command: what was found, what was made, what to run next."""
    print("\n".join(f"{key:<36} {value}" for key, value in found.items()))
    print(f"\nmade     {folder}\nnext     {following}")


def _plain(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {k: _plain(v) for k, v in settings.items()}
    if isinstance(settings, list | tuple):
        return [_plain(v) for v in settings]
    return config.to_dict(settings) if hasattr(settings, "__dataclass_fields__") else settings


def _fingerprint_of(path: Path) -> str | None:
    return json.loads(path.read_text())["fingerprint"] if path.is_file() else None
