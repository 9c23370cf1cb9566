"""Draw docs/figures/*.svg from docs/results/*.json: `python docs/figures.py [FOLDER]`.

Grey text on no background and middle tones read on white and on black. The colours of `reports/charts.py` follow the reader's
system, which need not be the theme that the site, or the page that shows README, was switched to. Every chart is a pure
function of its JSON; a claim on a page stands beside the chart of the same name.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
GREY, BLUE, ORANGE, GREEN, PURPLE = "#7c7c7c", "#3d85d1", "#d9792b", "#3c9a63", "#9467c9"
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "grid.alpha": 0.35,
    "grid.color": GREY,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "speechquilt",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
MODELS = {"baseline": GREY, "static": BLUE, "curriculum": ORANGE, "no_interleaving": PURPLE}
NAMES = {
    "baseline": "plain, a step per token",
    "static": "latent, static patches",
    "curriculum": "latent, curriculum",
    "no_interleaving": "curriculum, no interleaved data",
}


def tables(study: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads((HERE / "results" / f"{study}.json").read_text())["tables"]


def points(
    ax: Axes, x: Sequence[float], cells: Sequence[dict[str, Any]], color: str, label: str, line: str = ""
) -> None:
    """Values with their 95 % intervals."""
    y = [c["value"] for c in cells]
    low = [c["value"] - min(c["interval"][0], c["value"]) for c in cells]
    high = [max(c["interval"][1], c["value"]) - c["value"] for c in cells]
    ax.errorbar(x, y, yerr=[low, high], fmt=f"o{line}", color=color, label=label, capsize=3, markersize=5)


def chance(ax: Axes, percent: float) -> None:
    ax.axhline(percent, color=GREY, linewidth=1, linestyle=":")
    ax.annotate("chance", (0.01, percent), xycoords=("axes fraction", "data"), va="top", fontsize=9)


def story_endings() -> None:
    """The toy story: topic endings by modality of prompt and answer, four models."""
    fig, ax = plt.subplots(figsize=(7, 3.8))
    directions = ["T→T", "T→S", "S→T", "S→S"]
    rows = {r["model"]: r for r in tables("toy_story")["story_endings"] if r["endings"] == "topic"}
    for i, (model, color) in enumerate(MODELS.items()):
        x = [j + 0.16 * (i - 1.5) for j in range(len(directions))]
        points(ax, x, [rows[model][d] for d in directions], color, NAMES[model])
    chance(ax, 50)
    ax.set(ylim=(30, 104), ylabel="right endings, %", title="Story endings, two to choose from (100 stories, one seed)")
    ax.set_xticks(range(4), ["text → text", "text → speech", "speech → text", "speech → speech"])
    fig.legend(loc="outside lower center", ncols=2)


def interleaving_amount() -> None:
    """How much interleaved data is in a fixed budget, against what comes over from text to speech."""
    _, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    found = tables("interleaving")
    x = [0, 0.25, 0.5, 1]

    def cells(table: str, key: str) -> list[dict[str, Any]]:
        return [r[key] for r in found[table] if r["question"] == "amount"]

    points(axes[0], x, cells("topic_endings", "topic S→T"), BLUE, "answered in text", "-")
    points(axes[0], x, cells("topic_endings", "topic S→S"), ORANGE, "answered in speech", "-")
    chance(axes[0], 50)
    axes[0].set(ylim=(35, 105), ylabel="right endings, %", title="Endings of spoken stories")
    apart = [p + 0.02 for p in x]  # so that no interval hides another
    points(axes[1], x, cells("facts_free_answers", "interleaved S→T"), BLUE, "in text", "-")
    points(axes[1], apart, cells("facts_free_answers", "interleaved S→S"), ORANGE, "in speech", "-")
    axes[1].set(ylim=(-3, 105), ylabel="right answers, %", title="Spoken questions, facts only written")
    for ax in axes:
        ax.set_xticks(x, ["0", "¼", "½", "1"])
        ax.set_xlabel("interleaved data, share of the default")
    axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.62))


def interleaving_choices() -> None:
    """Gain of each choice over its reference on spoken stories answered in speech."""
    found = [
        r for r in tables("interleaving")["topic_endings"] if r["question"] != "amount" and "gain" in r["topic S→S"]
    ]
    labels = {
        ("spoken ratio", "0.1"): "10 % of the words spoken, not 30 %",
        ("spoken ratio", "0.2"): "20 %, not 30 %",
        ("spoken ratio", "0.4"): "40 %, not 30 %",
        ("kind", "synthetic"): "synthetic only, not both kinds",
        ("kind", "parallel"): "parallel only, not both kinds",
        ("ASR and TTS pairs", "without"): "without ASR and TTS pairs",
        ("synthetic alone", "curriculum"): "no recordings: curriculum, not static",
    }
    gains(found, "topic S→S", [labels[r["question"], r["condition"]] for r in found], "Spoken stories, spoken endings")


def patching() -> None:
    """Every way to group speech tokens against the token-level baseline."""
    labels = {
        "bpe": "BPE pieces",
        "static": "static patches of 2",
        "aligned": "aligned",
        "mixed": "mixed",
        "curriculum": "curriculum",
        "static_bypass": "static, text past the local modules",
        "baseline_data": "no patches, as many tokens as static",
        "bpe_data": "BPE pieces, as many tokens as static",
    }
    found = [r for r in tables("patching")["accuracy"] if r["system"] in labels]
    gains(
        found, "topic S→S", [labels[r["system"]] for r in found], "Spoken stories, spoken endings, 2 to 3 M parameters"
    )


def gains(rows: Sequence[dict[str, Any]], key: str, labels: Sequence[str], title: str) -> None:
    _, ax = plt.subplots(figsize=(7.5, 0.6 + 0.42 * len(rows)))
    y = range(len(rows))
    for i, row in enumerate(rows):
        cell = row[key]
        low, high = cell["gain_interval"]
        color = BLUE if low > 0 else ORANGE if high < 0 else GREY
        ax.plot([low, high], [i, i], color=color, linewidth=2)
        ax.plot(cell["gain"], i, "o", color=color, markersize=6)
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(y, labels)
    ax.invert_yaxis()
    ax.grid(axis="x")
    ax.set(xlabel="gain in points, 95 % interval, three seeds", title=title)


def frame_rates() -> None:
    """Word error rate against bit rate: ours on the micro-world, the paper's on LibriSpeech."""
    fig, ax = plt.subplots(figsize=(7, 3.6))
    rows = tables("frame_rates")["rates"]
    ax.plot(
        [r["bits_per_s"] for r in rows], [r["wer"] for r in rows], "o-", color=BLUE, label="micro-world, 2,600 steps"
    )
    for r in rows:
        ax.annotate(
            f"{r['frame_rate_hz']:g} Hz", (r["bits_per_s"], r["wer"]), textcoords="offset points", xytext=(6, 6)
        )
    paper = [r for r in rows if r["paper_wer_clean"] is not None]
    for key, label, color in (
        ("clean", "paper, LibriSpeech clean", GREEN),
        ("other", "paper, LibriSpeech other", ORANGE),
    ):
        y = [r[f"paper_wer_{key}"] for r in paper]
        ax.plot([r["paper_bits_per_s"] for r in paper], y, "s--", color=color, label=label)
    ax.set(ylim=(0, 9.5), xlim=(0, 650), xlabel="bits per second", ylabel="word error rate, %")
    ax.set_title("What is read back from the tokens alone")
    ax.grid(axis="y")
    fig.legend(loc="outside lower center", ncols=3, fontsize=10)


def real_text() -> None:
    """Errors of the reader on spans of the text-to-token model and on the same spans spoken by espeak-ng."""
    _, ax = plt.subplots(figsize=(7, 3.4))
    rows = tables("real_text")["noise"]
    places = range(len(rows))
    points(ax, [p - 0.1 for p in places], [r["text_to_token_model"] for r in rows], BLUE, "text-to-token model")
    points(
        ax, [p + 0.1 for p in places], [r["espeak_ng_same_spans"] for r in rows], ORANGE, "espeak-ng, the same spans"
    )
    ax.set_xticks(places, [f"{r['written_text']}\n{r['spans']:,} spans" for r in rows])
    ax.set(ylim=(0, 100), ylabel="word error rate, %", title="Synthetic speech read back, real text")
    ax.grid(axis="y")
    ax.legend(loc="lower right")


def real_story() -> None:
    """The real story: words heard wrong by speaker, from tokens, without the codebook, and by the original Whisper."""
    _, ax = plt.subplots(figsize=(7, 3.6))
    rows = tables("real_story")["heard"]
    readers = {"tokens read back": BLUE, "the same model without its codebook": GREEN, "the original Whisper": GREY}
    for i, (reader, color) in enumerate(readers.items()):
        points(ax, [p + 0.14 * (i - 1) for p in range(len(rows))], [r[reader] for r in rows], color, reader)
    ax.set_xticks(range(len(rows)), [textwrap.fill(r["speakers"], 20) for r in rows])
    ax.set(ylim=(0, None), ylabel="word error rate, %", title="Speech tokens from Whisper tiny.en, read back")
    ax.grid(axis="y")
    ax.legend(loc="upper left")


def speed() -> None:
    """Ratios against what we compare with, each with its aim."""
    latent = tables("latent_benchmarks")
    one, bypass, rows, apart = (r["ratio"] for r in latent["generation"])
    forward = {r["model"]: r for r in latent["forward_and_backward"]}
    hoped = {model: 1 / (1 - 0.9 * (1 - r["true_flops"])) for model, r in forward.items()}  # nine tenths of the saving
    slowest = max(r["ratio"] for r in latent["training_step"])
    bars = [
        ("generation, latent against plain, one row", one, 2.0),
        ("the same, text past the local modules", bypass, 2.0),
        ("the same, 8 rows whose patches close together", rows, 2.0),
        ("the same, 8 rows whose patches close apart", apart, 2.0),
        ("training, latent against plain", 1 / forward["LST"]["seconds"], hoped["LST"]),
        (
            "the same, text past the local modules",
            1 / forward["LST, text bypass"]["seconds"],
            hoped["LST, text bypass"],
        ),
        ("training step, plain against transformers' Llama", 1 / slowest, 1.0),
    ]
    _, ax = plt.subplots(figsize=(7.5, 3.4))
    for i, (_, ratio, aim) in enumerate(bars):
        ax.barh(i, ratio, color=BLUE if ratio >= aim else ORANGE, height=0.55)
        ax.annotate(f"{ratio:.2f}", (max(ratio, aim), i), textcoords="offset points", xytext=(4, -4))
        ax.plot([aim, aim], [i - 0.38, i + 0.38], color=GREY, linewidth=2)
    ax.set_yticks(range(len(bars)), [b[0] for b in bars])
    ax.invert_yaxis()
    ax.set(xlim=(0, 3), xlabel="times as fast; stroke: the aim", title="On two CPU cores")


FIGURES: list[Callable[[], None]] = [
    story_endings,
    interleaving_amount,
    interleaving_choices,
    patching,
    frame_rates,
    real_text,
    real_story,
    speed,
]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for draw in FIGURES:
            draw()
            plt.savefig(folder / f"{draw.__name__}.svg", transparent=True, metadata={"Date": None})
            plt.close("all")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "figures")
