"""What reading costs `tokenize`, `align` and `interleave` on clean input, against another checkout of this project, in
one run.

    git worktree add ../before COMMIT
    python benchmarks/user_files.py --against ../before [--files 300] [--rounds 5]

Both sides read the same files in turn, each in a process of its own with one thread: FLAC of 2 to 4 s in two channels
with a table of texts and word times (`tokenize`), the same with transcripts beside them (`align`, by the tokenizer's
own CTC head), and prose in JSON lines (`interleave`: documents, plans and their spoken forms, without the model that
speaks). Weights are random, which costs the same. Prints CPU seconds and the ratio before / now: above 1 is faster now.
A busy machine makes single rounds worthless; look at the median.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

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
RATE = 22_050
TOKENIZE, ALIGN, INTERLEAVE = "tokenize", "align", "interleave"


def write_inputs(folder: Path, num_files: int) -> None:
    import soundfile

    from speechquilt.recipes import defaults
    from speechquilt.text import TextTokenizer

    rng = np.random.default_rng(0)
    rows, documents = [], []
    for name in ("table", "beside", "texts"):
        (folder / name).mkdir()
    for i in range(num_files):
        seconds = rng.uniform(2.0, 4.0)
        samples_SC = (0.1 * rng.standard_normal((int(seconds * RATE), 2))).clip(-1, 1)
        text = [WORDS[k] for k in rng.integers(0, len(WORDS), 8)]
        words = [[word, 0.2 * k, 0.2 * k + 0.19] for k, word in enumerate(text)]
        rows.append(json.dumps({"file_name": f"{i:04d}.flac", "text": " ".join(text), "words": words}))
        for name in ("table", "beside"):
            soundfile.write(folder / name / f"{i:04d}.flac", samples_SC, RATE)
        (folder / "beside" / f"{i:04d}.txt").write_text(" ".join(text))
    (folder / "table" / "metadata.jsonl").write_text("\n".join(rows))
    for i in range(4 * num_files):
        prose = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), 300))
        documents.append(json.dumps({"id": f"d{i}", "text": f"In {1900 + i % 100} it cost $5: {prose}. It’s so."}))
    (folder / "texts" / "texts.jsonl").write_text("\n".join(documents))
    text_tokenizer = TextTokenizer.train([" ".join(WORDS)], 300)
    config = replace(defaults.TOKENIZER.model, text_vocab_size=text_tokenizer.size, vq_warmup_updates=0)
    config.build(text_tokenizer).eval().save(folder / "tokenizer")


def tokenize(folder: Path, out: Path) -> None:
    from speechquilt.jobs.execution import Execution
    from speechquilt.jobs.tokenize_audio import tokenize_folder

    tokenize_folder(folder / "table", out, folder / "tokenizer", execution=Execution(workers=1))


def align(folder: Path, out: Path) -> None:
    from speechquilt.jobs.align_audio import align_folder
    from speechquilt.jobs.execution import Execution

    align_folder(folder / "beside", out, folder / "tokenizer", execution=Execution(workers=1, max_reject_ratio=1.0))


def interleave(folder: Path, out: Path) -> None:
    from speechquilt.data.interleaving import synthetic
    from speechquilt.data.sources import text_files

    corpus = text_files.open_corpus(str(folder / "texts"))
    reader = text_files.TextReader(root=str(corpus.root))
    for piece in corpus.slices():
        for read in reader.read(piece):
            plan = synthetic.plan(read.found.id, read.found.text, 0, synthetic.InterleaveConfig())
            assert plan.spoken_spans


COMMANDS: dict[str, Callable[[Path, Path], None]] = {TOKENIZE: tokenize, ALIGN: align, INTERLEAVE: interleave}


def run_one(name: str, folder: Path) -> None:
    """In a process of its own: prints CPU seconds, imports and the first call's warming up left out."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        COMMANDS[name](folder / "small", Path(out) / "warm")
        before = time.process_time()
        COMMANDS[name](folder / "whole", Path(out) / "timed")
        spent = time.process_time() - before
    print(spent)


def cpu_seconds(checkout: Path, name: str, folder: Path) -> float:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return float(done.stdout)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} (of {len(values)}: {min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.folder)
        return
    if options.against is None:
        parser.error("--against needs the folder of another checkout")
    now = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        for kind, num_files in (("small", 8), ("whole", options.files)):
            (Path(name) / kind).mkdir()
            write_inputs(Path(name) / kind, num_files)
        print(f"{options.files} recordings, {4 * options.files} documents, CPU seconds")
        for command in COMMANDS:
            pairs = []
            for k in range(options.rounds):
                order = (options.against, now) if k % 2 else (now, options.against)
                times = {side: cpu_seconds(side, command, Path(name)) for side in order}
                pairs.append((times[options.against], times[now]))
            old, new = zip(*pairs)
            ratio = spread([a / b for a, b in pairs])
            print(f"{command:<10} before {spread(list(old))}, now {spread(list(new))}, before / now {ratio}")


if __name__ == "__main__":
    main()
