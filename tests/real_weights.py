"""The real weights that `make weights` fetches. Without them a test is skipped, and says how to have them."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / ".cache" / "weights"
WHISPER, SMOLLM2, KOKORO = "whisper-tiny.en", "smollm2-135m-instruct", "kokoro-82m"


def real_weights(name: str) -> Path:
    """The folder of one of them."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"real weights {name} are absent; run make weights")
    return FOLDER / name
