"""Does interleaving carry a fact from text to speech? Two runs that differ in interleaving alone, asked the same questions.

Trap: the difference is paired, item by item, and resampled over facts: questions about one fact are right or wrong together.
"""

import json
from pathlib import Path
from typing import Any

from speechquilt.evals.intervals import paired_difference
from speechquilt.evals.measures import Chart, Promise, above_zero
from speechquilt.evals.results import transfer_measures, transfer_results
from speechquilt.recipes.toy.questions import GROUP_NAMES, PAIRS, WRITTEN_ONLY

WITH, WITHOUT = "curriculum", "no_interleaving"
TASKS = {"transfer_qa": "qa", "transfer": "fact"}  # name in the results -> task
MEASURES = (
    *transfer_measures(
        "facts.transfer_qa.<group>.<pair>",
        "questions on facts written but never spoken, answered freely",
        chart=Chart(
            title="Fact transfer, answered freely: with minus without interleaving", series="group", words=GROUP_NAMES
        ),
        promise=Promise(
            name="Interleaving helps to answer spoken questions, <group>, <pair>",
            bound=above_zero(),
            where={"group": WRITTEN_ONLY, "pair": ("ST", "SS")},
            words=GROUP_NAMES,
        ),
    ),
    *transfer_measures(
        "facts.transfer.<group>.<pair>",
        "the same, by likelihood",
        chart=Chart(
            title="Fact transfer, choice of four: with minus without interleaving", series="group", words=GROUP_NAMES
        ),
    ),
)


def fact_transfer(run_dir: Path) -> dict[str, Any]:
    """Accuracy on facts that were only written, with minus without interleaved data, on the same items."""
    details = {run: json.loads((run_dir / "evals" / run / "details.json").read_text()) for run in (WITH, WITHOUT)}
    flat: dict[str, Any] = {}
    for name, task in TASKS.items():
        for group in WRITTEN_ONLY:
            for pair in PAIRS:
                a, b = (details[run][f"{task}.{group}.{pair}"] for run in (WITH, WITHOUT))
                clusters = [item["cluster"] for item in a["items"]]
                right = [[item["correct"] for item in x["items"]] for x in (a, b)]
                flat |= transfer_results(
                    f"facts.{name}.{group}.{pair}",
                    paired_difference(right[0], right[1], clusters),
                    a["accuracy"]["value"],
                    b["accuracy"]["value"],
                )
    return flat
