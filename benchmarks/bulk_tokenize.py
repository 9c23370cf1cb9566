"""Bulk tokenizing against a loop over files, same recordings, same tokens, same run; and where the time goes.

    python benchmarks/bulk_tokenize.py [--tokenizer RUN_OR_FOLDER] [--files 80] [--rounds 3] [--rate 44100] [--device cpu] [--command]

Recordings are espeak-ng's, 1 to 12 s, FLAC at `--rate`, padded with a little noise as real rooms are. The loop loads, resamples and
encodes one file after the other. The batch path is `recipes/tokenize.py`: it reads ahead in threads and encodes pieces of similar
length together. Both use one torch thread and must give the same tokens. Without `--tokenizer` the model is the story's with random
weights, which costs the same. Real-time factors are seconds of audio per second of wall clock and per second of CPU time; on a busy
machine only the second means something. `--command` also times `speechquilt tokenize` with two workers, process start included.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data import audio_files
from speechquilt.recipes import defaults
from speechquilt.recipes import tokenize as recipe
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import load
from speechquilt.tts import EspeakTTSConfig
from speechquilt.types import Waveform

WORDS = [
    "the",
    "red",
    "fox",
    "sees",
    "a",
    "small",
    "house",
    "by",
    "the",
    "river",
    "and",
    "walks",
    "on",
    "until",
    "it",
    "is",
    "night",
]


@dataclass(frozen=True)
class Timed:
    wall_s: float
    cpu_s: float
    result: Any


def timed(function: Callable[[], Any]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, result)


def make_corpus(folder: Path, num_files: int, rate: int) -> float:
    """-> seconds of audio."""
    rng, total_s = np.random.default_rng(0), 0.0
    speaker = EspeakTTSConfig(voices=("en-us", "en+f4")).build()
    for i in range(num_files):
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(3, 36))))
        spoken = audio.resample(speaker.speak(text, speaker.voices[i % 2]).audio, rate)
        noisy_S = spoken.samples_S + 0.003 * rng.standard_normal(len(spoken.samples_S)).astype(np.float32)
        audio.save(folder / f"{i:04d}.flac", Waveform(samples_S=noisy_S.clip(-1, 1), sample_rate=rate))
        total_s += spoken.duration_s
    return total_s


def loop(tokenizer: Any, paths: Sequence[Path], device: str) -> list[np.ndarray]:
    ids = []
    for path in paths:
        wav = audio.resample(audio.load(path), tokenizer.sample_rate)
        wav_BS = torch.from_numpy(wav.samples_S)[None].to(device)
        ids_BT, _ = tokenizer.encode(wav_BS, torch.tensor([wav_BS.shape[1]], device=device))
        ids.append(ids_BT[0].cpu().numpy())
    return ids


def batched(tokenizer: Any, paths: Sequence[Path], device: str, batch_seconds: float) -> list[np.ndarray]:
    def read(source: tuple[int, Path]) -> Any:
        return audio_files.read_pieces(
            source[1],
            source[0],
            rate=tokenizer.sample_rate,
            max_seconds=float("inf"),
            **recipe.piece_sizes(tokenizer),
        )

    events = audio_files.read_ahead(list(enumerate(paths)), read, threads=2)
    return [ids_T for _, ids_T in recipe.encode_stream(tokenizer, events, batch_seconds, device)]


def shares(tokenizer: Any, paths: Sequence[Path], device: str, batch_seconds: float) -> dict[str, float]:
    """Seconds of each step when they follow each other (CPU time on a CPU): what is read ahead is the first two."""
    read = timed(lambda: [audio.load(path) for path in paths])
    resampled = timed(lambda: [audio.resample(wav, tokenizer.sample_rate).samples_S for wav in read.result])
    rows = sorted(resampled.result, key=len)
    size = max(1, int(batch_seconds * tokenizer.sample_rate / len(rows[-1])))
    batches = []
    for first in range(0, len(rows), size):
        waves = [torch.from_numpy(wave_S) for wave_S in rows[first : first + size]]
        wav_BS = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True).to(device)
        batches.append((wav_BS, torch.tensor([len(wave_S) for wave_S in waves], device=device)))
    whole = timed(lambda: [tokenizer.encode(*batch) for batch in batches])
    mel = timed(lambda: [tokenizer.log_mel(wav_BS) for wav_BS, _ in batches])
    read_s, resample_s, mel_s, encode_s = (
        x.cpu_s if device == "cpu" else x.wall_s for x in (read, resampled, mel, whole)
    )
    return {"reading": read_s, "resampling": resample_s, "mel": mel_s, "encoder": encode_s - mel_s}


def median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} (of {len(values)}: {min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--files", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=44_100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-seconds", type=float, default=recipe.CPU_BATCH_SECONDS)
    parser.add_argument("--command", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tokenizer:
        tokenizer: Any = load(options.tokenizer)
    else:
        text = TextTokenizer.train([" ".join(WORDS)], 300)
        tokenizer = replace(defaults.TOKENIZER.model, text_vocab_size=text.size, vq_warmup_updates=0).build(text).eval()
    tokenizer.to(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "audio"
        folder.mkdir()
        total_s = make_corpus(folder, options.files, options.rate)
        paths = sorted(folder.iterdir())
        print(f"{len(paths)} files, {total_s:.0f} s of audio at {options.rate} Hz, {options.device}, one torch thread")
        rounds: list[tuple[Timed, Timed]] = []
        for _ in range(options.rounds + 1):  # the first one warms up
            one = timed(lambda: loop(tokenizer, paths, options.device))
            many = timed(lambda: batched(tokenizer, paths, options.device, options.batch_seconds))
            assert all(np.array_equal(a, b) for a, b in zip(one.result, many.result, strict=True)), "tokens differ"
            rounds.append((one, many))
        rounds = rounds[1:]
        print(
            f"loop     x real time: wall {median([total_s / a.wall_s for a, _ in rounds])}, CPU {median([total_s / a.cpu_s for a, _ in rounds])}"
        )
        print(
            f"batched  x real time: wall {median([total_s / b.wall_s for _, b in rounds])}, CPU {median([total_s / b.cpu_s for _, b in rounds])}"
        )
        print(
            f"loop / batched:       wall {median([a.wall_s / b.wall_s for a, b in rounds])}, CPU {median([a.cpu_s / b.cpu_s for a, b in rounds])}"
        )
        parts = shares(tokenizer, paths, options.device, options.batch_seconds)
        print("one after the other:  " + ", ".join(f"{k} {v / sum(parts.values()):.0%}" for k, v in parts.items()))
        if options.command:
            tokenizer.save(Path(name) / "tokenizer")
            command = timed(
                lambda: recipe.tokenize(
                    folder, Path(name) / "out", Path(name) / "tokenizer", workers=2, files_per_shard=20
                )
            )
            print(
                f"command, two workers, start included: {total_s / command.wall_s:.1f} x real time in {command.wall_s:.1f} s"
            )


if __name__ == "__main__":
    main()
