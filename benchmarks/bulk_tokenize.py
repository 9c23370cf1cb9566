"""Bulk tokenizing against a loop over files, same recordings, same tokens, same run; and where the time goes.

    python benchmarks/bulk_tokenize.py [--tokenizer RUN_OR_FOLDER] [--files 80] [--rounds 3] [--rate 44100] [--device cpu] [--command]
    python benchmarks/bulk_tokenize.py --in-memory --preset large-v3 --device cuda --dtype bfloat16 --files 4000 --seconds 30

Recordings are espeak-ng's, 1 to 12 s, FLAC at `--rate`, padded with a little noise as real rooms are; `--in-memory` takes noise of up to
`--seconds` s instead and needs no audio package. The loop loads, resamples and encodes one file after the other. The batch path is
`recipes/tokenize.py`: it reads ahead in threads and encodes pieces of similar length together. Both use one torch thread and, on a CPU in
float32, must give the same tokens; elsewhere the share of equal tokens is printed, because another shape is another kernel there.
Without `--tokenizer` the model is a preset with random weights, which costs the same. Real-time factors are seconds of
audio per second of wall clock and per second of CPU time; on a busy machine only the second means something. "encoder alone" has all batches
ready on the device: what reading ahead cannot exceed. `--command` also times `speechquilt tokenize` with two workers, process start included.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.sources import audio_files
from speechquilt.data.sources.audio_files import End, Piece
from speechquilt.jobs import tokenize_audio as recipe
from speechquilt.jobs.execution import Execution
from speechquilt.recipes import defaults
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import load
from speechquilt.tokenizer.whisper_sizes import WHISPER, preset
from speechquilt.types import Waveform

TEXT = "the red fox sees a small house by the river and walks on until it is night"
TOY = "toy"
SHORTEST_S = 1.0  # of a recording in memory
T = TypeVar("T")
Source = Path | Waveform


@dataclass(frozen=True)
class Timed(Generic[T]):
    wall_s: float
    cpu_s: float
    result: T


def timed(function: Callable[[], T]) -> Timed[T]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, result)


def spoken_files(folder: Path, num_files: int, rate: int) -> list[Path]:
    from speechquilt.tts.espeak import EspeakTTSConfig  # the extra `audio`, which noise in memory does without

    rng, paths = np.random.default_rng(0), []
    speaker = EspeakTTSConfig(voices=("en-us", "en+f4")).build()
    for i in range(num_files):
        text = " ".join(rng.choice(TEXT.split(), size=int(rng.integers(3, 36))))
        spoken = audio.resample(speaker.speak(text, speaker.voices[i % 2]).audio, rate)
        noisy_S = spoken.samples_S + 0.003 * rng.standard_normal(len(spoken.samples_S)).astype(np.float32)
        paths.append(folder / f"{i:04d}.flac")
        audio.save(paths[-1], Waveform(samples_S=noisy_S.clip(-1, 1), sample_rate=rate))
    return paths


def noises(num_files: int, longest_s: float) -> list[Waveform]:
    rng = np.random.default_rng(0)
    lengths = rng.uniform(min(SHORTEST_S, longest_s), longest_s, num_files) * audio.SAMPLE_RATE
    all_S = 0.1 * rng.standard_normal(int(lengths.max()) + num_files).astype(np.float32)
    return [Waveform(samples_S=all_S[i : i + int(n)], sample_rate=audio.SAMPLE_RATE) for i, n in enumerate(lengths)]


def heard(source: Source) -> Waveform:
    return audio.load(source) if isinstance(source, Path) else source


def new_tokenizer(options: argparse.Namespace) -> Any:
    if options.tokenizer:
        return load(options.tokenizer)
    if options.preset != TOY:
        return preset(options.preset).tokens_only().build().eval()
    text = TextTokenizer.train([TEXT], 300)
    return replace(defaults.TOKENIZER.model, text_vocab_size=text.size, vq_warmup_updates=0).build(text).eval()


class Bench:
    """One tokenizer on one device, and the ways to use it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.dtype = options.device, options.dtype
        self.batch_seconds = options.batch_seconds or (
            recipe.CPU_BATCH_SECONDS if self.device == "cpu" else recipe.CUDA_BATCH_SECONDS
        )
        self.tokenizer = new_tokenizer(options).to(self.device)

    def encode(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> torch.Tensor:
        with recipe.computing_in(self.dtype, self.device):
            return self.tokenizer.encode(wav_BS, num_samples_B)[0]

    def loop(self, sources: Sequence[Source]) -> list[np.ndarray]:
        ids = []
        for source in sources:
            wav = audio.resample(heard(source), self.tokenizer.sample_rate)
            wav_BS = torch.from_numpy(wav.samples_S)[None].to(self.device)
            ids.append(self.encode(wav_BS, torch.tensor([wav_BS.shape[1]], device=self.device))[0].cpu().numpy())
        return ids

    def batched(self, sources: Sequence[Source]) -> list[np.ndarray]:
        events = audio_files.read_ahead(list(enumerate(sources)), self._read, threads=2)
        stream = recipe.encode_stream(self.tokenizer, events, self.batch_seconds, self.device, self.dtype)
        return [ids_T for _, ids_T in stream]

    def shares(self, sources: Sequence[Source]) -> tuple[dict[str, float], float]:
        """Seconds of each step when they follow each other (CPU time on a CPU), what is read ahead first; and the wall time of
        encoding all batches."""
        read = timed(lambda: [heard(source) for source in sources])
        rate = self.tokenizer.sample_rate
        resampled = timed(lambda: [audio.resample(wav, rate).samples_S for wav in read.result])
        batches = list(self._batches(resampled.result))
        whole = timed(lambda: [self.encode(*batch) for batch in batches])
        seconds = {"reading": read, "resampling": resampled}
        parts = {name: x.cpu_s if self.device == "cpu" else x.wall_s for name, x in seconds.items()}
        whole_s = whole.cpu_s if self.device == "cpu" else whole.wall_s
        if hasattr(self.tokenizer, "log_mel"):
            mel = timed(lambda: [self.tokenizer.log_mel(wav_BS) for wav_BS, _ in batches])
            parts["mel"] = mel.cpu_s if self.device == "cpu" else mel.wall_s
            whole_s -= parts["mel"]
        return parts | {"encoder": whole_s}, whole.wall_s

    def _batches(self, waves: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rows = sorted(waves, key=len)
        size = max(1, int(self.batch_seconds * self.tokenizer.sample_rate / len(rows[-1])))
        for first in range(0, len(rows), size):
            batch = [torch.from_numpy(wave_S) for wave_S in rows[first : first + size]]
            wav_BS = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(self.device)
            yield wav_BS, torch.tensor([len(wave_S) for wave_S in batch], device=self.device)

    def _read(self, source: tuple[int, Source]) -> Iterator[Piece | End]:
        number, sound = source
        sizes = recipe.piece_sizes(self.tokenizer)
        if isinstance(sound, Path):
            rate = self.tokenizer.sample_rate
            yield from audio_files.read_pieces(sound, number, rate=rate, max_seconds=float("inf"), **sizes)
        else:
            yield from audio_files.cut([sound.samples_S], number, **sizes)
            yield End(file=number, duration_s=sound.duration_s)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} (of {len(values)}: {min(values):.1f} to {max(values):.1f})"


def compare(bench: Bench, sources: Sequence[Source], total_s: float, num_rounds: int) -> None:
    rounds: list[tuple[Timed, Timed]] = []
    for _ in range(num_rounds + 1):  # the first one warms up
        rounds.append((timed(lambda: bench.loop(sources)), timed(lambda: bench.batched(sources))))
    loops, batches = zip(*rounds[1:])
    same = np.concatenate([a == b for a, b in zip(loops[0].result, batches[0].result, strict=True)]).mean()
    if bench.device == "cpu" and bench.dtype == "float32":
        assert same == 1.0, f"only {same:.2%} of the tokens are those of the loop"
    print(f"equal tokens          {same:.2%}")
    for name, times in (("loop", loops), ("batched", batches)):
        wall, cpu = (spread([total_s / getattr(t, key) for t in times]) for key in ("wall_s", "cpu_s"))
        print(f"{name:<8} x real time: wall {wall}, CPU {cpu}")
    wall, cpu = (
        spread([getattr(a, key) / getattr(b, key) for a, b in zip(loops, batches)]) for key in ("wall_s", "cpu_s")
    )
    print(f"loop / batched:       wall {wall}, CPU {cpu}")
    parts, encode_s = bench.shares(sources)
    print("one after the other:  " + ", ".join(f"{name} {s / sum(parts.values()):.0%}" for name, s in parts.items()))
    reached = encode_s / statistics.median(t.wall_s for t in batches)
    print(f"encoder alone:        {total_s / encode_s:.1f} x real time, of which the batch path reaches {reached:.0%}")


def time_command(bench: Bench, folder: Path, total_s: float) -> None:
    bench.tokenizer.save(folder / "tokenizer")
    run = timed(
        lambda: recipe.tokenize_folder(
            folder / "audio",
            folder / "out",
            folder / "tokenizer",
            recipe.TokenizeSettings(files_per_shard=20, device=bench.device),
            Execution(workers=2),
        )
    )
    print(f"command, two workers, start included: {total_s / run.wall_s:.1f} x real time in {run.wall_s:.1f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--preset", choices=[TOY, *WHISPER], default=TOY)
    parser.add_argument("--files", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=44_100)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--seconds", type=float, default=12.0, help="longest recording in memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=get_args(recipe.DType), default="float32")
    parser.add_argument("--batch-seconds", type=float)
    parser.add_argument("--command", action="store_true")
    options = parser.parse_args()
    if options.command and (options.in_memory or options.preset != TOY):
        parser.error("--command reads files and a saved tokenizer; leave out --in-memory and --preset")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "audio").mkdir()
        sources: Sequence[Source]
        if options.in_memory:
            sources, where = noises(options.files, options.seconds), "in memory"
        else:
            sources, where = spoken_files(folder / "audio", options.files, options.rate), f"at {options.rate} Hz"
        total_s = sum(heard(source).duration_s for source in sources)
        print(f"{len(sources)} recordings, {total_s:.0f} s {where}, {bench.device}, {bench.dtype}, one torch thread")
        compare(bench, sources, total_s, options.rounds)
        if options.command:
            time_command(bench, folder, total_s)


if __name__ == "__main__":
    main()
