"""The tables of `speechquilt study real_text` as Markdown, from what its results.json holds.

Trap: two machines have other packages installed, so the tables begin with what was found, and numbers below them belong
to it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from speechquilt.evals.noise import KINDS
from speechquilt.studies.seeds import markdown_table

Found = Mapping[str, Any]


def markdown(found: Found) -> str:
    """`found`: the content of results.json."""
    parts = [
        ("The text", _corpus(found)),
        ("Models", _models(found)),
        ("Interleaving the held-out documents", _interleaved(found)),
        ("Words that were never chosen", _reasons(found["interleaved.stats"]["unspeakable"])),
        ("Spans left as text", _reasons(found["interleaved.stats"]["rejects"])),
        ("Noise: word error rate of the spans, read back by the tokenizer", _noise(found)),
        ("Time", markdown_table(("stage", "seconds"), [(name, f"{s:.0f}") for name, s in found["seconds"].items()])),
    ]
    return "\n".join(f"## {title}\n\n{text}" for title, text in parts)


def _corpus(found: Found) -> str:
    keys = ("found", "train_documents", "train_words", "held_out_documents", "held_out_words")
    sources = found["config"]["corpus"]["sources"]
    rows = [[source, *(str(found[f"corpus.{source}.{key}"]) for key in keys)] for source in sources]
    rows.append(["all", *(str(sum(found[f"corpus.{source}.{key}"] for source in sources)) for key in keys)])
    head = ["source", "documents installed", "train documents", "words", "held-out documents", "words"]
    repeated = found["corpus.repeated_share"]
    return f"{markdown_table(head, rows)}\n{repeated:.1%} of the held-out words stand in paragraphs that a training document has too.\n"


def _models(found: Found) -> str:
    lines = {
        "sentences spoken": f"{found['speech.sentences']} ({found['speech.hours']:.2f} hours)",
        "words, different words": f"{found['speech.words']}, {found['speech.different_words']}",
        "held-out words that training never had": f"{found['speech.held_out_unknown_words']:.1%}",
        "text ids per word": f"{found['speech.text_ids_per_word']:.2f}",
        "tokenizer: WER, CER of held-out sentences": f"{found['tokenizer.wer']:.1%}, {found['tokenizer.cer']:.1%}",
        "tokenizer: codes in use": f"{found['tokenizer.codebook_used']:.1%} of {found['tokenizer.codebook_size']}",
        "tokenizer: recordings left out": str(found["tokenizer.left_out"]),
        "text-to-token: WER of held-out sentences": f"{found['text_to_token.wer']:.1%}",
        "text-to-token: rejected": f"{found['text_to_token.rejected']:.1%}",
    }
    return markdown_table(("what", "measured"), list(lines.items()))


def _interleaved(found: Found) -> str:
    stats = found["interleaved.stats"]
    unspeakable = sum(stats["unspeakable"].values())
    left = sum(stats["rejects"].values())
    lines = {
        "documents, parts of long ones counted": str(found["interleaved.documents"]),
        "rejected documents": str(sum(found["interleaved.rejects"].values())),
        "text tokens, speech tokens": ", ".join(str(found["interleaved.tokens"][m]) for m in ("text", "speech")),
        "words": str(stats["words"]),
        "words that can be spoken": f"{1 - unspeakable / max(1, stats['words']):.1%}",
        "words that are speech": f"{stats['ratio']:.2%}, asked for {found['config']['ratio']:.0%}",
        "spans, of them left as text": f"{stats['spans']}, {left} ({left / max(1, stats['spans']):.1%})",
        "attempts after the first": str(stats["retries"]),
        "speech tokens per text token, espeak-ng": f"{found['reader.speech_per_text_token']:.2f}",
        "espeak-ng's spans that the rule of 1 to 9 would refuse": f"{found['reader.refused']:.1%}",
    }
    return markdown_table(("what", "measured"), list(lines.items()))


def _reasons(reasons: Mapping[str, int]) -> str:
    total = max(1, sum(reasons.values()))
    rows = [(reason, str(n), f"{n / total:.1%}") for reason, n in Counter(reasons).most_common()]
    return markdown_table(("reason", "number", "share"), rows or [("none", "0", "")])


def _noise(found: Found) -> str:
    synthetic, floor = found["interleaved.stats"]["noise_rates"], found["reader.noise_rates"]
    rows = [
        [kind, str(synthetic[kind]["spans"]), str(synthetic[kind]["words"]), *_cells(kind, [synthetic, floor])]
        for kind in (*KINDS, "all")
        if kind in synthetic
    ]
    return markdown_table(["written text", "spans", "words", "text-to-token model", "espeak-ng, the same spans"], rows)


def _cells(kind: str, sets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for rates in sets:
        rate = rates[kind]
        yield f"{rate['wer']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
