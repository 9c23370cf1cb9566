"""`speechquilt COMMAND ...`: every stage as a command on one's own files, and the whole story as one.

Place in the pipeline: layer 4, the outermost edge. It parses words and prints errors; recipes do the work.
Trap: importing torch takes a second, so commands import their recipe when they run, and `--help` stays instant.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EPILOG = """\
the seven stages, one artifact each:
  tokenizer -> text_to_token -> shards -> pretrain -> evals -> (decoder -> chat: not yet part of this version)

start here:
  speechquilt story toy                      the whole pipeline on an invented world, about 20 minutes on two cores
  speechquilt story own speech=DIR text=DIR  the same stages on a folder of audio with transcripts and a folder of text

one stage at a time:
  speechquilt train tokenizer speech=DIR run_dir=runs/tokenizer
  speechquilt train aligner speech=DIR run_dir=runs/aligner        for word times, when the recordings have none
  speechquilt align DIR ALIGNED --aligner runs/aligner
  speechquilt tokenize DIR SHARDS --tokenizer runs/tokenizer
  speechquilt train text_to_token speech=DIR tokenizer=runs/tokenizer run_dir=runs/text_to_token
  speechquilt interleave CORPUS SHARDS2 --text-to-token runs/text_to_token --tokenizer runs/tokenizer
  speechquilt inspect SHARDS2 --tokenizer runs/tokenizer --page FILE.html
  speechquilt train lm shards='{"speech": "SHARDS/speech", "interleaved": "SHARDS2"}' run_dir=runs/lm
  speechquilt eval runs/lm ITEMS.jsonl
  speechquilt export runs/lm FOLDER          a plain model for transformers, vLLM and others

before a large run, and for the numbers in docs/results.md:
  speechquilt plan lst_1b --gpus 32          what it costs: tokens, GPU-hours, storage, memory, time
  speechquilt study patching                 baseline, BPE and six ways to patch, three seeds each, over an hour on two cores
  speechquilt study interleaving             what interleaved data is worth: its spoken ratio, amount and kind, three seeds each
  speechquilt study frame_rates              the speech tokenizer at 50, 25, 12.5 and 6.25 tokens per second
  speechquilt study real_text                licence texts and documentation of this machine, interleaved, with rejects and noise

A setting is key=value, a.b=value for one inside another; `speechquilt train RECIPE --show` prints them all.
Every command skips what is already complete and continues what was interrupted.
"""

ALIGN_EPILOG = """\
Transcripts as for `tokenize`. What has word times keeps them. Recordings that cannot be aligned are left out and listed in
aligned/rejects.jsonl with their reasons. The same command goes on after a kill; docs/how-to/align.md tells more.
"""

TOKENIZE_EPILOG = """\
Transcripts come from x.txt beside x.wav, or from metadata.jsonl / .csv (file_name, text, words). What has one also becomes ASR
and TTS pairs, what has word times becomes spoken texts for parallel interleaving. Recordings that cannot be used are counted in
speech/rejects.jsonl with their reasons. The same command goes on after a kill; docs/how-to/tokenize.md tells more.
"""

INTERLEAVE_EPILOG = """\
SHARDS is one folder for `inspect` and `train lm`; stats.json in it has the realised ratio, what was left as text and why, and
the noise of the synthetic speech. Broken documents are counted in rejects.jsonl. The same command goes on after a kill;
docs/how-to/interleave.md tells more.
"""

EXPORT_EPILOG = """\
The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer and gives the logits of the run. Ids are
text | special | speech; README.md in the folder has the numbers. A prompt is written in full, because the tokenizer adds nothing:
  <|bos|><|text|>the red fox<|speech|>     goes on in speech tokens <|speech_17|> ...
A latent model stays in its own folder: no Hugging Face class has patches.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the request (said on stderr), 130 stopped and ready to be continued."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"speechquilt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("speechquilt: stopped; the same command continues from here", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "Stopped":  # train.trainer.Stopped, whose import would load torch for `--help`
            raise
        print(f"speechquilt: {error}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speechquilt",
        description="Pre-train speech-text language models: tokenizer, text-to-token, interleaving, patches, evals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    story = add("story", _story, "run all stages in one folder and write report.html")
    story.add_argument("name", choices=["toy", "own"], help="toy: the embedded default; own: your folders")
    _add_settings(story)

    study = add("study", _study, "compare ways of doing one thing on the micro-world, or measure one on real text")
    study.add_argument(
        "name",
        choices=["patching", "interleaving", "frame_rates", "real_text"],
        help="patching: how to group speech tokens; interleaving: what interleaved data is worth; "
        "frame_rates: tokens per second of the speech tokenizer; real_text: the interleaving of text that no one here wrote",
    )
    _add_settings(study)

    plan = add("plan", _plan, "what a run of the papers' size costs: tokens, GPU-hours, storage, memory, time")
    plan.add_argument("recipe", help="lst_1b, interleaved_1b, interleaved_9b, tokenizer_large or tokenizer_small")
    plan.add_argument("--gpus", type=int, default=8)
    plan.add_argument("--gpu", default="h100", help="a100, h100, h200 or b200 (default h100)")
    plan.add_argument("--mfu", type=float, default=0.5, help="share of the bfloat16 peak that training reaches (0.5)")
    plan.add_argument("--json", action="store_true", help="for machines")

    train = add(
        "train", _train, "train one model: tokenizer, aligner, text_to_token, entropy (for entropy patching) or lm"
    )
    train.add_argument("recipe", choices=["tokenizer", "aligner", "text_to_token", "entropy", "lm"])
    _add_settings(train)

    align = add("align", _align, "transcribed audio of any amount and length -> metadata.jsonl with word times")
    align.epilog = ALIGN_EPILOG
    align.add_argument("input", type=Path, help="folder of audio, or a .jsonl or .parquet table with a column `path`")
    align.add_argument("output", type=Path, help="folder to make; the readers of a folder of speech take it")
    align.add_argument(
        "--aligner", type=Path, required=True, help="run of train aligner, or a Hugging Face Wav2Vec2ForCTC folder"
    )
    align.add_argument("--workers", type=int, help="processes (default: one for each GPU, else for each core)")
    align.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    align.add_argument("--max-seconds", type=float, default=float("inf"), help="reject longer recordings")
    align.add_argument("--files-per-task", type=int, default=100, help="size of a task (default 100)")
    align.add_argument("--max-reject-ratio", type=float, default=0.1, help="fail above this share (default 0.1)")

    tokenize = add("tokenize", _tokenize, "audio of any amount, length and rate -> shards of speech documents")
    tokenize.epilog = TOKENIZE_EPILOG
    tokenize.add_argument(
        "input", type=Path, help="folder of audio, or a .jsonl or .parquet table with a column `path`"
    )
    tokenize.add_argument("output", type=Path, help="folder of shards to make")
    tokenize.add_argument("--tokenizer", type=Path, required=True, help="run folder, or folder of a released tokenizer")
    tokenize.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    tokenize.add_argument("--batch-seconds", type=float, help="audio in one forward pass (default 24, on a GPU 1920)")
    tokenize.add_argument("--max-seconds", type=float, default=float("inf"), help="reject longer recordings")
    tokenize.add_argument("--files-per-shard", type=int, default=1000, help="size of a task (default 1000)")
    tokenize.add_argument("--readers", type=int, default=2, help="reading threads of each worker (default 2)")
    dtype_help = "of matrix products; bfloat16 is faster on a GPU and changes some tokens"
    tokenize.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=dtype_help)
    _add_job_options(tokenize)

    interleave = add("interleave", _interleave, "plain text of any amount -> shards of synthetic interleaved documents")
    interleave.epilog = INTERLEAVE_EPILOG
    interleave.add_argument("corpus", help="folder or file of text, .jsonl, .parquet, .arrow, or hub:NAME")
    interleave.add_argument("output", type=Path, help="folder of shards to make")
    interleave.add_argument("--text-to-token", type=Path, required=True, help="run folder of a text-to-token model")
    interleave.add_argument("--passes", type=int, default=1, help="times through the corpus, other spans each time")
    interleave.add_argument("--ratio", type=float, default=0.3, help="share of words that become speech (default 0.3)")
    interleave.add_argument("--seed", type=int, default=0)
    languages_help = "what the text-to-token model speaks; words in other scripts stay text (default en,zh)"
    interleave.add_argument("--languages", default="en,zh", help=languages_help)
    interleave.add_argument("--text-column", default="text", help="key or column that holds the text (default text)")
    interleave.add_argument("--max-words", type=int, default=2000, help="longer documents are cut (default 2000)")
    interleave.add_argument("--slice-mib", type=float, default=4.0, help="text in one slice of the corpus (default 4)")
    interleave.add_argument("--slices-per-shard", type=int, default=1, help="slices in one task and shard (default 1)")
    interleave.add_argument("--tokenizer", type=Path, help="run folder of the speech tokenizer: measures the noise")
    interleave.add_argument("--noise-sample", type=float, default=0.01, help="share of spans read back (default 0.01)")
    interleave.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    interleave.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model's weights"
    )
    interleave.add_argument("--rows", type=int, help="spans spoken at once (default 128, on a GPU 1024)")
    _add_job_options(interleave)

    evaluate = add("eval", _eval, "score a language model on choice items: which ending is likelier?")
    evaluate.add_argument("lm", type=Path, help="run folder of a language model")
    evaluate.add_argument(
        "items",
        type=Path,
        help='JSONL, one item a line: {"id", "prompt": PART, "endings": [PART, ...], "answer": 0}; '
        'a PART is {"text": "..."} or {"audio": "path.wav"}',
    )
    evaluate.add_argument("--out", type=Path, help="where results go as JSON (default: printed)")

    export = add("export", _export, "a trained plain language model -> a Hugging Face folder that other engines serve")
    export.epilog = EXPORT_EPILOG
    export.add_argument("lm", type=Path, help="run folder of a plain language model (train lm kind=plain)")
    export.add_argument("out", type=Path, help="folder to make: weights, configs, tokenizer.json, README.md")
    export.add_argument(
        "--max-positions",
        type=int,
        default=8192,
        help="longest sequence in tokens that engines will accept (default 8192; the model itself has no limit)",
    )

    inspect = add("inspect", _inspect, "statistics and readable samples of a folder of shards")
    inspect.add_argument("shards", type=Path)
    inspect.add_argument("--samples", type=int, help="documents to show (default 3, on a page 12)")
    inspect.add_argument(
        "--tokenizer",
        type=Path,
        help="speech tokenizer that made the shards: gives seconds and words, reads speech back",
    )
    inspect.add_argument("--page", type=Path, metavar="FILE.html", help="write the samples and figures as a page")
    inspect.add_argument("--json", action="store_true", help="the statistics for machines")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change, applied in order")
    parser.add_argument("--show", action="store_true", help="print all settings as JSON and stop")


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    """Of the commands that make shards in bulk."""
    parser.add_argument("--workers", type=int, help="processes (default: one for each GPU, else for each core)")
    parser.add_argument("--max-reject-ratio", type=float, default=0.1, help="fail above this share (default 0.1)")
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local", help="where tasks run")
    parser.add_argument(
        "--cluster", action="append", default=[], metavar="KEY=VALUE", help="setting of the executor; may be repeated"
    )


def _story(arguments: argparse.Namespace) -> None:
    from speechquilt.recipes import own
    from speechquilt.recipes.toy import pipeline as toy

    recipe = {"toy": (toy.ToyConfig, toy.story), "own": (own.OwnConfig, own.story)}[arguments.name]
    _run_with_settings(*recipe, arguments)


def _study(arguments: argparse.Namespace) -> None:
    from speechquilt.studies import frame_rates, patching, real_text
    from speechquilt.studies import interleaved_data as interleaving

    recipes = {
        "patching": (patching.PatchingConfig, patching.study),
        "interleaving": (interleaving.InterleavingConfig, interleaving.study),
        "frame_rates": (frame_rates.FrameRatesConfig, frame_rates.study),
        "real_text": (real_text.RealTextConfig, real_text.study),
    }
    _run_with_settings(*recipes[arguments.name], arguments)


def _plan(arguments: argparse.Namespace) -> None:
    from speechquilt.commands import plan

    plan.show(arguments.recipe, arguments.gpus, arguments.gpu, arguments.mfu, arguments.json)


def _train(arguments: argparse.Namespace) -> None:
    from functools import partial

    from speechquilt.commands import lm_training, tokenizer_corpora
    from speechquilt.commands import train_entropy as entropy
    from speechquilt.recipes import own
    from speechquilt.stages import train_aligner as aligner

    recipes = {
        "tokenizer": (partial(tokenizer_corpora.preset_run, arguments.settings), tokenizer_corpora.run_tokenizer),
        "aligner": (aligner.AlignerRun, aligner.run_aligner),
        "text_to_token": (own.TextToTokenRun, own.run_text_to_token),
        "entropy": (entropy.EntropyRun, entropy.run),
        "lm": (lm_training.LMTraining, lm_training.run_lm),
    }
    _run_with_settings(*recipes[arguments.recipe], arguments)


def _run_with_settings(config_class: Any, run: Any, arguments: argparse.Namespace) -> None:
    import json

    from speechquilt import config

    settings = config.override(config_class(), arguments.settings)
    if arguments.show:
        print(json.dumps(config.to_dict(settings), indent=1))
    else:
        run(settings)


def _align(arguments: argparse.Namespace) -> None:
    from speechquilt.jobs.align_audio import align_folder

    align_folder(
        arguments.input,
        arguments.output,
        arguments.aligner,
        workers=arguments.workers,
        device=arguments.device,
        max_seconds=arguments.max_seconds,
        files_per_task=arguments.files_per_task,
        max_reject_ratio=arguments.max_reject_ratio,
    )


def _tokenize(arguments: argparse.Namespace) -> None:
    from speechquilt.jobs import tokenize_audio as tokenize

    tokenize.tokenize(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        workers=arguments.workers,
        device=arguments.device,
        batch_seconds=arguments.batch_seconds,
        max_seconds=arguments.max_seconds,
        files_per_shard=arguments.files_per_shard,
        readers=arguments.readers,
        dtype=arguments.dtype,
        max_reject_ratio=arguments.max_reject_ratio,
        executor=arguments.executor,
        cluster=arguments.cluster,
    )


def _interleave(arguments: argparse.Namespace) -> None:
    from speechquilt.jobs import interleave_text as interleave

    interleave.interleave_corpus(
        arguments.corpus,
        arguments.output,
        arguments.text_to_token,
        passes=arguments.passes,
        ratio=arguments.ratio,
        seed=arguments.seed,
        languages=arguments.languages.split(","),
        text_column=arguments.text_column,
        max_words=arguments.max_words,
        slice_bytes=round(arguments.slice_mib * 2**20),
        slices_per_shard=arguments.slices_per_shard,
        tokenizer=arguments.tokenizer,
        noise_sample=arguments.noise_sample,
        device=arguments.device,
        dtype=arguments.dtype,
        rows=arguments.rows,
        workers=arguments.workers,
        max_reject_ratio=arguments.max_reject_ratio,
        executor=arguments.executor,
        cluster=arguments.cluster,
    )


def _eval(arguments: argparse.Namespace) -> None:
    from speechquilt.stages import evaluate

    evaluate.evaluate(arguments.lm, arguments.items, arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    from speechquilt.commands import export

    export.export(arguments.lm, arguments.out, arguments.max_positions)


def _inspect(arguments: argparse.Namespace) -> None:
    from speechquilt.jobs import inspect

    inspect.inspect(
        arguments.shards,
        arguments.samples,
        tokenizer=arguments.tokenizer,
        page=arguments.page,
        as_json=arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
