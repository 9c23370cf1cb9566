"""Where the tests find Flite: on the system, else where `make speech` unpacks it."""

from pathlib import Path

import pytest

from speechquilt.tts import flite

_UNPACKED = str(Path(__file__).parents[1] / ".cache" / "speech")
FOLDER = "" if flite.is_there() else _UNPACKED
needs_flite = pytest.mark.skipif(not flite.is_there(FOLDER), reason="Flite is not here; run `make speech`")
