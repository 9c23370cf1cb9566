"""Half an hour in one file through `speechquilt tokenize` takes hardly more memory than one minute."""

import multiprocessing
import resource
from pathlib import Path

import numpy as np
import soundfile

from speechquilt import cli
from speechquilt.data.shards.documents import read_documents
from tests.contracts.tiny_tokenizer import CONFIG, build
from tests.parity.tiny_tokenizers import noise

RATE, MINUTES = 8000, 30
ROOM_MIB = 40.0  # the long file as float32 at 16 kHz alone is 110 MiB


def write_noise(folder: Path, minutes: int) -> Path:
    """One cheap file: the same minute of noise again and again, at half the tokenizer's rate, as 16-bit FLAC."""
    folder.mkdir()
    minute_S = noise(0, 60.0).numpy()[::2]
    with soundfile.SoundFile(folder / "long.flac", "w", samplerate=RATE, channels=1) as file:
        for _ in range(minutes):
            file.write(minute_S)
    return folder


def tokenize_both(short: Path, long: Path, tokenizer: Path, answer) -> None:
    """In a process of its own, whose memory nobody else has raised: peaks in MiB after a minute and after all of it."""
    peaks = []
    for folder in (short, long):
        command = ["tokenize", str(folder), str(folder) + ".shards", "--tokenizer", str(tokenizer)]
        assert cli.main([*command, "--workers", "1", "--batch-seconds", "4"]) == 0
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    answer.put(peaks)


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    build(context_frames=32).save(tmp_path / "tokenizer")
    short, long = write_noise(tmp_path / "short", 1), write_noise(tmp_path / "long", MINUTES)
    processes = multiprocessing.get_context("spawn")
    answer = processes.SimpleQueue()
    child = processes.Process(target=tokenize_both, args=(short, long, tmp_path / "tokenizer", answer))
    child.start()
    child.join()
    assert child.exitcode == 0
    after_a_minute, after_all = answer.get()
    assert after_all - after_a_minute < ROOM_MIB
    (document,) = read_documents(tmp_path / "long.shards" / "speech")
    (segment,) = document.segments
    assert len(segment.ids_T) == MINUTES * 60 * 50 // CONFIG.pooling
    assert len(np.unique(segment.ids_T)) > 1
