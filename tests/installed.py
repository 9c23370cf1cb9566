"""Run by the interpreter of an empty environment into which the package alone was installed: everything that needs no extra.

Every command shows its help; studies are not there and say so; pages and styles came along; the Python door opens.
"""

import contextlib
import importlib
import io
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import speechquilt
from speechquilt import cli


def main() -> None:
    assert Path(speechquilt.__file__).is_relative_to(sys.prefix), f"{speechquilt.__file__} is not the installed package"
    script = Path(sys.prefix) / "bin" / "speechquilt"
    assert "speechquilt story toy" in subprocess.run([script], capture_output=True, text=True, check=True).stdout
    shown = 0
    for name, command in cli.available().items():
        for words in [[name, inner] for inner in command] if isinstance(command, dict) else [[name]]:
            shows_help(words)
            shown += 1
    assert "study" not in cli.available()
    with contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["study", "patching"]) == 2
    assert list((files("speechquilt.reports") / "templates").iterdir()), "no templates in the package"
    importlib.import_module("speechquilt.python_api")
    print(f"{shown} commands show their help in an empty environment")


def shows_help(words: list[str]) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main([*words, "--help"])
    assert code == 0, words
    assert "usage: speechquilt" in out.getvalue(), words


if __name__ == "__main__":
    main()
