"""Jobs side by side: results in order, errors that arrive, and no worker that outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechquilt.stages import workers
from speechquilt.train.trainer import Stopped


def square(x: int) -> int:
    time.sleep(0.05 * (3 - x))
    return x * x


def stop(run_dir: Path) -> None:
    raise Stopped(7, run_dir)


def linger(folder: Path) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(120)


def test_results_come_in_the_order_of_the_jobs():
    assert workers.run_all(square, [(0,), (1,), (2,)]) == [0, 1, 4]


def test_an_exception_arrives_whole(tmp_path):
    with pytest.raises(Stopped, match="stopped after step 7") as caught:
        workers.run_all(stop, [(tmp_path,)])
    assert caught.value.run_dir == tmp_path


def test_a_worker_dies_with_its_parent(tmp_path):
    code = f"""
from pathlib import Path
from speechquilt.stages import workers
from tests.unit.test_workers import linger
if __name__ == "__main__":
    workers.run_all(linger, [(Path({str(tmp_path)!r}),)])
"""
    (tmp_path / "main.py").write_text(code)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], env={**os.environ, "PYTHONPATH": str(root)})
    pid = int(_wait_for(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").is_file() else ""))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _wait_for(lambda: not _alive(pid)), "the worker outlived its parent"


def _wait_for(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    return condition()


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
