"""docs/presets.md says what `benchmarks/presets.py` prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "presets.py")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in (ROOT / "docs" / "presets.md").read_text()
    assert printed.count("\n| 7B |") == 3
